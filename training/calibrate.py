"""How far a model's probabilities can be taken at their word: temperature, calibration error, log loss, Brier score.

Knows logits and targets. A temperature changes how sure a model sounds, never which label it gives.
"""

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_expit, log_softmax

from training.decide import Floats

BINS = 15
# The search's bounds, as logarithms: from a twentieth to twenty.
LOG_TEMPERATURES = (-3.0, 3.0)


def fit_temperature(logits: Floats, targets: Floats, task: str) -> float:
    """The temperature under which validation rows, `logits` and `targets` (N, K), are least surprising.

    Temperature scaling by Guo et al., 2017. Weighed as one more row that says 1: of a few rows that are all right, the
    likeliest temperature alone would be 0.
    """

    def surprise(log_temperature: float) -> float:
        scaled = logits / np.exp(log_temperature)
        return len(logits) * _log_loss(scaled, targets, task) + log_temperature**2 / 2

    return float(np.exp(minimize_scalar(surprise, bounds=LOG_TEMPERATURES, method="bounded").x))


def _log_loss(logits: Floats, targets: Floats, task: str) -> float:
    logits = np.asarray(logits, np.float64)
    if task == "multi_label":
        return float(-(targets * log_expit(logits) + (1 - targets) * log_expit(-logits)).mean())
    return float(-(targets * log_softmax(logits, axis=1)).sum(axis=1).mean())


def log_loss(targets: Floats, probabilities: Floats, task: str) -> float:
    """Mean -log of the truth's probability: of a row's label, or of each yes and no where a row may have several."""
    given = np.where(targets == 1, probabilities, 1 - probabilities)
    given = given if task == "multi_label" else probabilities[targets == 1]
    return float(-np.log(np.clip(given, np.finfo(np.float32).tiny, 1)).mean())


def brier(targets: Floats, probabilities: Floats, task: str) -> float:
    """Mean squared distance of the probabilities from the truth: 0 to 1 with two labels and several, 0 to 2 with more.

    As scikit-learn has it: two probabilities that sum to 1 count once.
    """
    squares = (probabilities - targets) ** 2
    if task == "multi_label":
        return float(squares.mean())
    return float(squares.sum(axis=1).mean() / (2 if targets.shape[1] == 2 else 1))


def reliability(targets: Floats, probabilities: Floats, task: str) -> list[tuple[int, float, float]]:
    """(rows, mean confidence, share that was right) of each of `BINS` equal bins of confidence that has any.

    A row's confidence is the probability of the label it was given; with several labels a row, every label's
    probability counts for itself, and right is that the row has it.
    """
    if task == "multi_label":
        sure, right = probabilities.ravel(), targets.ravel() == 1
    else:
        sure = probabilities.max(axis=1)
        right = probabilities.argmax(axis=1) == targets.argmax(axis=1)
    place = np.clip(np.ceil(sure * BINS).astype(int) - 1, 0, BINS - 1)
    bins = [place == number for number in range(BINS)]
    return [(int(b.sum()), float(sure[b].mean()), float(right[b].mean())) for b in bins if b.any()]


def calibration_error(targets: Floats, probabilities: Floats, task: str) -> float:
    """Expected calibration error: the mean distance between confidence and share right, bins weighed by their rows."""
    found = reliability(targets, probabilities, task)
    return sum(rows * abs(sure - right) for rows, sure, right in found) / sum(rows for rows, _, _ in found)
