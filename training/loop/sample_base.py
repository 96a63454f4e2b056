"""A base model that has learned tweetscore's sample before it learns from few labels of one's own.

It is kept in the machine's cache of models, so only the first job with this base model and these settings trains it.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from training.config import TrainConfig, make_config
from training.data.dataset import Dataset, Split
from training.data.sample import sample_for
from training.loop.checkpoints import Checkpoints
from training.loop.fit import FitInputs, Hooks, fit
from training.model.artifact import make_spec, save_artifact
from training.model.base_model import BaseModelFolder
from training.model.classifier import build_model
from training.store.cache import Cache
from training.store.paths import file_sha256
from training.store.sealed_folder import verify
from training.text.tokenizer import TextEncoder, load_tokenizer

log = logging.getLogger(__name__)

# Settings of the job that its training on the sample shares. The others are those of the preset `fast`.
SETTINGS = (
    "cleaner", "head", "pooling", "loss", "dropout", "max_length", "seed", "valid_batch_size",
    "optimizer", "weight_decay", "schedule", "step_gamma", "warmup_ratio",
    "gradient_accumulation_steps", "max_grad_norm", "class_weights", "precision",
)  # fmt: skip
# Increase it when a change of the code changes what a job learns from the sample.
VERSION = 1

# Takes (step, total steps, loss, samples per second), and may raise to stop.
OnStep = Callable[[int, int, float | None, float | None], None]


@contextmanager
def sample_trained(
    cache: Cache,
    base: BaseModelFolder,
    data: Dataset,
    config: TrainConfig,
    device: torch.device,
    checkpoints: Checkpoints,
    on_step: OnStep,
    note: Callable[[int, int], None],
) -> Iterator[BaseModelFolder]:
    """Provide the base model trained on the sample until the block ends, or `base` where the sample does not help.

    `config` is the job's before `for_rows`. An interrupted training resumes from `checkpoints`. `note` gets the number
    of the sample's rows, and of the row passes that follow: none when the cache has the model.
    """
    sample = sample_for(data, config)
    if sample is None:
        yield base
        return
    train, valid = sample
    settings = {name: getattr(config, name) for name in SETTINGS}
    own = make_config("fast", **settings).for_rows(len(train))
    found = True

    def fill(draft: Path) -> None:
        nonlocal found
        found = False
        note(len(train), own.epochs * len(train))
        model_folder = _trained(base, data.labels, train, valid, own, device, checkpoints, on_step, draft)
        for path in model_folder.iterdir():
            path.rename(draft / path.name)
        model_folder.rmdir()
        checkpoints.clear()

    size = 2 * sum(path.stat().st_size for path in base.folder.glob("*") if path.is_file())
    with cache.entry(_key(base, data.labels, train, own), lambda: size, fill, verify) as folder:
        if found:
            note(len(train), 0)
        yield replace(base, folder=folder, learned_sample=True)


def start_share(base: BaseModelFolder, config: TrainConfig) -> float:
    """Return the share of the weights before training in those that are kept, for a configuration of `build_model`."""
    return config.sample_share if base.learned_sample and config.pooling == "native" else 0.0


def _trained(
    base: BaseModelFolder,
    labels: list[str],
    train: Split,
    valid: Split,
    config: TrainConfig,
    device: torch.device,
    checkpoints: Checkpoints,
    on_step: OnStep,
    folder: Path,
) -> Path:
    """Train on the sample and save the model in a folder of `folder`, which is returned."""
    tokenizer = load_tokenizer(base.folder)
    encode = TextEncoder(tokenizer)
    model = build_model(base, len(labels), config)
    ids, valid_ids = encode(train.texts, config.max_length), encode(valid.texts, config.max_length)
    inputs = FitInputs(train, valid, ids, valid_ids, labels, model.config, tokenizer.pad_token_id)
    history = fit(
        model, inputs, device=device, checkpoints=checkpoints, board_folder=None, hooks=Hooks(on_step=on_step)
    )
    log.info("macro-F1 on %d held-out tweets of the sample: %.4f", len(valid), history[-1].valid_f1_macro)
    saved = folder / "trained"
    save_artifact(saved, model, tokenizer, make_spec(labels, model.config, base, tokenizer))
    return saved


def _key(base: BaseModelFolder, labels: list[str], train: Split, config: TrainConfig) -> str:
    """Return a digest of everything that the weights depend on."""
    files = sorted(path for path in base.folder.iterdir() if path.is_file())
    rows = hashlib.sha256("\0".join(train.texts).encode("utf-8", "surrogatepass"))
    rows.update(train.targets.tobytes())
    parts = {
        "version": VERSION,
        "base": [(path.name, file_sha256(path)) for path in files],
        "labels": labels,
        "rows": rows.hexdigest(),
        "config": config.model_dump(mode="json"),
    }
    return f"sample-{hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()}"
