"""Gauges of live quality and drift for `/metrics`."""

import logging
import threading
import time
from collections.abc import Iterator
from math import nan

from prometheus_client.core import GaugeMetricFamily, Metric

from db.errors import NotFound
from db.session import Database
from worker.quality.live_quality import QualityReport, measure

log = logging.getLogger(__name__)

# Labels and drift change slowly.
REFRESH_SECONDS = 600.0
# Today and yesterday: one day alone would have few tweets after midnight.
DRIFT_DAYS = 2


class QualityMetrics:
    """The gauges, measured in another thread at most every `refresh_seconds`. A scrape gets the last ones at once."""

    def __init__(self, database: Database, refresh_seconds: float = REFRESH_SECONDS) -> None:
        self._database = database
        self._refresh_seconds = refresh_seconds
        self._lock = threading.Lock()
        self._due_at = 0.0
        self._found: list[Metric] = []

    def collect(self) -> list[Metric]:
        """The last gauges; none before the first measurement has ended."""
        if time.monotonic() >= self._due_at and self._lock.acquire(blocking=False):
            threading.Thread(target=self._measure, name="quality", daemon=True).start()
        return self._found

    def _measure(self) -> None:
        try:
            self._found = list(gauges(measure(self._database, DRIFT_DAYS)))
        except NotFound:
            self._found = []  # there is no champion
        except Exception as error:
            log.debug("quality metrics: %s", error)  # the database may be away; the last gauges stay
        finally:
            self._due_at = time.monotonic() + self._refresh_seconds
            self._lock.release()


def gauges(report: QualityReport) -> Iterator[Metric]:
    """The gauges of a report. NaN stands for a figure that is not known, such as the accuracy without labels."""
    for name, text in (
        ("accuracy", "accuracy of the champion by labels of tweets picked at random, NaN without"),
        ("accuracy_low", "lower end of its 95 % interval"),
        ("accuracy_high", "upper end of its 95 % interval"),
        ("labels", "number of these labels"),
    ):
        family = GaugeMetricFamily(f"tweetscore_live_{name}", f"{text}; by days of the period", labels=["days"])
        for period in report.periods:
            family.add_metric([str(period.days)], _number(getattr(period, name)))
        yield family
    tested = report.periods[0].test_accuracy if report.periods else None
    for name, text, value in (
        ("test_accuracy", "accuracy of the champion on its test rows", tested),
        ("expected_accuracy", "mean probability of the tweets of today and yesterday", report.expected_accuracy),
        ("test_expected_accuracy", "mean probability of the test rows", report.test_expected_accuracy),
        ("drift_tweets", "tweets of today and yesterday that the champion scored", report.tweets),
    ):
        yield GaugeMetricFamily(f"tweetscore_{name}", text, value=_number(value))
    psi = GaugeMetricFamily(
        "tweetscore_psi", "population stability index of these tweets against the test rows", labels=["of"]
    )
    chance = GaugeMetricFamily("tweetscore_psi_chance", "about the index that chance alone gives", labels=["of"])
    for name, drift in report.drift.items():
        psi.add_metric([name], drift.psi)
        chance.add_metric([name], drift.chance)
    yield psi
    yield chance


def _number(value: float | None) -> float:
    return nan if value is None else value
