"""How right the champion is on live tweets, and how these differ from its test rows: the views' figures and intervals.

Accuracy and macro-F1 come from people's labels of tweets that were picked at random, expected accuracy and drift from
all scored tweets. A worker's metrics read them too, so this module does not import scikit-learn.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any

import numpy as np
from sqlalchemy.orm import Session

from db import registry
from db.errors import NotFound
from db.quality import live
from db.quality.live import LabelledTweet
from db.session import Database
from training.evaluation.bootstrap import Array, interval, resamples

PERIODS = (7, 30)
DRIFT_DAYS = 7
# Usual thresholds of a population stability index: below the first little drift, above the second much.
SOME_DRIFT, MUCH_DRIFT = 0.1, 0.25
LENGTH_BINS, UNKNOWN_BINS = 6, 5
SEED = 0


@dataclass(frozen=True)
class LiveQuality:
    """The row of `v_live_quality` of a period, with the 95 % bootstrap interval of macro-F1."""

    model_version_id: int
    days: int
    labels: int
    tweets: int
    covered_tweets: int
    accuracy: float | None
    accuracy_low: float | None
    accuracy_high: float | None
    effective_labels: float | None
    f1_macro: float | None
    expected_accuracy: float | None
    test_accuracy: float | None
    labels_needed: int | None
    f1_macro_low: float | None = None
    f1_macro_high: float | None = None


@dataclass(frozen=True)
class DriftDay:
    """A row of `v_drift`."""

    model_version_id: int
    day: date
    tweets: int
    expected_accuracy: float | None
    test_expected_accuracy: float | None
    psi_labels: float | None
    psi_length: float | None
    psi_unknown: float | None


@dataclass(frozen=True)
class Drift:
    """The mean population stability index of some days, weighted by tweets.

    `chance` is about the index that tweets like the test rows would have, since both are samples.
    """

    psi: float
    chance: float

    @property
    def verdict(self) -> str:
        """little, some or much."""
        return "little" if self.psi < SOME_DRIFT else "some" if self.psi <= MUCH_DRIFT else "much"


@dataclass(frozen=True)
class QualityReport:
    """`periods` are empty for a champion without single labels; `drift` has labels, length and unknown, where known."""

    model_version_id: int
    periods: list[LiveQuality]
    days: list[DriftDay]
    drift: dict[str, Drift]
    tweets: int
    expected_accuracy: float | None
    test_expected_accuracy: float | None


def measure(database: Database, drift_days: int = DRIFT_DAYS) -> QualityReport:
    """All figures of the champion; expected accuracy and drift are of the last days, at most 30.

    Raises `NotFound` without a champion, and `DatabaseError` when SQLite lacks the functions that the views need.
    """
    with database.read() as session:
        version_id = registry.assigned(session, registry.CHAMPION)
        if version_id is None:
            raise NotFound("there is no champion yet; promote a model with `tweetscore models promote ID`")
        live.require_functions(session)
        labels = len(registry.get(session, version_id).labels)
        month = [DriftDay(**row) for row in live.drift(session, max(PERIODS))]
        periods = _periods(session, version_id, {day.day: day.tweets for day in month})
        test_rows = live.tested_row_count(session, version_id)
    days = [day for day in month if day.day >= live.first_day(drift_days)]
    sizes = {"labels": labels, "length": LENGTH_BINS, "unknown": UNKNOWN_BINS}
    found = {name: _drift(days, f"psi_{name}", size, test_rows) for name, size in sizes.items()}
    return QualityReport(
        version_id,
        periods,
        days,
        {name: drift for name, drift in found.items() if drift is not None},
        sum(day.tweets for day in days),
        _mean(days, "expected_accuracy"),
        days[-1].test_expected_accuracy if days else None,
    )


def _periods(session: Session, version_id: int, tweets: dict[date, int]) -> list[LiveQuality]:
    rows = live.live_quality(session)
    if not any(row.labels for row in rows):
        return [LiveQuality(**row._mapping) for row in rows]
    labelled = live.labelled(session, version_id, max(PERIODS))
    periods = []
    for row in rows:
        first = live.first_day(row.days)
        ends = f1_interval([tweet for tweet in labelled if tweet.day >= first], tweets)
        low, high = ends if ends is not None else (None, None)
        periods.append(LiveQuality(**row._mapping, f1_macro_low=low, f1_macro_high=high))
    return periods


def f1_interval(labelled: Sequence[LabelledTweet], tweets: dict[date, int]) -> tuple[float, float] | None:
    """The 95 % bootstrap interval of macro-F1. `tweets` are the scored tweets of each day, None without labels.

    Each label has the weight of its day, as in the view.
    """
    if not labelled:
        return None
    per_day = Counter(tweet.day for tweet in labelled)
    weights = np.array([tweets.get(tweet.day, 0) / per_day[tweet.day] for tweet in labelled])
    names = sorted({tweet.actual for tweet in labelled} | {tweet.predicted for tweet in labelled})
    actual = np.array([[tweet.actual == name for name in names] for tweet in labelled], np.float64)
    predicted = np.array([[tweet.predicted == name for name in names] for tweet in labelled], np.float64)

    def f1_macro(drawn: Array) -> Array:
        weighted = drawn * weights
        hits, sides = weighted @ (actual * predicted), weighted @ (actual + predicted)
        # As in the view, a label that does not occur among the rows has no F1.
        f1 = np.divide(2 * hits, sides, out=np.full_like(hits, np.nan), where=sides > 0)
        means: Array = np.nanmean(f1, axis=1)
        return means

    return interval([f1_macro(drawn) for drawn in resamples(len(labelled), SEED)])


def _drift(days: Sequence[DriftDay], name: str, bins: int, test_rows: int) -> Drift | None:
    psi, measured = _mean(days, name), [day for day in days if getattr(day, name) is not None]
    if psi is None or not test_rows:
        return None
    # Of two samples of one distribution: (bins - 1) (1 / n + 1 / m).
    tweets = sum(day.tweets for day in measured)
    return Drift(psi, (bins - 1) * (len(measured) / tweets + 1 / test_rows))


def _mean(days: Sequence[DriftDay], name: str) -> float | None:
    """The mean over the days that have the figure, weighted by their tweets."""
    pairs: list[tuple[float, int]] = [(value, day.tweets) for day in days if (value := _value(day, name)) is not None]
    return sum(value * n for value, n in pairs) / sum(n for _, n in pairs) if pairs else None


def _value(day: DriftDay, name: str) -> Any:
    return getattr(day, name)
