"""Convert logits to probabilities, predicted labels and confidence.

Shared by evaluation and scoring, so it does not import scikit-learn.
"""

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from training.data.columns import MULTI_LABEL_SEPARATOR

Floats = NDArray[np.float32]
Choices = NDArray[np.int64]


def to_probabilities(logits: Tensor, task: str, temperature: float = 1.0) -> Tensor:
    """Return probabilities (B, K) for logits (B, K): softmax for single_label (with either loss), else sigmoid."""
    scaled = logits.float() / temperature
    return scaled.softmax(dim=1) if task == "single_label" else scaled.sigmoid()


def choose(probabilities: Floats, task: str) -> Choices:
    """Return predicted labels (N, K), 0 or 1: the most probable label, or for multi_label each of at least 0.5."""
    if task == "multi_label":
        return (probabilities >= 0.5).astype(np.int64)
    chosen = np.zeros(probabilities.shape, dtype=np.int64)
    chosen[np.arange(len(probabilities)), probabilities.argmax(axis=1)] = 1
    return chosen


def label_text(chosen: Choices, labels: list[str]) -> str:
    """Return the names of a row's labels (K,), joined by `|` as stored in the database; empty for no label."""
    return MULTI_LABEL_SEPARATOR.join(label for label, taken in zip(labels, chosen, strict=True) if taken)


def confidence(probabilities: Floats, chosen: Choices, task: str) -> Floats:
    """Return the confidence (N,): the predicted label's probability; for multi_label, the least certain decision's."""
    if task == "multi_label":
        decided: Floats = np.where(chosen == 1, probabilities, 1 - probabilities)
        return np.asarray(decided.min(axis=1))
    return np.asarray(probabilities.max(axis=1))
