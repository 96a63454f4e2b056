"""The threshold of a cascade: which rows the student decides, and which are passed on to the teacher.

A row is passed on when the student's confidence, the calibrated probability of its label, is below the threshold.
Arrays (N, K) are of labelled rows that neither model was trained on, with the labels in one order. Single-label tasks
only.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from db.errors import TweetscoreError
from training.evaluation.bootstrap import Array, resamples
from training.evaluation.calibration import fit_temperature
from training.evaluation.decisions import Floats, highest

TASK = "single_label"
# Thresholds of the curve, evenly spread over the share of rows passed on. With more rows a cascade is hardly faster
# than its teacher.
POINTS, LARGEST_SHARE = 91, 0.9
# The percentile of the bootstrap that must reach the wanted ratio.
LOW_PERCENT = 5.0
BOOTSTRAP, ESTIMATE = "bootstrap", "estimate"
BOUNDS = (BOOTSTRAP, ESTIMATE)


class NoThreshold(TweetscoreError):
    """Raised when no threshold keeps the wanted share of the teacher's macro-F1."""


@dataclass(frozen=True)
class Point:
    """One threshold: the share of rows passed on, macro-F1, and its ratio to the teacher's with the lower bound."""

    threshold: float
    share: float
    f1_macro: float
    ratio: float
    ratio_low: float


def cascade_curve(targets: Floats, student: Floats, teacher: Floats, seed: int) -> list[Point]:
    """Return the points of the curve by rising share, from no row passed on to about `LARGEST_SHARE` of them.

    `student` and `teacher` are probabilities. The lower bound is the 5th percentile of a paired bootstrap: the ratio
    in resamples of the rows, in each of which cascade and teacher see the same ones.
    """
    sure = highest(student).astype(np.float64)
    thresholds = _thresholds(sure)
    passed = sure[None, :] < thresholds[:, None]  # (P, N)
    actual, by_student, by_teacher = (array.argmax(axis=1) for array in (targets, student, teacher))
    decided = np.where(passed, by_teacher, by_student)
    labels = targets.shape[1]
    everything = np.ones((1, len(targets)))
    f1 = _f1(everything, actual, decided, labels)[:, 0]
    of_teacher = _f1(everything, actual, by_teacher[None], labels)[0, 0]
    ratios = [
        _ratio(_f1(drawn, actual, decided, labels), _f1(drawn, actual, by_teacher[None], labels))
        for drawn in resamples(len(targets), seed)
    ]
    low = np.percentile(np.concatenate(ratios, axis=1), LOW_PERCENT, axis=1)
    return [
        Point(*map(float, values))
        for values in zip(thresholds, passed.mean(axis=1), f1, _ratio(f1, of_teacher), low, strict=True)
    ]


def _thresholds(sure: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return at most `POINTS` thresholds that pass on different numbers of rows, rising from 0."""
    levels = np.unique(sure)
    # Between two levels, so that a small difference between engines moves few rows over the threshold.
    between = np.concatenate([[0.0], (levels[:-1] + levels[1:]) / 2])
    shares = np.searchsorted(np.sort(sure), between) / len(sure)
    wanted = np.linspace(0, LARGEST_SHARE, POINTS)
    return np.unique(between[np.minimum(np.searchsorted(shares, wanted), len(between) - 1)])


def _f1(drawn: Array, actual: NDArray[np.int64], decided: NDArray[np.int64], labels: int) -> Array:
    """Return macro-F1 (P, B) of P decisions (P, N) in B resamples (B, N) of the rows."""
    found = np.zeros((len(decided), len(drawn)))
    for label in range(labels):
        is_label, says_label = actual == label, decided == label  # (N,), (P, N)
        hits = (says_label & is_label).astype(np.float64) @ drawn.T
        sides = says_label.astype(np.float64) @ drawn.T + is_label.astype(np.float64) @ drawn.T
        found += 2 * hits / np.maximum(sides, 1)
    return found / labels


def _ratio(f1: Array, of_teacher: Array) -> Array:
    return np.asarray(f1 / np.maximum(of_teacher, np.finfo(np.float64).tiny))


def choose_threshold(curve: Sequence[Point], keep: float, bound: str) -> Point:
    """Return the point with the smallest share from which on every point keeps `keep` of the teacher's macro-F1.

    `bound` names what must reach it: "bootstrap" the lower bound of the ratio, "estimate" the ratio itself. Raises
    `NoThreshold`.
    """
    chosen = None
    for point in reversed(curve):
        if (point.ratio_low if bound == BOOTSTRAP else point.ratio) < keep:
            break
        chosen = point
    if chosen is None:
        nearest = curve[-1]
        raise NoThreshold(
            f"no threshold keeps {keep:g} of the teacher's macro-F1 on these rows: with {nearest.share:.0%} passed on "
            f"the ratio is {nearest.ratio:.4f}, its lower bound {nearest.ratio_low:.4f}; lower --keep, give more rows "
            "with --rows, or promote the teacher itself"
        )
    return chosen


@dataclass(frozen=True)
class Temperatures:
    """Divisors of the logits of each part, for the rows that it decides."""

    student: float
    teacher: float


def fit_temperatures(targets: Floats, student: Floats, teacher: Floats, passed: NDArray[np.bool_]) -> Temperatures:
    """Return the temperatures of a cascade for `student` and `teacher`, logits at the temperatures of their own.

    One for each part, on the rows that it decides: the rows that a student is sure of are easy, and those that are
    passed on are hard, so both differ from the temperature over all rows. A part without rows keeps its own.
    """

    def fitted(logits: Floats, rows: NDArray[np.bool_]) -> float:
        return fit_temperature(logits[rows], targets[rows], TASK) if rows.any() else 1.0

    return Temperatures(fitted(student, ~passed), fitted(teacher, passed))


def as_rows(curve: Sequence[Point]) -> list[dict[str, Any]]:
    """Return the curve for JSON, with figures of four digits."""
    return [
        {name: value if name == "threshold" else round(value, 4) for name, value in vars(point).items()}
        for point in curve
    ]
