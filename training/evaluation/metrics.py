"""Compute test metrics with their confidence intervals, the confusion matrix and significance tests."""

import numpy as np
import torch
from scipy.stats import binomtest
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    confusion_matrix,
    f1_score,
    precision_recall_fscore_support,
    roc_auc_score,
)

from training.config import TrainConfig
from training.evaluation.calibration import brier_score, calibration_error, log_loss
from training.evaluation.decisions import Choices, Floats, choose, to_probabilities

# Values by (metric, label). The label is empty for figures of the whole split.
Figures = dict[tuple[str, str], float]

RESAMPLES = 1_000
RESAMPLES_AT_ONCE = 50


def metrics(targets: Floats, probabilities: Floats, labels: list[str], task: str) -> Figures:
    """Return accuracy, micro-F1 and macro-F1, and precision, recall, F1 and support of each label.

    `targets` and `probabilities` (N, K). For single labels micro-F1 equals accuracy by definition.
    """
    truth, chosen = targets.astype(np.int64), choose(probabilities, task)
    figures = {
        ("accuracy", ""): float(accuracy_score(truth, chosen)),
        ("f1_micro", ""): float(f1_score(truth, chosen, average="micro", zero_division=0)),
        ("f1_macro", ""): float(f1_score(truth, chosen, average="macro", zero_division=0)),
    }
    per_label = precision_recall_fscore_support(truth, chosen, average=None, zero_division=0)
    for name, values in zip(("precision", "recall", "f1", "support"), per_label, strict=True):
        figures |= {(name, label): float(value) for label, value in zip(labels, values, strict=True)}
    return figures


def model_figures(
    targets: Floats, logits: Floats, temperature: float, labels: list[str], config: TrainConfig
) -> Figures:
    """Return all figures of a model on its test rows; `targets` and `logits` (N, K).

    All but `ece_uncalibrated` are computed from the probabilities at `temperature`, as in scoring.
    """
    raw, calibrated = (to_probabilities(torch.from_numpy(logits), config.task, t).numpy() for t in (1.0, temperature))
    figures = metrics(targets, calibrated, labels, config.task)
    figures |= intervals(targets, choose(calibrated, config.task), config.seed)
    figures |= ranking(targets, calibrated, labels)
    figures["log_loss", ""] = log_loss(targets, calibrated, config.task)
    figures["brier", ""] = brier_score(targets, calibrated, config.task)
    figures["ece_uncalibrated", ""] = calibration_error(targets, raw, config.task)
    figures["ece", ""] = calibration_error(targets, calibrated, config.task)
    return figures


def intervals(targets: Floats, chosen: Choices, seed: int) -> Figures:
    """Return 95 % intervals of accuracy and macro-F1 by the percentile bootstrap: rows resampled with replacement."""
    truth = targets.astype(np.float64)
    decided = chosen.astype(np.float64)
    exact = (targets == chosen).all(axis=1).astype(np.float64)
    rows, generator = len(targets), np.random.default_rng(seed)
    accuracies, f1s = [], []
    for _ in range(0, RESAMPLES, RESAMPLES_AT_ONCE):
        # How often each row was drawn in each resample: (B, N).
        drawn = generator.multinomial(rows, np.full(rows, 1 / rows), size=RESAMPLES_AT_ONCE).astype(np.float64)
        hits, predicted, actual = drawn @ (truth * decided), drawn @ decided, drawn @ truth
        f1s.append((2 * hits / np.maximum(predicted + actual, 1)).mean(axis=1))
        accuracies.append(drawn @ exact / rows)
    figures: Figures = {}
    for name, values in (("accuracy", accuracies), ("f1_macro", f1s)):
        low, high = np.percentile(np.concatenate(values), (2.5, 97.5))
        figures |= {(f"{name}_low", ""): float(low), (f"{name}_high", ""): float(high)}
    return figures


def mcnemar(only_one: int, only_other: int) -> float:
    """Return the p-value of the exact McNemar test, from the counts of rows that only one of two models got right."""
    differing = only_one + only_other
    return float(binomtest(only_one, differing).pvalue) if differing else 1.0


def ranking(targets: Floats, probabilities: Floats, labels: list[str]) -> Figures:
    """Return ROC-AUC and average precision of each label against the rest, and their means.

    A label that all test rows have, or no row has, gets no figure.
    """
    figures: Figures = {}
    for name, measure in (("roc_auc", roc_auc_score), ("average_precision", average_precision_score)):
        values = {
            label: float(measure(targets[:, k], probabilities[:, k]))
            for k, label in enumerate(labels)
            if 0 < targets[:, k].sum() < len(targets)
        }
        figures |= {(name, label): value for label, value in values.items()}
        if values:
            figures[name, ""] = float(np.mean(list(values.values())))
    return figures


def confusion(targets: Floats, probabilities: Floats, labels: list[str]) -> dict[tuple[str, str], int]:
    """Return counts by (actual, predicted) for every pair of labels, including zeros. For single labels only."""
    table = confusion_matrix(targets.argmax(1), probabilities.argmax(1), labels=range(len(labels)))
    return {
        (actual, predicted): int(table[i, j]) for i, actual in enumerate(labels) for j, predicted in enumerate(labels)
    }
