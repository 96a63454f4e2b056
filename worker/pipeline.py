"""The route of a tweet: stream -> window -> tokenise -> forward -> store -> ack. It has no other way.

A window is read, scored and committed as one; only then is it acknowledged. A crash at any point leaves its records
pending, somebody else claims them, and the rows that are there already absorb the replay.

The stages overlap: while one window is on the device, the next is tokenised and the last is stored, each stage in a
thread of its own that takes windows in their order. What fails, and what is suspected of ending workers, goes the same
way again alone, with nothing else under way.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from sqlalchemy.exc import DataError, InterfaceError, InternalError, OperationalError, SQLAlchemyError

from db import predictions
from db.errors import SchemaMismatch
from db.session import Database
from training import failpoint
from worker import metrics
from worker.errors import StreamError
from worker.scorer import PROBE, Champion, Model
from worker.stream import MAX_ISOLATED_ATTEMPTS, Record, Stream
from worker.window import Tally, Window, dead_letter, named, parse, prediction_rows, tweet_rows, window_row

log = logging.getLogger(__name__)

Result = TypeVar("Result")

BLOCK_MS = 1_000  # an idle reader looks up this often to see whether it should stop
LONGEST_BACKOFF_SECONDS = 5.0
# One is stored, one leaves the device and one comes to it, one is ready. More would only be held longer.
WINDOWS_UNDER_WAY = 4
# A window of unusually large records is followed by a smaller one, so that what is held at once stays bounded.
WINDOW_BYTES = 8 * 1024 * 1024
# A consumer that holds nothing is forgotten after so many times `min_idle_seconds`.
SWEEP_IDLES = 10
# After a pause the first window is this small, and each next twice as large: the device starts while others are read.
FIRST_WINDOW_TWEETS = 64


@dataclass(frozen=True)
class Limits:
    window_tweets: int
    min_idle_seconds: float
    linger_seconds: float


class Pipeline:
    """One scoring worker's route and what it needs on the way."""

    def __init__(
        self, stream: Stream, database: Database, champion: Champion, limits: Limits, stopping: threading.Event,
        may_read: Callable[[], bool] = lambda: True,
    ) -> None:  # fmt: skip
        self.stream = stream
        self.database = database
        self.champion = champion
        self.limits = limits
        self.stopping = stopping
        self.may_read = may_read
        self.tally = Tally()
        # The last sign of life: records came where none were held, a window was committed, or waits for the database.
        self.alive_at = time.monotonic()
        self._held: dict[str, None] = {}
        self._claimed_at = -float("inf")
        self._on_device = threading.Lock()
        self._device_left_at = 0.0

    def drain(self) -> int:
        """Score until the stream has been empty for `linger_seconds`. Returns how many tweets were scored.

        Takes what is there at once and never waits for a fuller window; windows grow by themselves while the device is
        busy. Without a champion, or with a schema that does not fit, nothing is read. Raises what keeps it from going
        on, with its records still pending.
        """
        scored = 0
        self.stream.ensure_group()
        try:
            with self.holding():
                more = True
                while more:
                    flow = Flow(self)
                    more = flow.run()
                    scored += flow.scored
                    for window, error in flow.failed:
                        scored += self.isolate(window, error)
                    for record in flow.suspects:
                        scored += self.alone(record, flow.model, "scoring it alone ended the worker")
        finally:
            self.tally.say()
            self._held.clear()
        return scored

    # --- the stages, in their order

    @named
    def tokenise(self, window: Window) -> None:
        parse(window)
        began = time.perf_counter()
        window.rows = window.model.tokenise(window.texts)
        window.took("tokenise", began)
        failpoint.passing("tokenised", window.texts)

    @named
    def forward(self, window: Window) -> None:
        began = time.perf_counter()
        failpoint.passing("forwarding", window.texts)
        window.scores = window.model.forward(window.rows)
        # Two windows meet on the device; each counts from when the one before has left, so that the times add up.
        with self._on_device:
            window.took("forward", max(began, self._device_left_at))
            self._device_left_at = time.perf_counter()
        failpoint.passing("forwarded", window.texts)

    @named
    def store(self, window: Window) -> int:
        """Commit, then acknowledge. Returns how many tweets were scored."""
        self.commit(window)
        self.alive_at = time.monotonic()
        failpoint.passing("committed", window.texts)
        # Ack after commit: a crash between the two replays, and the key absorbs it.
        self.stream.ack(window.ids)
        self.release(window)
        failpoint.passing("acked", window.texts)
        self.stream.trim()
        failpoint.passing("trimmed", window.texts)
        self.tally.add(window)
        metrics.count(window)
        return len(window.tweets)

    def route(self, window: Window) -> int:
        """One window through all stages with nothing beside it. Returns how many tweets were scored."""
        try:
            self.tokenise(window)
            self.forward(window)
            return self.store(window)
        except Exception as error:
            return self.isolate(window, error)

    # --- what they need

    def read(self, most: int, block_ms: int) -> list[Record]:
        """Records somebody dropped come before new ones."""
        now = time.monotonic()
        if now - self._claimed_at >= self.limits.min_idle_seconds / 3:
            found = self.stream.claim_idle(round(1000 * self.limits.min_idle_seconds), most)
            if found:
                log.info("claimed %d records whose worker fell silent", len(found))
                return found
            self._claimed_at = now
            # Whoever is this silent and holds nothing was killed long ago, or only sleeps and comes back by itself.
            self.stream.sweep(round(SWEEP_IDLES * 1000 * self.limits.min_idle_seconds))
        return self.stream.read(most, block_ms)

    def commit(self, window: Window) -> None:
        """Everything of a window in one transaction; while the database is away, wait with the window in hand."""
        assert window.scores is not None  # noqa: S101 - the stages run in order
        pause = 0.1
        while True:
            began = time.perf_counter()
            try:
                with self.database.begin() as session:
                    predictions.add_tweets(session, tweet_rows(window))
                    predictions.add_predictions(session, prediction_rows(window, window.scores))
                    predictions.bury(session, window.dead)
                    # The window's own row goes with it, so `store_ms` ends before the commit.
                    window.took("store", began)
                    predictions.add_window(session, window_row(window, window.scores, self.stream.consumer))
                    failpoint.passing("stored", window.texts)
                return
            except (OperationalError, InterfaceError, InternalError) as error:
                self.alive_at = time.monotonic()  # not hanging: what it waits for is said
                if self.stopping.wait(pause):
                    raise
                log.warning("the database does not answer, trying again in %.1f s: %s", pause, error.orig)
                pause = min(LONGEST_BACKOFF_SECONDS, 2 * pause)

    def alone(self, record: Record, model: Model, why: str) -> int:
        """A window of one, counted before it is tried: a record that ends the process is buried the fourth time."""
        if self.stopping.is_set():
            return 0
        window = Window([record], model, counted=True)
        attempt = self.stream.count_isolated(record.id)
        if attempt > MAX_ISOLATED_ATTEMPTS:
            window.dead.append(dead_letter(record, f"{why} {MAX_ISOLATED_ATTEMPTS} times"))
        failpoint.passing("counted")
        return self.route(window)

    @named
    def isolate(self, window: Window, error: BaseException) -> int:
        """A window failed in this process. If the device is well, one of its records is to blame: score each alone.

        Raises what the device raises when it is the device: then nobody is buried for it.
        """
        try:
            # A value the database refuses is its record's fault; anything else it says, or the stream, is nobody's.
            if isinstance(error, StreamError | SchemaMismatch) or (
                isinstance(error, SQLAlchemyError) and not isinstance(error, DataError)
            ):
                raise error
            if not window.tweets or not isinstance(error, Exception):
                raise error  # nothing was scored, so no record is to blame
            window.model.score([PROBE])
        except Exception:
            if window.counted:
                self.stream.count_isolated(window.records[0].id, -1)
            raise
        log.warning("a window of %d records failed (%s); scoring each alone", len(window.records), type(error).__name__)
        why = f"scoring it alone failed ({type(error).__name__})"
        return sum(self.alone(record, window.model, why) for record in window.records)

    # --- holding records

    @property
    def holds(self) -> bool:
        return bool(self._held)

    def hold(self, records: list[Record]) -> None:
        if not self._held:
            self.alive_at = time.monotonic()
        self._held.update(dict.fromkeys(record.id for record in records))

    def release(self, window: Window) -> None:
        for id_ in window.ids:
            self._held.pop(id_, None)

    @contextmanager
    def holding(self) -> Iterator[None]:
        """Renew what is under way from a thread of its own, for as long as it takes."""
        done = threading.Event()

        def renew() -> None:
            while not done.wait(self.limits.min_idle_seconds / 3):
                try:
                    self.stream.renew(list(self._held))
                except StreamError as error:
                    log.warning("records could not be renewed, trying again: %s", error)

        thread = threading.Thread(target=renew, name="renew", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()


class Flow:
    """Windows one behind the other through the stages, until there is no more to read or one of them needs care."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline
        self.scored = 0
        self.failed: list[tuple[Window, BaseException]] = []
        self.suspects: list[Record] = []
        self._under_way: deque[tuple[Window, Future[int]]] = deque()

    def run(self) -> bool:
        """Returns whether there may be more to read. All that was begun has ended by then."""
        with ExitStack() as threads:
            # A pool of one thread is a queue with one reader. The device has two, so that the last batches of a window
            # and the first of the next keep it busy together; storing takes the windows in the order they came.
            self._stages = [
                threads.enter_context(ThreadPoolExecutor(n, name))
                for name, n in (("tokenise", 1), ("forward", 2), ("store", 1))
            ]
            try:
                return self._read_on()
            finally:
                while self._under_way:
                    self._reap()

    def _read_on(self) -> bool:
        limits, stopping = self.pipeline.limits, self.pipeline.stopping
        block_ms = min(BLOCK_MS, max(1, round(1000 * limits.linger_seconds)))
        news_at, most = time.monotonic(), FIRST_WINDOW_TWEETS
        while True:
            while self._under_way and (len(self._under_way) >= WINDOWS_UNDER_WAY or self._under_way[0][1].done()):
                self._reap()
            if self.failed:
                return True
            if stopping.is_set() or not self.pipeline.may_read():
                return False
            if (model := self.pipeline.champion.current()) is None:
                return False
            self.model = model
            began = time.perf_counter()
            records = self.pipeline.read(min(most, limits.window_tweets), block_ms)
            most = _next_window(records, most, limits.window_tweets)
            if records:
                self.pipeline.hold(records)
                failpoint.passing("read")
                self.suspects = [record for record in records if record.suspect]
                self._send([record for record in records if not record.suspect], began)
                if self.suspects:
                    return True
                news_at = time.monotonic()
            elif time.monotonic() - news_at >= limits.linger_seconds and not self._under_way:
                return False

    def _send(self, records: list[Record], began: float) -> None:
        """Into the stages. Each takes the window when the one before is done with it, or passes on its error."""
        if not records:
            return
        window = Window(records, self.model)
        window.took("read", began)
        tokenise, forward, store = self._stages
        tokenised = tokenise.submit(self.pipeline.tokenise, window)
        forwarded = forward.submit(_after, tokenised, self.pipeline.forward, window)
        self._under_way.append((window, store.submit(_after, forwarded, self.pipeline.store, window)))

    def _reap(self) -> None:
        window, future = self._under_way.popleft()
        error = future.exception()
        if error is None:
            self.scored += future.result()
        else:
            self.failed.append((window, error))


def _next_window(records: list[Record], most: int, window_tweets: int) -> int:
    """How many records to ask for after a window: twice as many, if so many of this size are not too much to hold."""
    if not records:
        return FIRST_WINDOW_TWEETS
    size = sum(len(record.payload or b"") for record in records)
    return min(2 * most, window_tweets, max(1, WINDOW_BYTES * len(records) // max(1, size)))


def _after(before: Future[Any], step: Callable[[Window], Result], window: Window) -> Result:
    """The step once the one before is done; raises what that one raised."""
    before.result()
    return step(window)
