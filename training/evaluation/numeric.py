"""Figures of predictions that have a size: the levels of an ordinal task, and the values of a continuous task.

A measure takes the weights (B, N) of the rows, one set per resample of the bootstrap, and returns each figure as (B,).
A figure is NaN where it is undefined: a correlation of values that are all equal, and kappa when one level is both the
only actual and the only predicted one.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from training.evaluation.bootstrap import Array, interval, resamples

Measure = Callable[[Array], dict[str, Array]]


def ordinal_measure(actual: NDArray[np.intp], predicted: NDArray[np.intp], values: list[float]) -> Measure:
    """Measure levels (N,) from 0 to K - 1, which have `values` (K,).

    Quadratic weighted kappa (Cohen, 1968) counts distances in levels, as scikit-learn's `cohen_kappa_score` does. The
    mean absolute error is in the unit of `values`.
    """
    steps = np.arange(len(values))
    squares = np.subtract.outer(steps, steps).astype(np.float64) ** 2
    of_row, places = squares[actual, predicted], np.array(values)
    errors = np.abs(places[actual] - places[predicted])
    is_actual, is_predicted = (np.eye(len(values))[levels] for levels in (actual, predicted))

    def measure(weights: Array) -> dict[str, Array]:
        rows = weights.sum(axis=1)
        by_chance = np.einsum("bi,ij,bj->b", weights @ is_actual, squares, weights @ is_predicted) / rows
        return {
            "quadratic_kappa": 1 - _ratio(weights @ of_row, by_chance),
            "mean_absolute_error": weights @ errors / rows,
        }

    return measure


def value_measure(actual: Array, predicted: Array) -> Measure:
    """Measure values (N,): mean absolute error, root mean squared error, Pearson's r and Spearman's rho."""
    errors = predicted - actual
    centred = _centred(actual), _centred(predicted)

    def measure(weights: Array) -> dict[str, Array]:
        rows = weights.sum(axis=1)
        ranks = (_ranks(actual, weights), _ranks(predicted, weights))
        return {
            "mean_absolute_error": weights @ np.abs(errors) / rows,
            "root_mean_squared_error": np.sqrt(weights @ errors**2 / rows),
            "pearson": _correlation(*centred, weights),
            "spearman": _correlation(*ranks, weights),
        }

    return measure


def figures_of(measure: Measure, rows: int) -> dict[str, float]:
    """Return the figures of all rows, each counted once; without those that are undefined."""
    return {name: float(value) for name, (value,) in measure(np.ones((1, rows))).items() if not np.isnan(value)}


def intervals_of(measure: Measure, rows: int, seed: int) -> dict[str, float]:
    """Return the ends of the 95 % interval of each figure, NAME_low and NAME_high."""
    drawn = [measure(weights) for weights in resamples(rows, seed)]
    ends: dict[str, float] = {}
    for name in drawn[0]:
        found = interval([values[name] for values in drawn])
        if found is not None:
            ends |= {f"{name}_low": found[0], f"{name}_high": found[1]}
    return ends


def _centred(values: Array) -> Array:
    """Return values (1, N) between -1 and 1 with the same correlations, so that rounding errors are negligible."""
    size = np.ptp(values)
    return ((values - values.mean()) / size if size else np.zeros_like(values))[None]


def _correlation(one: Array, other: Array, weights: Array) -> Array:
    """Pearson's r of values (B or 1, N) with weights (B, N)."""
    rows = weights.sum(axis=1, keepdims=True)
    one = one - (weights * one).sum(axis=1, keepdims=True) / rows
    other = other - (weights * other).sum(axis=1, keepdims=True) / rows
    together, *alone = ((weights * a * b).sum(axis=1) for a, b in ((one, other), (one, one), (other, other)))
    return np.clip(_ratio(together, np.sqrt(alone[0] * alone[1])), -1, 1)


def _ranks(values: Array, weights: Array) -> Array:
    """The ranks (B, N) of `values` (N,) in each resample. Equal values have the mean of their ranks."""
    order = np.argsort(values, kind="stable")
    starts = np.flatnonzero(np.diff(values[order], prepend=np.nan) != 0)
    group = np.empty(len(values), np.intp)
    group[order] = np.repeat(np.arange(len(starts)), np.diff(starts, append=len(values)))
    counts = np.add.reduceat(weights[:, order], starts, axis=1)
    ranks: Array = (counts.cumsum(axis=1) - (counts - 1) / 2)[:, group]
    return ranks


def _ratio(numerator: Array, denominator: Array) -> Array:
    """Divide; NaN where the denominator is zero, up to rounding errors."""
    defined = denominator > 1e-12
    return np.where(defined, numerator / np.where(defined, denominator, 1), np.nan)
