"""The training loop on a few easy rows, without a job around it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from training.config import TrainConfig, make_config
from training.data.dataset import Dataset, Split, read_rows, split_rows
from training.errors import StopRequested
from training.loop.checkpoints import Checkpoints
from training.loop.fit import Epoch, FitInputs, Hooks, fit
from training.loop.predict import predict
from training.model.base_model import BaseModelFolder
from training.model.classifier import Classifier, build_model
from training.text.tokenizer import encode, load_tokenizer

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Bench:
    """The easy rows, tokenised, ready to be trained on with these settings."""

    config: TrainConfig
    encoder: BaseModelFolder
    data: Dataset
    rows: dict[str, list[list[int]]]
    tokenizer: Any

    def model(self) -> Classifier:
        return build_model(self.encoder, len(self.data.labels), self.config)

    def fit(
        self, model: Classifier, folder: Path, valid: Split | None = None, hooks: Hooks | None = None
    ) -> list[Epoch]:
        return fit(
            model, self.inputs(valid), device=CPU, board_folder=folder / "board",
            checkpoints=Checkpoints(folder / "checkpoints"), hooks=hooks or Hooks(),
        )  # fmt: skip

    def inputs(self, valid: Split | None = None) -> FitInputs:
        return FitInputs(
            self.data.train, valid or self.data.valid, self.rows["train"], self.rows["valid"], self.data.labels,
            self.config, self.tokenizer.pad_token_id,
        )  # fmt: skip

    def predict(self, model: Classifier, part: str = "valid", batch_size: int = 4) -> Any:
        targets = getattr(self.data, part).targets
        return predict(model, self.rows[part], targets, self.config, batch_size, self.tokenizer.pad_token_id, CPU)


def maker(tiny_encoder: Path, labelled_csv: Path) -> Callable[..., Bench]:
    def make(preset: str = "fast", **overrides: Any) -> Bench:
        settings = {"base_model": str(tiny_encoder), "epochs": 3, "train_batch_size": 8, "learning_rate": 1e-3}
        config = make_config(preset, **{**settings, **overrides})
        data = split_rows(read_rows(labelled_csv), config)
        tokenizer = load_tokenizer(tiny_encoder)
        parts = {"train": data.train, "valid": data.valid, "test": data.test}
        rows = {part: encode(tokenizer, split.texts, config.max_length) for part, split in parts.items()}
        return Bench(config, BaseModelFolder("tiny", tiny_encoder), data, rows, tokenizer)

    return make


def stop_at(step: int, *, validating: bool) -> Hooks:
    def on_step(at: int, total: int, loss: float | None, rate: float | None) -> None:
        if at == step and validating == (loss is None):
            raise StopRequested

    return Hooks(on_step=on_step)
