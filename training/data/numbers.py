"""Labels that are numbers: the levels of an ordinal task, and the scale of a continuous target."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import floor, isfinite, log10
from typing import Self

import numpy as np
from numpy.typing import NDArray

from training.errors import BadDataset


def number_of(text: str) -> float | None:
    """The finite number that a text denotes, or None."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if isfinite(value) else None


def exact_text(value: float) -> str:
    """The one spelling of a number: 1, 1.0 and +1 are the same label."""
    return str(int(value)) if value.is_integer() else repr(value)


def number_text(value: float) -> str:
    """A number with at most six digits."""
    return f"{value:.6g}"


def level_values(labels: Sequence[str]) -> list[float]:
    """The place of each level of an ordinal task on a line: its number when all are numbers in order, else its step."""
    numbers = [value for label in labels if (value := number_of(label)) is not None]
    ordered = numbers in (sorted(numbers), sorted(numbers, reverse=True)) and len(set(numbers)) == len(labels)
    return numbers if ordered else [float(step) for step in range(len(labels))]


def level_polarity(labels: Sequence[str]) -> dict[str, float]:
    """Label -> -1..1: -1 for the first level, 1 for the last, and the others in proportion to their values."""
    values = level_values(labels)
    first, last = values[0], values[-1]
    return {label: 2 * (value - first) / (last - first) - 1 for label, value in zip(labels, values, strict=True)}


@dataclass(frozen=True)
class TargetScale:
    """How the outputs of a continuous model relate to values and to `score_signed`.

    An output is a value minus `mean`, divided by `deviation`: of the training targets. `low` has the score -1 and
    `high` the score 1.
    """

    mean: float
    deviation: float
    low: float
    high: float

    @classmethod
    def fitted(cls, values: NDArray[np.float64], polarity: dict[str, float] | None) -> Self:
        """The scale of the training targets (N,). `polarity` gives two numbers scores; None uses the range of `values`.

        Raises `BadDataset` when the values are all equal, or too far apart for a standard deviation.
        """
        with np.errstate(over="ignore", invalid="ignore"):
            mean, deviation = float(values.mean()), float(values.std())
        if not isfinite(deviation) or deviation <= 1e-9 * abs(mean):
            raise BadDataset(
                f"the targets of the training rows lie between {number_text(values.min())} and "
                f"{number_text(values.max())}; a continuous task needs numbers that differ and can be squared"
            )
        low, high = float(values.min()), float(values.max())
        if polarity is not None:
            (one, one_score), (other, other_score) = ((float(text), score) for text, score in polarity.items())
            per_score = (other - one) / (other_score - one_score)
            low, high = one - (1 + one_score) * per_score, one + (1 - one_score) * per_score
        return cls(mean, deviation, low, high)

    def outputs(self, values: NDArray[np.float64]) -> NDArray[np.float32]:
        """Values -> outputs, of any shape."""
        return np.asarray((values - self.mean) / self.deviation, dtype=np.float32)

    def values(self, outputs: NDArray[np.float32]) -> NDArray[np.float64]:
        """Outputs -> values, of any shape."""
        return np.asarray(outputs, np.float64) * self.deviation + self.mean

    def text(self, value: float) -> str:
        """A value without the rounding errors of float32 outputs: 0.1 is 0.1, and 0 is 0."""
        return number_text(round(value, 5 - floor(log10(self.deviation))) + 0.0)

    def signed(self, value: float) -> float:
        """A value -> `score_signed`, -1 to 1."""
        return max(-1.0, min(1.0, 2 * (value - self.low) / (self.high - self.low) - 1))
