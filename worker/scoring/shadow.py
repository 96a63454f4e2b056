"""The challenger scores a share of the tweets in the shadow of the champion: after its commit, in threads of its own.

The challenger never delays the champion. It gets tweets whose windows are committed and acknowledged, runs with a lower
CPU priority, and is the first to give way: it waits while the champion is busy, and tweets are dropped when its queue
is full, and when more records wait than a usual window holds. Its errors are counted and never reach the pipeline. A
stop drops what is queued.
"""

import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from db import predictions
from db.errors import TweetscoreError
from db.session import Database
from training import failpoint
from worker.scoring import metrics
from worker.scoring.backoff import Pause
from worker.scoring.champion import Challenger
from worker.scoring.scores import Model, prediction_rows
from worker.scoring.scoring_model import Serving
from worker.scoring.window import Window

log = logging.getLogger(__name__)

QUEUED_WINDOWS = 4
# Scored at once; before each chunk the backlog is checked again.
CHUNK_TWEETS = 16
# The challenger waits while more records than this wait for the champion or are held by it: with a whole window in
# progress the champion needs all cores, whatever the priorities. A steady trickle holds fewer.
QUIET_RECORDS = 64
QUIET_POLL_SECONDS = 0.02
# How often the alias is looked up.
CHECK_SECONDS = 1.0
# Pauses after an error: they double up to the longest.
FIRST_PAUSE_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 60.0
# Added to the niceness of the threads that compute. The threads that torch and OpenVINO start from there inherit it.
NICENESS = 10
# A chunk takes less, so that a stop waits for it.
CLOSE_SECONDS = 2.0

# (tweet id, text)
Chosen = list[tuple[str, str]]


@dataclass(frozen=True)
class Share:
    """Tweets of one window that the challenger is to score, and the model version that scored them."""

    version_id: int
    tweets: Chosen


class Shadow:
    """The challenger's thread in one scoring worker."""

    def __init__(
        self, database: Database, serving: Serving, share: float, backlog: Callable[[], int], most_waiting: int,
        stopping: threading.Event,
    ) -> None:  # fmt: skip
        """`share` is that of the tweets, 0 to 1. `backlog` returns how many records wait for the champion or are held
        by it; with more than `most_waiting` of them tweets are dropped."""
        self._database = database
        self._share = share
        self._backlog = backlog
        self._most_waiting = most_waiting
        self._stopping = stopping
        # Loads the model, so that threads of an engine inherit its priority, and runs it. Python code that takes locks
        # of the interpreter or the database for long runs in `_thread`, whose priority is normal: a thread of low
        # priority that holds one of these would delay the champion.
        self._computing = ThreadPoolExecutor(1, "challenger", initializer=_lower_priority)
        self.challenger = Challenger(database, serving, self._computing)
        self._queue: queue.Queue[Share | None] = queue.Queue(QUEUED_WINDOWS)
        self._model: Model | None = None
        self._checked_at = -float("inf")
        self._absent = False
        self._pause = Pause()  # after a version that failed
        self._failing = False
        self._thread = threading.Thread(target=self._run, name="shadow", daemon=True)

    def start(self) -> None:
        if self._share > 0:
            self._thread.start()

    def offer(self, window: Window) -> None:
        """Queue the challenger's share of a committed window. Never blocks and never raises."""
        if not self._thread.is_alive() or (self._absent and not self._check_due()):
            return
        chosen = [(tweet.id, tweet.text) for _, tweet in window.tweets if in_share(tweet.id, self._share)]
        if not chosen:
            return
        try:
            self._queue.put_nowait(Share(window.model.version_id, chosen))
        except queue.Full:
            metrics.shadow_dropped.labels("busy").inc(len(chosen))

    def close(self) -> None:
        """End the thread after its current chunk; call it once `stopping` is set. What is queued is dropped."""
        with suppress(queue.Full):
            self._queue.put_nowait(None)  # wakes the thread; with a full queue it is awake
        if self._thread.is_alive():
            self._thread.join(CLOSE_SECONDS)

    def _run(self) -> None:
        while not self._stopping.is_set():
            shares = [self._queue.get()]
            with suppress(queue.Empty):
                while True:
                    shares.append(self._queue.get_nowait())
            waiting = [share for share in shares if share is not None]
            if not waiting or self._stopping.is_set():
                continue
            try:
                self._score(waiting)
            except Exception as error:
                self._fail(error, sum(len(share.tweets) for share in waiting))

    def _score(self, shares: Sequence[Share]) -> None:
        model = self._current()
        if model is None:
            if not self._absent:  # an assigned model that cannot be loaded; `challenger` has logged it
                metrics.shadow_dropped.labels("failed").inc(sum(len(share.tweets) for share in shares))
            return
        # Windows of a model that has become the challenger have its rows already.
        tweets = [tweet for share in shares if share.version_id != model.version_id for tweet in share.tweets]
        if not self._pause.over(model.version_id):
            metrics.shadow_dropped.labels("failed").inc(len(tweets))
            return
        failpoint.passing("shadowing")
        rows: list[dict[str, Any]] = []
        for start in range(0, len(tweets), CHUNK_TWEETS):
            quiet = self._wait_until_quiet()
            if self._stopping.is_set():
                return
            if not quiet:
                metrics.shadow_dropped.labels("busy").inc(len(tweets) - start)
                break
            rows += self._rows(model, tweets[start : start + CHUNK_TWEETS])
        failpoint.passing("shadowed")
        if rows:
            self._store(rows)
        if self._failing:
            log.info("the challenger, model %d, scores again", model.version_id)
            self._failing = False

    def _current(self) -> Model | None:
        """The challenger's model; None when there is none or it cannot be loaded."""
        if self._check_due():
            self._model = None  # so that a model that is replaced is not kept in memory
            self._model = self.challenger.current()
            self._absent = self._model is None and not self.challenger.assigned
            self._checked_at = time.monotonic()
        return self._model

    def _wait_until_quiet(self) -> bool:
        """Wait while the champion is busy. Returns False when the tweets are to be dropped: more than
        `most_waiting` records wait, or the worker stops."""
        while not self._stopping.is_set():
            backlog = self._backlog()
            if backlog > self._most_waiting:
                return False
            if backlog <= QUIET_RECORDS:
                return True
            self._stopping.wait(QUIET_POLL_SECONDS)
        return False

    def _check_due(self) -> bool:
        return time.monotonic() - self._checked_at >= CHECK_SECONDS

    def _rows(self, model: Model, tweets: Chosen) -> list[dict[str, Any]]:
        tokens = model.tokenise([text for _, text in tweets])
        scores = self._computing.submit(model.forward, tokens).result()
        return prediction_rows(model, [id_ for id_, _ in tweets], scores)

    def _store(self, rows: list[dict[str, Any]]) -> None:
        with self._database.begin() as session:
            # Tweets may have been deleted since they were committed.
            present = predictions.present(session, [row["tweet_id"] for row in rows])
            kept = [row for row in rows if row["tweet_id"] in present]
            predictions.add_predictions(session, kept)
        metrics.shadow_tweets.inc(len(kept))

    def _fail(self, error: Exception, tweets: int) -> None:
        """Count the tweets, and log the first of consecutive errors."""
        metrics.shadow_dropped.labels("failed").inc(tweets)
        version_id = self._model.version_id if self._model else None
        self._pause.begin(version_id, FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS)
        if not self._failing:
            reason = f": {error}" if isinstance(error, TweetscoreError) else ""
            log.error(
                "the challenger, model %s, fails (%s%s); its share of the tweets is dropped until it scores again",
                version_id or "unknown", type(error).__name__, reason,
            )  # fmt: skip
        self._failing = True


def in_share(tweet_id: str, share: float) -> bool:
    """Whether a tweet belongs to a share of all: the same for every worker, and whenever it is asked.

    A larger share contains every smaller one.
    """
    return int.from_bytes(blake2b(tweet_id.encode(errors="replace"), digest_size=8).digest()) < share * 2**64


def _lower_priority() -> None:
    """Lower the CPU priority of this thread, where the system has one for threads."""
    with suppress(OSError, AttributeError):
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, min(19, os.getpriority(os.PRIO_PROCESS, thread) + NICENESS))
