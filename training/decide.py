"""From logits to what is said of a row: probabilities, its labels, how sure that is.

The part of evaluation that scoring shares: it loads no scikit-learn.
"""

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from training.columns import MULTI_LABEL_SEPARATOR

Floats = NDArray[np.float32]
Choices = NDArray[np.int64]


def to_probabilities(logits: Tensor, task: str, temperature: float = 1.0) -> Tensor:
    """Logits (B, K) -> probabilities (B, K). Of a single label they sum to 1, whichever loss trained them."""
    scaled = logits.float() / temperature
    return scaled.softmax(dim=1) if task == "single_label" else scaled.sigmoid()


def choose(probabilities: Floats, task: str) -> Choices:
    """(N, K) zeros and ones: the likeliest label, or every label at 0.5 and above where a row may have several."""
    if task == "multi_label":
        return (probabilities >= 0.5).astype(np.int64)
    chosen = np.zeros(probabilities.shape, dtype=np.int64)
    chosen[np.arange(len(probabilities)), probabilities.argmax(axis=1)] = 1
    return chosen


def label_text(chosen: Choices, labels: list[str]) -> str:
    """A row's label as it is stored: the name, or names joined by `|`, empty when a row has none."""
    return MULTI_LABEL_SEPARATOR.join(label for label, taken in zip(labels, chosen, strict=True) if taken)


def certainty(probabilities: Floats, chosen: Choices, task: str) -> Floats:
    """(N,) how sure a prediction is: the chosen label's probability, or that of the least sure yes or no of a row."""
    if task == "multi_label":
        decided: Floats = np.where(chosen == 1, probabilities, 1 - probabilities)
        return np.asarray(decided.min(axis=1))
    return np.asarray(probabilities.max(axis=1))
