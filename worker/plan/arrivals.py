"""When tweets arrive: the curve of a day, and the burst of a record. Times are in seconds, rates in tweets a second."""

import math
from pathlib import Path

import numpy as np
import numpy.typing as npt

from worker.errors import BadRequest

Floats = npt.NDArray[np.float64]
DAY_SECONDS = 86_400

# The rate of each hour of a Japanese day, from midnight, over the mean of the day. It was not measured: it is assumed
# to fall until four in the morning, to rise at lunch and to be highest at ten in the evening.
ASSUMED_CURVE = (
    1.30, 0.80, 0.45, 0.30, 0.25, 0.35, 0.60, 0.85, 0.90, 0.85, 0.90, 0.95,
    1.25, 1.05, 0.95, 0.95, 1.00, 1.15, 1.25, 1.35, 1.50, 1.70, 1.85, 1.80,
)  # fmt: skip

# The most tweets posted in one second so far: Japan, 3 August 2013, while "Castle in the Sky" was on television.
RECORD_BURST = 143_199


def read_curve(name: str | None) -> Floats:
    """The curve of a file, or the assumed one: rates of equal parts of a day, with mean 1. Raises `BadRequest`."""
    if name is None:
        return _normal(np.array(ASSUMED_CURVE))
    try:
        words = Path(name).read_text(encoding="utf-8").replace(",", " ").split()
        curve = np.array([float(word) for word in words])
    except (OSError, ValueError) as error:
        raise BadRequest(f"{name} is not a curve: {error}; write one number for each hour of a day") from error
    if len(curve) < 2 or not np.isfinite(curve).all() or (curve < 0).any() or not curve.any():
        raise BadRequest(f"{name} is not a curve; write at least two numbers, none below 0 and not all 0")
    return _normal(curve)


def _normal(curve: Floats) -> Floats:
    return np.asarray(curve / curve.mean(), np.float64)


def in_busiest(curve: Floats, rate: float, hours: float) -> float:
    """The most tweets that arrive within so many hours in a row, when the mean rate of the day is `rate`."""
    days, rest = divmod(hours / 24 * len(curve), len(curve))
    repeated = np.concatenate([curve, curve, curve[:1]])
    sums = np.concatenate([[0.0], np.cumsum(repeated)])
    whole = int(rest)
    part = rest - whole
    most = max(
        max(sums[i + whole] - sums[i] + part * repeated[i + whole] for i in range(len(curve))),
        max(sums[i + whole + 1] - sums[i + 1] + part * repeated[i] for i in range(len(curve))),
    )
    return float(rate * (days * len(curve) + most) * DAY_SECONDS / len(curve))


def steady(random: np.random.Generator, rate: float, seconds: float) -> Floats:
    """Arrival times (N,) of a Poisson process, in order."""
    return np.sort(random.uniform(0.0, seconds, random.poisson(rate * seconds)))


def burst(random: np.random.Generator, rate: float, tweets: float, at: float, seconds: float) -> Floats:
    """A steady stream with so many tweets more in the second that begins at `at`."""
    more = random.uniform(at, at + 1.0, math.ceil(tweets))
    return np.sort(np.concatenate([steady(random, rate, seconds), more]))
