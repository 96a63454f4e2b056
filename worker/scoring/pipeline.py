"""The route of a tweet: stream -> window -> tokenise -> forward -> store -> ack.

A window is read, scored and committed as one, and acknowledged after the commit. A crash at any point leaves its
records pending; another worker claims them, and rows that exist already absorb the replay.

The steps of consecutive windows overlap: while one window is on the device, the next is tokenised and the last is
stored. When a window fails, and when a record may have killed a worker, each record is scored alone on the same route.
"""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from sqlalchemy.exc import DataError, InterfaceError, InternalError, OperationalError, SQLAlchemyError

from db import predictions
from db.errors import SchemaMismatch
from db.session import Database
from training import failpoint
from worker.errors import StreamError
from worker.scoring import metrics
from worker.scoring.champion import Champion
from worker.scoring.held_records import HeldRecords
from worker.scoring.overlap import UNSCORED_ON_CPU, OverlappedSteps
from worker.scoring.scores import Model
from worker.scoring.window import (
    USUAL_WINDOW_TWEETS,
    ThroughputLog,
    Window,
    add_tweets,
    dead_letter,
    log_context,
    stored_predictions,
    tweet_columns,
    window_row,
)
from worker.stream.sharded_stream import TweetStream
from worker.stream.stream import MAX_ISOLATED_ATTEMPTS, Record

log = logging.getLogger(__name__)

BLOCK_MS = 1_000  # how often an idle reader checks whether it should stop
MAX_BACKOFF_SECONDS = 5.0
# A window of large records is followed by a smaller one, which bounds the memory of the windows in flight.
WINDOW_BYTES = 8 * 1024 * 1024
# A consumer without records is removed after this many times `min_idle_seconds`.
CONSUMER_IDLE_FACTOR = 10
# The first window after a pause; each next one is twice as large, so that the device starts while others are read.
FIRST_WINDOW_TWEETS = 64
# A window above the usual size takes at most this part of the backlog, so that several workers share it, and at most
# this long on the device, so that a worker that is stopped ends in time and a crash repeats little.
BACKLOG_PARTS = 8
LARGE_WINDOW_SECONDS = 2.0
# A failed window with more records is scored in halves first.
SCORED_ALONE_AT_ONCE = 8
# Scored to find out whether the device works.
PROBE = "今日はいい天気です。"


@dataclass(frozen=True)
class Limits:
    window_tweets: int
    min_idle_seconds: float
    linger_seconds: float
    unscored_windows: int = UNSCORED_ON_CPU


class Pipeline:
    """The route in one scoring worker, from its stream to its database."""

    def __init__(
        self, stream: TweetStream, database: Database, champion: Champion, limits: Limits, stopping: threading.Event,
        may_read: Callable[[], bool] = lambda: True, after_commit: Callable[[Window], None] = lambda window: None,
    ) -> None:  # fmt: skip
        """`after_commit` gets each window that was stored and acknowledged; it must neither block nor raise."""
        self.stream = stream
        self.database = database
        self.champion = champion
        self.limits = limits
        self.stopping = stopping
        self.may_read = may_read
        self.after_commit = after_commit
        self.held = HeldRecords(stream, limits.min_idle_seconds / 3)
        # Last progress by `time.monotonic`: records were read, a window was committed, or waits for the database.
        self.alive_at = time.monotonic()
        self._throughput = ThroughputLog()
        self._claimed_at = -float("inf")
        self._device_times = threading.Lock()
        self._device_left_at = 0.0
        # Of the device, each window counting half of the one after it: two share it, and their times vary in turn.
        self._recent_tweets = self._recent_ms = 0.0

    def drain(self) -> int:
        """Score until the stream has been empty for `linger_seconds`. Returns the number of tweets scored.

        A window takes the records that are there, without waiting for more. Windows grow while the device is busy.
        Without a champion, or with a schema of another release, nothing is read. Raises the error that prevents
        scoring; the records then stay pending.
        """
        scored, more = 0, True
        self.stream.ensure_group()
        try:
            with self.held.renewed():
                while more:
                    with OverlappedSteps(
                        self.tokenise, self.forward, self.store, self.limits.unscored_windows
                    ) as steps:
                        more, suspects = self.read_windows(steps)
                    scored += sum(steps.results)
                    for window, error in steps.failed:
                        scored += self.isolate(window, error)
                    if suspects is not None:
                        scored += self.score_each_alone(suspects, "scoring it alone ended the worker")
        finally:
            self._throughput.flush()
            self.held.clear()
        return scored

    def read_windows(self, steps: OverlappedSteps) -> tuple[bool, Window | None]:
        """Read windows and start their steps, until the stream stays empty or records need to be scored alone.

        Returns whether there may be more to read, and a window of the suspects, if any.
        """
        linger = self.limits.linger_seconds
        block_ms = min(BLOCK_MS, max(1, round(1000 * linger)))
        last_read_at, size = time.monotonic(), FIRST_WINDOW_TWEETS
        while True:
            steps.collect()
            if steps.failed:
                return True, None
            if self.stopping.is_set() or not self.may_read():
                return False, None
            if (model := self.champion.current()) is None:
                return False, None
            began = time.perf_counter()
            most = min(self.limits.window_tweets, *(part.choice.window_tweets for part in model.parts))
            records = self.read(min(size, most), block_ms)
            size = self.next_size(records, size, most)
            if records:
                self.hold(records)
                failpoint.passing("read")
                if healthy := [record for record in records if not record.suspect]:
                    window = Window(healthy, model)
                    window.set_time("read", began)
                    steps.start(window)
                if suspects := [record for record in records if record.suspect]:
                    return True, Window(suspects, model)
                last_read_at = time.monotonic()
            elif time.monotonic() - last_read_at >= linger and steps.idle:
                return False, None

    # --- the steps, in order

    def read(self, count: int, block_ms: int) -> list[Record]:
        """Return records that another worker stopped renewing, if there are any; else read new ones."""
        now = time.monotonic()
        if now - self._claimed_at >= self.limits.min_idle_seconds / 3:
            # Never a large window: if one of the records ends the worker, all of them are scored alone.
            records = self.stream.claim_idle(
                round(1000 * self.limits.min_idle_seconds), min(count, USUAL_WINDOW_TWEETS)
            )
            if records:
                log.info("claimed %d records of a worker that stopped renewing them", len(records))
                return records
            self._claimed_at = now
            # Remove idle consumers that hold no records; a live one registers again on its next read.
            self.stream.sweep(round(CONSUMER_IDLE_FACTOR * 1000 * self.limits.min_idle_seconds))
        return self.read_new(count, block_ms)

    def read_new(self, count: int, block_ms: int) -> list[Record]:
        """Read up to `count` new records, in parts of the usual size and none after `WINDOW_BYTES`."""
        records: list[Record] = []
        while True:
            part = self.stream.read(min(count - len(records), USUAL_WINDOW_TWEETS), None if records else block_ms)
            records += part
            if len(part) < USUAL_WINDOW_TWEETS or len(records) >= count or _payload_bytes(records) >= WINDOW_BYTES:
                return records

    def next_size(self, records: list[Record], size: int, most: int) -> int:
        """How many records to read after a window: twice as many, within the limits."""
        if not records:
            return FIRST_WINDOW_TWEETS
        tweets_per_second = 1000 * self._recent_tweets / max(0.001, self._recent_ms)
        large = min((self.stream.unread or 0) // BACKLOG_PARTS, int(LARGE_WINDOW_SECONDS * tweets_per_second))
        within_bytes = max(1, WINDOW_BYTES * len(records) // max(1, _payload_bytes(records)))
        return min(2 * size, most, max(USUAL_WINDOW_TWEETS, large), within_bytes)

    @log_context
    def tokenise(self, window: Window) -> None:
        add_tweets(window)
        began = time.perf_counter()
        window.rows = window.model.tokenise(window.texts)
        window.set_time("tokenise", began)
        failpoint.passing("tokenised", window.texts)

    @log_context
    def forward(self, window: Window) -> None:
        began = time.perf_counter()
        failpoint.passing("forwarding", window.texts)
        window.scores = window.model.forward(window.rows)
        # Two windows share the device: each counts from the end of the one before, so that the times add up.
        with self._device_times:
            window.set_time("forward", max(began, self._device_left_at))
            self._device_left_at = time.perf_counter()
            self._recent_tweets = self._recent_tweets / 2 + len(window.tweets)
            self._recent_ms = self._recent_ms / 2 + window.ms["forward_ms"]
        failpoint.passing("forwarded", window.texts)

    @log_context
    def store(self, window: Window) -> int:
        """Commit, then acknowledge. Returns the number of tweets scored."""
        self.commit(window)
        self.alive_at = time.monotonic()
        failpoint.passing("committed", window.texts)
        # Ack after commit: a crash between the two replays, and the key absorbs it.
        self.stream.ack(window.ids)
        self.held.release(window.ids)
        failpoint.passing("acked", window.texts)
        self.stream.trim()
        failpoint.passing("trimmed", window.texts)
        self._throughput.add(window)
        metrics.count(window)
        if not window.alone:  # what failed the champion, or its worker, may do so to the challenger
            self.after_commit(window)
        return len(window.tweets)

    def commit(self, window: Window) -> None:
        """Write a window in one transaction. While the database is unavailable, keep the window and retry."""
        assert window.scores is not None  # noqa: S101 - the steps run in order
        pause = 0.1
        # Made before the transaction begins: SQLite lets one worker at a time write.
        tweets, scored = tweet_columns(window), stored_predictions(window, window.scores)
        while True:
            began = time.perf_counter()
            try:
                with self.database.begin() as session:
                    predictions.add_scored(session, tweets, scored)
                    predictions.bury(session, window.dead)
                    # The row of the window is part of the transaction, so `store_ms` ends before the commit.
                    window.set_time("store", began)
                    predictions.add_window(session, window_row(window, window.scores, self.stream.consumer))
                    failpoint.passing("stored", window.texts)
                return
            except (OperationalError, InterfaceError, InternalError) as error:
                self.alive_at = time.monotonic()  # waiting for the database is not a hang
                if self.stopping.wait(pause):
                    raise
                log.warning("the database does not answer, trying again in %.1f s: %s", pause, error.orig)
                pause = min(MAX_BACKOFF_SECONDS, 2 * pause)

    # --- windows that failed, and records that may have killed a worker

    def isolate(self, window: Window, error: BaseException) -> int:
        """Score a failed window in halves until the records that fail are found, and these alone. Raises when device,
        database or stream failed instead."""
        self.raise_unless_record_failed(window, error)
        records, model = window.records, window.model
        if len(records) <= SCORED_ALONE_AT_ONCE:
            return self.score_each_alone(window, _failed_alone(error))
        middle = len(records) // 2
        return sum(self.score_part(Window(part, model, alone=True)) for part in (records[:middle], records[middle:]))

    def score_part(self, part: Window) -> int:
        if self.stopping.is_set():
            return 0
        try:
            return self.score_at_once(part)
        except Exception as error:
            return self.isolate(part, error)

    def score_at_once(self, window: Window) -> int:
        """Run a window through all steps, without those of others between."""
        self.tokenise(window)
        self.forward(window)
        return self.store(window)

    def score_each_alone(self, window: Window, reason: str) -> int:
        return sum(self.score_alone(record, window.model, reason) for record in window.records)

    def score_alone(self, record: Record, model: Model, reason: str) -> int:
        """Run one record through all steps. After three failed attempts it becomes a dead letter with the reason.

        An attempt is counted before it starts, so that a record that kills the process is buried at the fourth.
        """
        while not self.stopping.is_set():
            window = Window([record], model, alone=True)
            if self.stream.count_isolated(record.id) > MAX_ISOLATED_ATTEMPTS:
                window.dead.append(dead_letter(record, f"{reason} {MAX_ISOLATED_ATTEMPTS} times"))
            failpoint.passing("counted")
            try:
                return self.score_at_once(window)
            except Exception as error:
                try:
                    self.raise_unless_record_failed(window, error)
                except Exception:
                    self.stream.count_isolated(record.id, -1)  # not the record's fault
                    raise
                reason = _failed_alone(error)
        return 0

    @log_context
    def raise_unless_record_failed(self, window: Window, error: BaseException) -> None:
        """Return when one of the window's records caused the error. Raise it when the database, the stream or the
        device did, so that no record is buried for it."""
        # The database rejects single values with DataError; its other errors do not depend on the record.
        database_failed = isinstance(error, SQLAlchemyError) and not isinstance(error, DataError)
        if database_failed or isinstance(error, StreamError | SchemaMismatch):
            raise error
        if not window.tweets or not isinstance(error, Exception):
            raise error  # nothing was scored, or the process is being stopped
        for part in window.model.parts:
            part.score([PROBE])
        log.warning(
            "a window of %d records failed (%s); looking for the cause", len(window.records), type(error).__name__
        )

    # --- the records held

    @property
    def holds(self) -> bool:
        return bool(self.held)

    def hold(self, records: list[Record]) -> None:
        if not self.held:
            self.alive_at = time.monotonic()
        self.held.add([record.id for record in records])


def _failed_alone(error: BaseException) -> str:
    return f"scoring it alone failed ({type(error).__name__})"


def _payload_bytes(records: list[Record]) -> int:
    return sum(len(record.payload or b"") for record in records)
