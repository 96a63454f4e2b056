"""A window: records read together, the tweets parsed from them, and the rows they become. Uses no server."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from functools import wraps
from operator import attrgetter
from typing import Any, TypeVar

from structlog.contextvars import bound_contextvars

from db.models import utc_now
from worker.errors import BadRecord
from worker.scoring.scores import Columns, Model, Scores, prediction_columns
from worker.stream.stream import Record
from worker.stream.tweet_record import OPTIONAL, Tweet, pack_fields, parse_payload

log = logging.getLogger(__name__)

Result = TypeVar("Result")
STAGES = ("read", "tokenise", "forward", "store")
LOG_SECONDS = 10.0
# A window has more tweets only while a long backlog waits and the model is fast.
USUAL_WINDOW_TWEETS = 512


@dataclass
class Window:
    """Records scored by one model: tweets to score, dead letters to bury, and the milliseconds of each stage.

    `alone` marks a record that is scored alone because its window failed or a worker ended.
    """

    records: list[Record]
    model: Model
    alone: bool = False
    started_at: datetime = field(default_factory=utc_now)
    tweets: list[tuple[Record, Tweet]] = field(default_factory=list)
    dead: list[dict[str, Any]] = field(default_factory=list)
    rows: Any = ()  # what the model made of the texts
    scores: Scores | None = None
    ms: dict[str, float] = field(default_factory=lambda: {f"{stage}_ms": 0.0 for stage in STAGES})

    def set_time(self, stage: str, began: float) -> None:
        """Set the time of a stage that began at `began` (`time.perf_counter`)."""
        self.ms[f"{stage}_ms"] = 1000 * (time.perf_counter() - began)

    @property
    def texts(self) -> list[str]:
        return [tweet.text for _, tweet in self.tweets]

    @property
    def ids(self) -> list[str]:
        return [record.id for record in self.records]


def log_context(step: Callable[..., Result]) -> Callable[..., Result]:
    """Decorate a method that takes a window: its log lines name the window's first record and the model version."""

    @wraps(step)
    def run(route: Any, window: Window, *more: Any) -> Result:
        with bound_contextvars(window=window.records[0].id, model_version=window.model.version_id):
            return step(route, window, *more)

    return run


def add_tweets(window: Window) -> None:
    """Parse the records of a window; a malformed record becomes a dead letter, the others are not affected."""
    window.tweets = []
    buried = {letter["record_id"] for letter in window.dead}
    for record in window.records:
        if record.id in buried:
            continue
        try:
            window.tweets.append((record, parse_payload(record.payload)))
        except BadRecord as error:
            window.dead.append(dead_letter(record, str(error)))


def dead_letter(record: Record, reason: str) -> dict[str, Any]:
    return {
        "record_id": record.id,
        "payload": record.payload or b"",
        "other_fields": pack_fields(record.fields),
        "reason": reason,
        "attempts": record.deliveries,
        "buried_at": utc_now(),
    }


def tweet_columns(window: Window) -> Columns:
    """The columns of `tweets`, one value per tweet of the window."""
    tweets = [tweet for _, tweet in window.tweets]
    return {
        "tweet_id": [tweet.id for tweet in tweets],
        "text": [tweet.text for tweet in tweets],
        **{key: list(map(attrgetter(key), tweets)) for key in OPTIONAL},
        "tweet_created_at": [tweet.created_at for tweet in tweets],
        "received_at": [record.received_at for record, _ in window.tweets],
    }


def stored_predictions(window: Window, scores: Scores) -> Columns:
    return prediction_columns(window.model, [tweet.id for _, tweet in window.tweets], scores)


def window_row(window: Window, scores: Scores, worker: str) -> dict[str, Any]:
    return {
        "worker": worker,
        "model_version_id": window.model.version_id,
        "started_at": window.started_at,
        "tweets": len(window.tweets),
        "buried": len(window.dead),
        "tokens": scores.tokens,
        "padded_tokens": scores.padded_tokens,
        "passed_on": scores.passed_on,
        **window.ms,
    }


class ThroughputLog:
    """Logs tweets, padding and times of the windows committed, every few seconds."""

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self._since = time.monotonic()
        self._windows = self._tweets = self._tokens = self._padded = 0
        self._ms = dict.fromkeys(STAGES, 0.0)

    def add(self, window: Window) -> None:
        self._windows += 1
        self._tweets += len(window.tweets)
        if window.scores is not None:
            self._tokens += window.scores.tokens
            self._padded += window.scores.padded_tokens
        for stage in STAGES:
            self._ms[stage] += window.ms[f"{stage}_ms"]
        if time.monotonic() - self._since >= LOG_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Log the windows since the last time, if any."""
        if self._windows:
            log.info(
                "scored %d tweets in %d windows, padding %.2f; ms a window: %s",
                self._tweets,
                self._windows,
                self._padded / max(1, self._tokens),
                ", ".join(f"{stage} {self._ms[stage] / self._windows:.1f}" for stage in STAGES),
            )
        self._clear()
