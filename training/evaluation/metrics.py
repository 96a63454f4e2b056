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
from torch import Tensor

from training.config import TrainConfig
from training.data.numbers import TargetScale, level_values
from training.evaluation.bootstrap import Array
from training.evaluation.calibration import brier_score, calibration_error, log_loss
from training.evaluation.decisions import Choices, Floats, choose, to_probabilities
from training.evaluation.numeric import Measure, figures_of, intervals_of, ordinal_measure, value_measure

# Values by (metric, label). The label is empty for figures of the whole split.
Figures = dict[tuple[str, str], float]


def metrics(
    targets: Floats, probabilities: Floats, labels: list[str], task: str, scale: TargetScale | None = None
) -> Figures:
    """Return accuracy, micro-F1 and macro-F1, and precision, recall, F1 and support of each label.

    `targets` and `probabilities` (N, K). For single labels micro-F1 equals accuracy by definition. An ordinal task also
    has the figures of `ordinal_measure`, and a continuous task only those of `value_measure`, in the unit of `scale`.
    """
    if task == "continuous":
        return _whole(figures_of(_value_measure(targets, probabilities, scale), len(targets)))
    truth, chosen = targets.astype(np.int64), choose(probabilities, task)
    figures = {
        ("accuracy", ""): float(accuracy_score(truth, chosen)),
        ("f1_micro", ""): float(f1_score(truth, chosen, average="micro", zero_division=0)),
        ("f1_macro", ""): float(f1_score(truth, chosen, average="macro", zero_division=0)),
    }
    per_label = precision_recall_fscore_support(truth, chosen, average=None, zero_division=0)
    for name, values in zip(("precision", "recall", "f1", "support"), per_label, strict=True):
        figures |= {(name, label): float(value) for label, value in zip(labels, values, strict=True)}
    if task == "ordinal":
        figures |= _whole(figures_of(_ordinal_measure(targets, chosen, labels), len(targets)))
    return figures


def model_figures(
    targets: Floats,
    logits: Floats,
    temperature: float | Tensor,
    labels: list[str],
    config: TrainConfig,
    scale: TargetScale | None = None,
) -> Figures:
    """Return all figures of a model on its test rows; `targets` and `logits` (N, K). `scale` as in `metrics`.

    All but `ece_uncalibrated` are computed from the probabilities at `temperature`, one for all rows or (N, 1), as in
    scoring.
    """
    raw, calibrated = (to_probabilities(torch.from_numpy(logits), config.task, t).numpy() for t in (1.0, temperature))
    figures = metrics(targets, calibrated, labels, config.task, scale)
    if config.task == "continuous":
        measure = _value_measure(targets, calibrated, scale)
        return figures | _whole(intervals_of(measure, len(targets), config.seed))
    chosen = choose(calibrated, config.task)
    figures |= intervals(targets, chosen, config.seed)
    if config.task == "ordinal":
        measure = _ordinal_measure(targets, chosen, labels)
        figures |= _whole(intervals_of(measure, len(targets), config.seed))
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

    def measure(drawn: Array) -> dict[str, Array]:
        hits, predicted, actual = drawn @ (truth * decided), drawn @ decided, drawn @ truth
        f1 = 2 * hits / np.maximum(predicted + actual, 1)
        return {"accuracy": drawn @ exact / len(targets), "f1_macro": f1.mean(axis=1)}

    return _whole(intervals_of(measure, len(targets), seed))


def _ordinal_measure(targets: Floats, chosen: Choices, labels: list[str]) -> Measure:
    return ordinal_measure(targets.argmax(axis=1), chosen.argmax(axis=1), level_values(labels))


def _value_measure(targets: Floats, outputs: Floats, scale: TargetScale | None) -> Measure:
    """Measure outputs (N, 1) of a continuous model; without `scale` in standard deviations of the training targets."""
    values = (scale.values(array) if scale else np.asarray(array, np.float64) for array in (targets, outputs))
    return value_measure(*(array[:, 0] for array in values))


def _whole(figures: dict[str, float]) -> Figures:
    """Return figures of the whole split."""
    return {(name, ""): value for name, value in figures.items()}


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


def confusion(targets: Floats, probabilities: Floats, labels: list[str], task: str) -> dict[tuple[str, str], int]:
    """Return counts by (actual, predicted) for every pair of labels, including zeros. For rows of one label only."""
    table = confusion_matrix(targets.argmax(1), choose(probabilities, task).argmax(1), labels=range(len(labels)))
    return {
        (actual, predicted): int(table[i, j]) for i, actual in enumerate(labels) for j, predicted in enumerate(labels)
    }
