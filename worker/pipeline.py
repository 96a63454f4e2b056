"""The route of a tweet: stream -> window -> tokenise -> forward -> store -> ack. It has no other way.

A window is read, scored and committed as one; only then is it acknowledged. A crash at any point leaves its records
pending, somebody else claims them, and the rows that are there already absorb the replay.
"""

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from sqlalchemy.exc import DataError, InterfaceError, InternalError, OperationalError, SQLAlchemyError

from db import store
from db.models import utc_now
from db.session import Database
from worker.errors import BadRecord, StreamError
from worker.records import Tweet, parse_payload
from worker.scorer import PROBE, Champion, Model, Scores, describe
from worker.stream import MAX_ISOLATED_ATTEMPTS, Record, Stream

log = logging.getLogger(__name__)

BLOCK_MS = 1_000  # an idle reader looks up this often to see whether it should stop
LONGEST_BACKOFF_SECONDS = 5.0
# Anybody may XADD an id of his own; a Python date ends with the year 9999.
LAST_MS = 253_402_300_799_000


@dataclass(frozen=True)
class Limits:
    window_tweets: int
    token_budget: int
    min_idle_seconds: float
    linger_seconds: float


@dataclass
class Window:
    """What was read together: tweets to score, records to bury, and where the milliseconds went."""

    records: list[Record]
    started_at: datetime = field(default_factory=utc_now)
    tweets: list[tuple[Record, Tweet]] = field(default_factory=list)
    dead: list[dict[str, Any]] = field(default_factory=list)
    ms: dict[str, float] = field(default_factory=lambda: {"read_ms": 0.0})
    counted: bool = False

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.ms[f"{name}_ms"] = 1000 * (time.perf_counter() - began)


class Pipeline:
    """One scoring worker's route and what it needs on the way."""

    def __init__(
        self, stream: Stream, database: Database, champion: Champion, limits: Limits, stopping: threading.Event
    ) -> None:
        self.stream = stream
        self.database = database
        self.champion = champion
        self.limits = limits
        self.stopping = stopping
        self._claimed_at = -float("inf")

    def drain(self) -> int:
        """Score until the stream has been empty for `linger_seconds`. Returns how many tweets were scored.

        Takes what is there at once and never waits for a fuller window; windows grow by themselves while the device is
        busy. Without a champion nothing is read.
        """
        scored = 0
        self.stream.ensure_group()
        news_at = time.monotonic()
        while not self.stopping.is_set():
            model = self.champion.current()
            if model is None:
                break
            began = time.perf_counter()
            records = self.read()
            if not records:
                if time.monotonic() - news_at >= self.limits.linger_seconds:
                    break
                continue
            with self.holding(records):
                for window in self.windows(records):
                    window.ms["read_ms"] = 1000 * (time.perf_counter() - began)
                    scored += self.route(window, model)
                    began = time.perf_counter()
            news_at = time.monotonic()
        return scored

    def route(self, window: Window, model: Model) -> int:
        """One window from records to acknowledged rows. Returns how many tweets were scored."""
        try:
            parse(window)
            with window.stage("tokenise"):
                rows = model.tokenise([tweet.text for _, tweet in window.tweets])
            with window.stage("forward"):
                scores = model.forward(rows, self.limits.token_budget)
            self.store(window, model, scores)
        except Exception as error:
            return self.isolate(window, model, error)
        # Ack after commit: a crash between the two replays, and the key absorbs it.
        self.stream.ack([record.id for record in window.records])
        self.stream.trim()
        return len(window.tweets)

    # --- the steps

    def read(self) -> list[Record]:
        """Records somebody dropped come before new ones."""
        now = time.monotonic()
        if now - self._claimed_at >= self.limits.min_idle_seconds / 3:
            found = self.stream.claim_idle(round(1000 * self.limits.min_idle_seconds), self.limits.window_tweets)
            if found:
                log.info("claimed %d records whose worker fell silent", len(found))
                return found
            self._claimed_at = now
        block_ms = min(BLOCK_MS, max(1, round(1000 * self.limits.linger_seconds)))
        return self.stream.read(self.limits.window_tweets, block_ms)

    def windows(self, records: list[Record]) -> Iterator[Window]:
        """Trusted records together; each suspect alone."""
        trusted = [record for record in records if not record.suspect]
        if trusted:
            yield Window(trusted)
        for record in records:
            if record.suspect and not self.stopping.is_set():
                yield self.alone(record, "scoring it alone ended the worker")

    def alone(self, record: Record, why: str) -> Window:
        """A window of one, counted before it is tried: a record that ends the process is buried the fourth time."""
        window = Window([record], counted=True)
        attempt = self.stream.count_isolated(record.id)
        if attempt > MAX_ISOLATED_ATTEMPTS:
            window.dead.append(dead_letter(record, f"{why} {MAX_ISOLATED_ATTEMPTS} times"))
        return window

    def isolate(self, window: Window, model: Model, error: Exception) -> int:
        """A window failed in this process. If the device is well, one of its records is to blame: score each alone.

        Raises what the device raises when it is the device: then nobody is buried for it.
        """
        try:
            # A value the database refuses is its record's fault; anything else it says, or the stream, is nobody's.
            if isinstance(error, StreamError) or (
                isinstance(error, SQLAlchemyError) and not isinstance(error, DataError)
            ):
                raise error
            if not window.tweets:
                raise error  # nothing was scored, so no record is to blame
            model.score([PROBE], self.limits.token_budget)
        except Exception:
            if window.counted:
                self.stream.count_isolated(window.records[0].id, -1)
            raise
        log.warning("a window of %d records failed (%s); scoring each alone", len(window.records), type(error).__name__)
        scored = 0
        for record in window.records:
            if not self.stopping.is_set():
                scored += self.route(self.alone(record, f"scoring it alone failed ({type(error).__name__})"), model)
        return scored

    def store(self, window: Window, model: Model, scores: Scores) -> None:
        """Everything of a window in one transaction; while the database is away, wait with the window in hand."""
        pause = 0.1
        while True:
            began = time.perf_counter()
            try:
                with self.database.begin() as session:
                    store.add_tweets(session, [tweet_row(record, tweet) for record, tweet in window.tweets])
                    store.add_predictions(session, prediction_rows(window, model, scores))
                    store.bury(session, window.dead)
                    # The window's own row goes with it, so `store_ms` ends before the commit.
                    window.ms["store_ms"] = 1000 * (time.perf_counter() - began)
                    store.add_window(session, window_row(window, model, scores, self.stream.consumer))
                return
            except (OperationalError, InterfaceError, InternalError) as error:
                if self.stopping.wait(pause):
                    raise
                log.warning("the database does not answer, trying again in %.1f s: %s", pause, error.orig)
                pause = min(LONGEST_BACKOFF_SECONDS, 2 * pause)

    @contextmanager
    def holding(self, records: Sequence[Record]) -> Iterator[None]:
        """Renew the records from a thread of its own for as long as they are being worked on."""
        done = threading.Event()
        ids = [record.id for record in records]

        def renew() -> None:
            while not done.wait(self.limits.min_idle_seconds / 3):
                try:
                    self.stream.renew(ids)
                except StreamError as error:
                    log.warning("records could not be renewed, trying again: %s", error)

        thread = threading.Thread(target=renew, name="renew", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()


def parse(window: Window) -> None:
    """Records to tweets; what is no tweet is marked for burial and leaves the others alone."""
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
        "reason": reason,
        "attempts": record.deliveries,
        "buried_at": utc_now(),
    }


def tweet_row(record: Record, tweet: Tweet) -> dict[str, Any]:
    # The first half of a stream id is the server's clock when the record came in.
    received_ms = min(int(record.id.partition("-")[0]), LAST_MS)
    return {
        "tweet_id": tweet.id,
        "text": tweet.text,
        "author_id": tweet.author_id,
        "lang": tweet.lang,
        "topic": tweet.topic,
        "tweet_created_at": tweet.created_at,
        "received_at": datetime.fromtimestamp(received_ms / 1000, UTC),
    }


def prediction_rows(window: Window, model: Model, scores: Scores) -> list[dict[str, Any]]:
    now = utc_now()
    return [
        {"tweet_id": tweet.id, "model_version_id": model.version_id, "scored_at": now, **said}
        for (_, tweet), said in zip(window.tweets, describe(model.spec, scores.probabilities), strict=True)
    ]


def window_row(window: Window, model: Model, scores: Scores, worker: str) -> dict[str, Any]:
    return {
        "worker": worker,
        "model_version_id": model.version_id,
        "started_at": window.started_at,
        "tweets": len(window.tweets),
        "buried": len(window.dead),
        "tokens": scores.tokens,
        "padded_tokens": scores.padded_tokens,
        **window.ms,
    }
