"""One trial of tuning: train on each split of the training and validation rows, and return the validation figures.

Nothing is written to disk: a trial needs neither checkpoints nor weights, only the figures of its epochs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.model_selection import KFold, StratifiedKFold

from training.config import TrainConfig
from training.data.dataset import Split, joined
from training.evaluation.epoch import Epoch
from training.loop.checkpoints import Checkpoints, RunState
from training.loop.fit import FitInputs, Hooks, fit
from training.model.base_model import BaseModelFolder
from training.model.classifier import Classifier, build_model
from training.text.tokenizer import TextEncoder, load_tokenizer

# Validation rows that the splits should have together. With 400 rows the standard error of a figure of 0.7 is 0.023.
ENOUGH_VALIDATION_ROWS = 400
MAX_SPLITS = 5
# Trials are compared at each of these parts of a training, because their numbers of epochs differ.
PARTS_OF_TRAINING = 4


@dataclass(frozen=True)
class InnerSplit:
    """Rows to train on and rows to validate on, with their token ids."""

    train: Split
    valid: Split
    train_ids: list[list[int]]
    valid_ids: list[list[int]]


@dataclass(frozen=True)
class TrialInputs:
    """What all trials have in common. It contains no test rows."""

    base: BaseModelFolder
    labels: list[str]
    splits: list[InnerSplit]
    pad_id: int
    device: torch.device

    @property
    def validation_rows(self) -> int:
        return sum(len(split.valid) for split in self.splits)

    @property
    def last_report(self) -> int:
        return len(self.splits) * PARTS_OF_TRAINING


@dataclass(frozen=True)
class TrialHooks:
    """Callbacks of a trial; both may raise to stop it.

    `on_step` gets a text on the position, after every step and between the batches of a validation. `on_report` gets
    the finished parts of the training, counted over all splits, and the mean validation figure so far.
    """

    on_step: Callable[[str], None]
    on_report: Callable[[int, float], None]


def prepare_trials(
    base: BaseModelFolder, train: Split, valid: Split, labels: list[str], config: TrainConfig, device: torch.device,
    count: int | None,
) -> TrialInputs:  # fmt: skip
    """Split and tokenise the training and validation rows of a dataset for `count` splits (None: `splits_needed`)."""
    tokenizer = load_tokenizer(base.folder)
    rows, positions = inner_splits(train, valid, config.seed, count or splits_needed(len(valid)))
    encode = TextEncoder(tokenizer)
    ids = encode(rows.texts, config.max_length)
    splits = [
        InnerSplit(
            _take(rows, training), _take(rows, validation), [ids[i] for i in training], [ids[i] for i in validation]
        )
        for training, validation in positions
    ]
    return TrialInputs(base, labels, splits, tokenizer.pad_token_id, device)


def splits_needed(validation_rows: int) -> int:
    """Return the number of splits whose validation rows are enough together, from 1 to `MAX_SPLITS`."""
    return min(MAX_SPLITS, ceil(ENOUGH_VALIDATION_ROWS / validation_rows))


def inner_splits(
    train: Split, valid: Split, seed: int, count: int
) -> tuple[Split, list[tuple[NDArray[np.intp], NDArray[np.intp]]]]:
    """Return the joined rows and, for each split, the positions of its training and of its validation rows.

    One split is that of the job. Several have distinct validation rows, as many as those of the job where the labels
    allow it; rows of one label each are stratified.
    """
    rows = joined(train, valid)
    everything = np.arange(len(rows))
    if count == 1:
        return rows, [(everything[: len(train)], everything[len(train) :])]
    parts = max(count, round(len(rows) / len(valid)))
    one_label_each = rows.targets.shape[1] > 1 and bool((rows.targets.sum(axis=1) == 1).all())
    if one_label_each:
        labels = rows.targets.argmax(axis=1)
        parts = max(2, min(parts, int(np.bincount(labels)[np.unique(labels)].min())))
        found = StratifiedKFold(parts, shuffle=True, random_state=seed).split(everything, labels)
    else:
        found = KFold(parts, shuffle=True, random_state=seed).split(everything)
    return rows, list(found)[:count]


def run_trial(inputs: TrialInputs, config: TrainConfig, hooks: TrialHooks) -> list[float]:
    """Train one model on each split and return the validation figure of each."""
    figures: list[float] = []
    for number, split in enumerate(inputs.splits):
        # Another seed for each split, so that the mean is also one over the first weights and the order of the rows.
        seeded = config.model_copy(update={"seed": (config.seed + number) % 2**31})
        figures.append(_fit_split(inputs, split, seeded, hooks, figures))
        hooks.on_report((number + 1) * PARTS_OF_TRAINING, mean(figures))
    return figures


def _fit_split(
    inputs: TrialInputs, split: InnerSplit, config: TrainConfig, hooks: TrialHooks, before: Sequence[float]
) -> float:
    """Train on one split and return its figure. `before` are the figures of the trial's earlier splits."""
    number, epochs, reported = len(before), [], 0

    def on_step(step: int, total: int, loss: float | None, samples_per_second: float | None) -> None:
        hooks.on_step(f"split {number + 1} of {len(inputs.splits)}, step {step} of {total}")

    def on_epoch(epoch: Epoch) -> None:
        nonlocal reported
        epochs.append(epoch)
        part = PARTS_OF_TRAINING * epoch.epoch // config.epochs
        if reported < part < PARTS_OF_TRAINING:
            reported = part
            hooks.on_report(number * PARTS_OF_TRAINING + part, mean([*before, kept_figure(epochs)]))

    model = build_model(inputs.base, len(inputs.labels), config)
    history = fit(
        model,
        FitInputs(
            split.train, split.valid, split.train_ids, split.valid_ids, inputs.labels, model.config, inputs.pad_id
        ),
        device=inputs.device,
        checkpoints=NoCheckpoints(),
        board_folder=None,
        hooks=Hooks(on_step=on_step, on_epoch=on_epoch),
    )
    return kept_figure(history)


def kept_figure(epochs: Sequence[Epoch]) -> float:
    """Return the validation macro-F1 of the epoch whose weights a job would keep."""
    return [epoch for epoch in epochs if epoch.kept][-1].valid_f1_macro


class NoCheckpoints(Checkpoints):
    """Saves nothing, so the model keeps the weights of its last epoch."""

    def __init__(self) -> None:
        super().__init__(Path())

    def clear(self) -> None:
        pass

    def save(self, state: RunState) -> Path:
        return self.folder

    def save_best(self, epoch: int, model: Classifier) -> str:
        return ""

    def restore(self, state: RunState) -> bool:
        return False

    def load_best(self, name: str, model: Classifier) -> None:
        pass


def _take(rows: Split, positions: NDArray[np.intp]) -> Split:
    return Split(
        [rows.texts[i] for i in positions],
        rows.targets[positions],
        [rows.row_numbers[i] for i in positions],
        None if rows.weights is None else rows.weights[positions],
    )
