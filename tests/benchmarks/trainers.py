"""One training run in a process of its own, by one of three ways: our own, Hugging Face's Trainer, the guide's loop.

`python -m tests.benchmarks.trainers WAY FOLDER TEXTS` prints one JSON line: samples a second and the peak memory.
"""

import argparse
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from tests.benchmarks.peers import GuideDataset
from training.config import TrainConfig, make_config
from training.data.dataset import Split
from training.loop.checkpoints import Checkpoints
from training.loop.fit import FitInputs, Hooks, fit
from training.model.base_model import BaseModelFolder
from training.model.classifier import build_model
from training.text.tokenizer import TextEncoder, load_tokenizer

CPU = torch.device("cpu")
LABELS = ["negative", "neutral", "positive"]
Floats = np.ndarray[Any, np.dtype[np.float32]]


def ours(
    folder: Path, texts: Sequence[str], config: TrainConfig, device: torch.device = CPU, *, board: bool = True
) -> float:
    """Samples a second of one epoch of `fit`, checkpoints on disk and, with `board`, TensorBoard in its place."""
    tokenizer = load_tokenizer(folder)
    rows = TextEncoder(tokenizer)(texts, config.max_length)
    model = build_model(BaseModelFolder("encoder", folder), len(LABELS), config)
    split = Split(list(texts), _targets(len(texts)), list(range(len(texts))))
    few = Split(split.texts[:32], split.targets[:32], split.row_numbers[:32])
    steps: list[float] = []

    def on_step(step: int, total: int, loss: float | None, rate: float | None) -> None:
        if step == len(steps):  # the first call comes before the first step; those of a validation repeat the last
            steps.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as scratch:
        fit(
            model, FitInputs(split, few, rows, rows[:32], LABELS, config, tokenizer.pad_token_id), device=device,
            checkpoints=Checkpoints(Path(scratch) / "job"), board_folder=Path(scratch) / "board" if board else None,
            hooks=Hooks(on_step=on_step),
        )  # fmt: skip
    return len(texts) / (steps[-1] - steps[0])


class Clock(TrainerCallback):
    """When training began and when its last step ended: as `ours` counts, so without the saving at the end."""

    def __init__(self) -> None:
        self.began = self.ended = 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.began = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ended = time.perf_counter()


def hugging_face(
    folder: Path, train: Split, test: Split | None, config: TrainConfig, labels: Sequence[str] = LABELS,
    **options: Any,
) -> tuple[float, Floats | None]:  # fmt: skip
    """Samples a second of the Trainer on the CPU, and its test logits (N, K).

    Its defaults stand, float32 among them, but for what both are given alike: batch size, epochs, learning rate with
    its schedule, and the seed; and for `options`, arguments of the Trainer.
    """
    tokenizer = load_tokenizer(folder)
    encode, clock = TextEncoder(tokenizer), Clock()

    def items(split: Split) -> list[dict[str, Any]]:
        wanted = split.targets.argmax(axis=1).tolist()
        encoded = encode(split.texts, config.max_length)
        return [{"input_ids": ids, "label": label} for ids, label in zip(encoded, wanted, strict=True)]

    with tempfile.TemporaryDirectory() as scratch:
        trainer = Trainer(
            model_init=lambda: AutoModelForSequenceClassification.from_pretrained(
                str(folder), num_labels=len(labels), dtype=torch.float32
            ),
            args=TrainingArguments(
                output_dir=scratch,
                per_device_train_batch_size=config.train_batch_size,
                num_train_epochs=config.epochs,
                learning_rate=config.learning_rate,
                lr_scheduler_type="linear",
                warmup_steps=config.warmup_ratio,  # below 1 it is a share of all steps
                weight_decay=config.weight_decay,
                seed=config.seed,
                report_to="none",
                disable_tqdm=True,
                **{"use_cpu": True, **options},
            ),
            train_dataset=items(train),
            data_collator=DataCollatorWithPadding(tokenizer),
            callbacks=[clock],
        )
        trainer.train()
        logits = trainer.predict(items(test)).predictions if test is not None else None
    return config.epochs * len(train) / (clock.ended - clock.began), logits


def trainer(folder: Path, texts: Sequence[str], config: TrainConfig, **options: Any) -> float:
    """Samples a second of the Trainer over texts with labels in turn."""
    split = Split(list(texts), _targets(len(texts)), list(range(len(texts))))
    return hugging_face(folder, split, None, config, **options)[0]


def guide(folder: Path, texts: Sequence[str], config: TrainConfig) -> float:
    """Samples a second of the guide's loop over texts padded to 200 tokens, its head and its loss; float32."""
    model = build_model(BaseModelFolder("encoder", folder), 2, make_config("guide", pooling="pooler"))
    tokenizer = load_tokenizer(folder)
    loader = DataLoader(GuideDataset(texts, tokenizer), batch_size=config.train_batch_size, shuffle=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    model.train()
    began = time.perf_counter()
    for batch in loader:
        outputs = model(batch["input_ids"], batch["attention_mask"])
        targets = torch.eye(2)[torch.zeros(len(outputs), dtype=torch.long)]
        loss = nn.BCEWithLogitsLoss()(outputs, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return len(texts) / (time.perf_counter() - began)


def macro_f1(targets: Floats, logits: Floats, labels: list[str]) -> float:
    from training.evaluation.metrics import metrics  # needs scikit-learn, which a speed does not

    return metrics(targets, np.asarray(logits, np.float32), labels, "single_label")["f1_macro", ""]


def _targets(n: int) -> Floats:
    targets = np.zeros((n, len(LABELS)), np.float32)
    targets[np.arange(n), np.arange(n) % len(LABELS)] = 1
    return targets


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("way", choices=("ours", "trainer", "guide"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("texts", type=Path, help="a text a line")
    parser.add_argument("--batch-size", type=int, default=16)
    options = parser.parse_args()
    texts = options.texts.read_text(encoding="utf-8").splitlines()
    config = make_config("fast", epochs=1, train_batch_size=options.batch_size)

    ways: dict[str, Callable[[Path, Sequence[str], TrainConfig], float]] = {
        "ours": ours, "trainer": trainer, "guide": guide,
    }  # fmt: skip
    speed = ways[options.way](options.folder, texts, config)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # KiB on Linux
    print(json.dumps({"samples_per_second": speed, "peak_mb": peak}), file=sys.stdout)


if __name__ == "__main__":
    main()
