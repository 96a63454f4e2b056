"""Convert logits to probabilities, predicted labels and confidence.

For continuous tasks the arrays named probabilities hold the model's outputs (N, 1), see `TargetScale`. Shared by
evaluation and scoring, so it does not import scikit-learn.
"""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from training.data.columns import MULTI_LABEL_SEPARATOR

Floats = NDArray[np.float32]
Choices = NDArray[np.int64]


# Outputs of a continuous model that differ by less, in standard deviations of its targets, count as the same.
SAME_VALUE = 0.1


def to_probabilities(logits: Tensor, task: str, temperature: float | Tensor = 1.0) -> Tensor:
    """Return probabilities (B, K) for logits (B, K): sigmoid for multi_label, else softmax (with either loss).

    `temperature` is one for all rows, or (B, 1). For a continuous task return the outputs (B, 1) unchanged;
    `TargetScale` converts them to values.
    """
    if task == "continuous":
        return logits.float()
    scaled = logits.float() / temperature
    return scaled.sigmoid() if task == "multi_label" else scaled.softmax(dim=1)


def choose(probabilities: Floats, task: str) -> Choices:
    """Return predicted labels (N, K), 0 or 1: the most probable label, or for multi_label each of at least 0.5.

    For ordinal the median of the distribution: the first level up to which the probabilities add up to at least a half.
    No other level has a smaller expected absolute error. It is the most probable level wherever that has over 0.5.
    """
    if task == "multi_label":
        return (probabilities >= 0.5).astype(np.int64)
    if task == "ordinal":
        # Half of the actual sum: float32 probabilities may add up to a little less than 1.
        sums = probabilities.cumsum(axis=1, dtype=np.float64)
        index = (sums >= sums[:, -1:] / 2).argmax(axis=1)
    else:
        index = probabilities.argmax(axis=1)
    chosen = np.zeros(probabilities.shape, dtype=np.int64)
    chosen[np.arange(len(probabilities)), index] = 1
    return chosen


def label_texts(chosen: Choices, labels: list[str]) -> list[str]:
    """Return the `label_text` of every row of (N, K)."""
    rows = list(map(tuple, chosen.tolist()))
    texts = {row: label_text(row, labels) for row in set(rows)}
    return [texts[row] for row in rows]


def label_text(chosen: Iterable[int], labels: list[str]) -> str:
    """Return the names of a row's labels (K,), joined by `|` as stored in the database; empty for no label."""
    return MULTI_LABEL_SEPARATOR.join(label for label, taken in zip(labels, chosen, strict=True) if taken)


def confidence(probabilities: Floats, chosen: Choices, task: str) -> Floats:
    """Return the confidence (N,): the predicted label's probability; for multi_label, the least certain decision's."""
    if task == "multi_label":
        decided: Floats = np.where(chosen == 1, probabilities, 1 - probabilities)
        return np.asarray(decided.min(axis=1))
    return np.asarray(probabilities[chosen == 1])


def highest(probabilities: Floats) -> Floats:
    """Return the confidence (N,) of a single-label model for probabilities (N, K) of at least one label."""
    found: Floats = probabilities.max(axis=1)
    return found


def agreement(probabilities: Floats, others: Floats, task: str) -> float:
    """Return the share of rows for which two engines decide alike; `probabilities` and `others` (N, K)."""
    if task == "continuous":
        return float((np.abs(probabilities - others) < SAME_VALUE).all(axis=1).mean())
    return float((choose(probabilities, task) == choose(others, task)).all(axis=1).mean())
