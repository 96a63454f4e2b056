"""The labels of rows, the names of a model's outputs, and the targets of training."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from db.errors import listed, shown
from training.config import TrainConfig
from training.data.columns import INTEGER, MULTI_LABEL_SEPARATOR, VALUE
from training.data.numbers import exact_text, number_of
from training.errors import BadDataset


def labels_of_row(raw: str, number: int, config: TrainConfig) -> tuple[str, ...]:
    """The label names of one row, in order and without repeats."""
    parts = raw.split(MULTI_LABEL_SEPARATOR) if config.task == "multi_label" else [raw]
    names = []
    for part in (part.strip() for part in parts):
        if not part and config.task == "multi_label":
            continue  # a row without labels is a negative example of every label
        if not part:
            raise BadDataset(f"row {number} has no label; fill it in or remove the row")
        if config.labels is not None and part not in config.labels:
            raise BadDataset(
                f"label {shown(part)} in row {number} is none of {listed(config.labels)}; "
                "fix the row or name it in --labels"
            )
        names.append(_name(part, number, config) if config.labels is None else config.labels[part])
    return tuple(dict.fromkeys(names))


def _name(label: str, row_number: int, config: TrainConfig) -> str:
    """A label as it is written or, where the task needs numbers, its number."""
    if config.task not in ("ordinal", "continuous"):
        return label
    value = number_of(label)
    if value is None:
        remedy = "correct it, or give the levels in order with --labels low,mid,high"
        raise BadDataset(
            f"label {shown(label)} in row {row_number} is not a number, which the task {config.task} needs; "
            + (remedy if config.task == "ordinal" else "correct it or remove the row")
        )
    return exact_text(value)


def output_labels(row_labels: Sequence[tuple[str, ...]], config: TrainConfig) -> list[str]:
    """The labels in the order of the outputs: as configured, else numbers by value and other names alphabetically."""
    if config.levels is not None:
        return config.levels
    if config.labels is not None:
        return list(dict.fromkeys(config.labels.values()))
    if config.task == "continuous":
        return [VALUE]
    names = {name for row in row_labels for name in row}
    if config.task == "ordinal":
        return sorted(names, key=float)
    if all(INTEGER.fullmatch(name) for name in names):
        return sorted(names, key=int)
    return sorted(names)


def target_array(row_labels: Sequence[tuple[str, ...]], names: list[str], config: TrainConfig) -> NDArray[np.float64]:
    """Targets (N, K): zeros and ones, or for a continuous task the numbers (N, 1)."""
    if config.task == "continuous":
        return np.array([[float(number)] for (number,) in row_labels])
    column = {name: index for index, name in enumerate(names)}
    targets = np.zeros((len(row_labels), len(names)))
    for row, of_row in enumerate(row_labels):
        targets[row, [column[name] for name in of_row]] = 1.0
    return targets
