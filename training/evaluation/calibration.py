"""Calibration of probabilities: temperature scaling, calibration error, log loss, Brier score.

A temperature changes the confidence of a single-label model, never its predicted label. That of an ordinal model is the
median of the distribution, which a temperature can move.
"""

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_expit, log_softmax

from training.evaluation.decisions import Floats, choose, confidence

BINS = 15
# Bounds of log T in the search: T between 1/20 and 20.
LOG_TEMPERATURES = (-3.0, 3.0)


def fit_temperature(logits: Floats, targets: Floats, task: str) -> float:
    """Return the temperature T that minimises the log loss of validation rows, `logits` and `targets` (N, K).

    Temperature scaling after Guo et al. (2017), "On Calibration of Modern Neural Networks". Minimises
    N * log_loss(logits / T) + (log T)^2 / 2. The second term is a unit Gaussian prior on log T; it keeps T positive
    when every row is correct, where the log loss alone has its minimum at T = 0. A continuous task has no
    probabilities, and its T is 1.
    """
    if task == "continuous":
        return 1.0

    def penalised_loss(log_temperature: float) -> float:
        scaled = logits / np.exp(log_temperature)
        return len(logits) * _log_loss(scaled, targets, task) + log_temperature**2 / 2

    return float(np.exp(minimize_scalar(penalised_loss, bounds=LOG_TEMPERATURES, method="bounded").x))


def _log_loss(logits: Floats, targets: Floats, task: str) -> float:
    logits = np.asarray(logits, np.float64)
    if task == "multi_label":
        return float(-(targets * log_expit(logits) + (1 - targets) * log_expit(-logits)).mean())
    return float(-(targets * log_softmax(logits, axis=1)).sum(axis=1).mean())


def log_loss(targets: Floats, probabilities: Floats, task: str) -> float:
    """Return the mean of -log p, where p is the probability of the actual label; for multi_label, of each decision.

    `targets` and `probabilities` (N, K).
    """
    actual = np.where(targets == 1, probabilities, 1 - probabilities)
    actual = actual if task == "multi_label" else probabilities[targets == 1]
    return float(-np.log(np.clip(actual, np.finfo(np.float32).tiny, 1)).mean())


def brier_score(targets: Floats, probabilities: Floats, task: str) -> float:
    """Return the Brier score (Brier, 1950): the mean squared error of `probabilities` against `targets`, both (N, K).

    As in scikit-learn: from 0 to 1 for two labels (one of the two columns counts) and for multi_label (mean over
    labels), else from 0 to 2 (sum over labels).
    """
    squares = (probabilities - targets) ** 2
    if task == "multi_label":
        return float(squares.mean())
    return float(squares.sum(axis=1).mean() / (2 if targets.shape[1] == 2 else 1))


def reliability_bins(targets: Floats, probabilities: Floats, task: str) -> list[tuple[int, float, float]]:
    """Return (rows, mean confidence, accuracy) for each non-empty one of `BINS` bins of equal width.

    The confidence of a row is the probability of its predicted label. For multi_label each label's probability counts
    separately, and is correct when the row has the label.
    """
    if task == "multi_label":
        sure, correct = probabilities.ravel(), targets.ravel() == 1
    else:
        chosen = choose(probabilities, task)
        sure, correct = confidence(probabilities, chosen, task), (chosen == targets).all(axis=1)
    bin_of_row = np.clip(np.ceil(sure * BINS).astype(int) - 1, 0, BINS - 1)
    bins = [bin_of_row == number for number in range(BINS)]
    return [(int(b.sum()), float(sure[b].mean()), float(correct[b].mean())) for b in bins if b.any()]


def calibration_error(targets: Floats, probabilities: Floats, task: str) -> float:
    """Return the expected calibration error (Guo et al., 2017): the mean over bins, weighted by rows, of
    |confidence - accuracy|."""
    bins = reliability_bins(targets, probabilities, task)
    return sum(rows * abs(mean - accuracy) for rows, mean, accuracy in bins) / sum(rows for rows, _, _ in bins)
