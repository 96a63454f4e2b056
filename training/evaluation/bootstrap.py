"""Percentile bootstrap: 95 % intervals of figures, from rows resampled with replacement."""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 1_000
RESAMPLES_AT_ONCE = 50

Array = NDArray[np.float64]


def resamples(rows: int, seed: int) -> Iterator[Array]:
    """Yield how often each row was drawn in each of some resamples: (B, N)."""
    generator = np.random.default_rng(seed)
    for _ in range(0, RESAMPLES, RESAMPLES_AT_ONCE):
        yield generator.multinomial(rows, np.full(rows, 1 / rows), size=RESAMPLES_AT_ONCE).astype(np.float64)


def interval(values: Sequence[Array]) -> tuple[float, float] | None:
    """Return the ends of the 95 % interval of a figure, from its values in the resamples.

    NaN stands for a resample in which the figure is undefined, and is left out. None when there is no other.
    """
    found = np.concatenate(values)
    found = found[~np.isnan(found)]
    if not found.size:
        return None
    low, high = np.percentile(found, (2.5, 97.5))
    return float(low), float(high)
