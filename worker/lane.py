"""What a worker process holds for its one lane: the route, the stop signal, and the watcher that nudges.

Celery runs tasks; this is what they run on. It is made once a process, when the worker starts.
"""

import logging
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable

from kombu.exceptions import KombuError
from sqlalchemy.exc import SQLAlchemyError

from db import jobs
from db.errors import SchemaMismatch, TweetscoreError
from training.devices import claim_device
from worker.errors import StreamError
from worker.gate import Gate
from worker.housekeeping import Chore, Housekeeper, scoring_chores, training_chores
from worker.inbox import Inbox
from worker.metrics import Looks
from worker.pipeline import Limits, Pipeline
from worker.processes import PARENT_VARIABLE
from worker.pulse import PATIENCE, STALLED_EXIT, WATCHER_DIED_EXIT, Pulse, Stall, end_after, end_at_once
from worker.redis_client import connect_briefly
from worker.runtime import open_guarded, open_stream, stream_url
from worker.scorer import Champion, serving
from worker.settings import Settings
from worker.stream import Depth, Stream

log = logging.getLogger(__name__)


class Lane:
    """One route at a time in this process. A nudge while it runs is absorbed: the route sees new work by itself."""

    kind: str

    def __init__(self, settings: Settings, nudge: Callable[[], None]) -> None:
        self.settings = settings
        self.stopping = threading.Event()
        self.ended = threading.Event()
        self.database = open_guarded(settings)
        self.gate = Gate(self.database, settings.watch_seconds)
        # Asked by the pulse and by Prometheus, which must not wait as long for a broker as the route does.
        self._gauge = Stream(connect_briefly(stream_url(settings)), settings.stream_key, settings.group)
        self.looks = Looks(self.kind, self.state, self.model_version, self._gauge, self.database, self.engine)
        self._nudge = nudge
        self._busy = threading.Lock()
        self._nudged = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="watcher", daemon=True)
        self._pulse = Pulse(settings.run, self.kind, self.state, self._ailing, lambda: self.gate.why)
        self._grace = threading.Thread(
            target=end_after, args=(self.stopping, settings.grace_seconds), name="grace", daemon=True
        )

    def claim(self) -> str:
        """The device of this process until it ends: no other worker of this kind takes the same GPU."""
        return claim_device(self.settings.device, self.settings.run / "gpus", self.kind)

    def start(self) -> None:
        self._watcher.start()
        Housekeeper(self.chores(), self.stopping, self.gate.is_open).start()
        self._pulse.start()
        self._grace.start()

    def stop(self) -> None:
        """End after the step at hand; a lane that is idle is closed here, a busy one when its work returns."""
        self.stopping.set()
        if self._busy.acquire(blocking=False):  # and never released: nothing starts any more
            self._close()

    def end(self) -> None:
        """Stop, and return when the work at hand is done: within the grace period, or this process is none any more."""
        self.stop()
        self.ended.wait()

    def run(self) -> int:
        """Work until there is nothing left. Returns how much was done; 0 when the lane was busy already.

        A nudge that comes while the work is ending is not lost: whoever works looks for one after letting go.
        """
        done = 0
        self._nudged.set()
        while self._nudged.is_set() and self._busy.acquire(blocking=False):
            try:
                self._nudged.clear()
                if self.gate.is_open():
                    done += self.work()
            except (SchemaMismatch, SQLAlchemyError):
                if self.gate.is_open(now=True):
                    raise
            finally:
                if self.stopping.is_set():
                    self._close()  # and the lane stays busy: nothing starts any more
                else:
                    self._busy.release()
        return done

    def work(self) -> int:
        raise NotImplementedError

    def close(self) -> None:
        """Called once, when the lane will not work again."""

    def _close(self) -> None:
        self._pulse.stop()
        try:
            self.close()
        finally:
            self.ended.set()

    def state(self) -> str:
        """One word on what this lane is at, for those who look at its health."""
        if self.stopping.is_set():
            return "ending"
        if self.gate.why is not None:
            return "waiting"
        return "working" if self._busy.locked() else "idle"

    def model_version(self) -> int | None:
        """Which model scores here, None where none does."""
        return None

    def engine(self) -> str | None:
        """What runs that model, None where none does."""
        return None

    def stalled(self) -> str | None:
        """Why the work at hand is taken to hang; None while it does not."""
        return None

    def _ailing(self) -> tuple[int, str] | None:
        if self.stopping.is_set():
            return None  # the grace period is what counts now
        if not self._watcher.is_alive():
            return WATCHER_DIED_EXIT, "the thread that looks for work died; its error stands above"
        why = self.stalled()
        return (STALLED_EXIT, why) if why else None

    def chores(self) -> list[Chore]:
        """What is to be cleared away now and then, beside the work."""
        return []

    def has_work(self) -> bool:
        """Look for work nobody announced, waiting for some up to `watch_seconds`."""
        raise NotImplementedError

    def _watch(self) -> None:
        try:
            self._look_for_work()
        except Exception:
            # A worker without a watcher looks well and finds nothing.
            log.exception("the watcher failed")
            end_at_once(WATCHER_DIED_EXIT, "the thread that looks for work died; its error stands above")

    def _look_for_work(self) -> None:
        """The timer of the protocols: work that was never announced, or whose nudge was lost, is announced again."""
        parent = os.environ.get(PARENT_VARIABLE)
        while not self.stopping.is_set():
            if parent and os.getppid() != int(parent):
                log.warning("the process that started this worker is gone; ending")
                os.kill(os.getpid(), signal.SIGTERM)
                return
            try:
                if not self.gate.is_open():
                    self.stopping.wait(self.settings.watch_seconds)
                    continue
                if self._busy.locked():
                    self.stopping.wait(self.settings.watch_seconds)
                elif self.has_work():
                    self._announce()
                    self.stopping.wait(self.settings.watch_seconds)
            except (TweetscoreError, SQLAlchemyError, KombuError, OSError) as error:
                log.warning("cannot look for work, trying again: %s", error)
                self.stopping.wait(self.settings.watch_seconds)

    def _announce(self) -> None:
        try:
            self._nudge()
        except Exception as error:
            # Nobody needs a nudge to work. A broker whose memory is full takes none, and working is what empties it.
            log.warning("the broker takes no nudge, working without one: %s", error)
            self.run()


class ScoringLane(Lane):
    kind = "scoring"

    def __init__(self, settings: Settings, nudge: Callable[[], None]) -> None:
        super().__init__(settings, nudge)
        self.stream = open_stream(settings, stream_url(settings))
        limits = Limits(settings.window_tweets, settings.min_idle_seconds, settings.linger_seconds)
        device = self.claim()
        self.champion = Champion(self.database, serving(settings, device))
        self.pipeline = Pipeline(self.stream, self.database, self.champion, limits, self.stopping, self.gate.is_open)
        self._stall = Stall(settings.stall_seconds)

    def work(self) -> int:
        return self.pipeline.drain()

    def state(self) -> str:
        return "loading a model" if self.champion.loading_since is not None else super().state()

    def model_version(self) -> int | None:
        return self.champion.version_id

    def engine(self) -> str | None:
        return self.champion.engine

    def stalled(self) -> str | None:
        since, longest = self.champion.loading_since, PATIENCE * self.settings.stall_seconds
        if since is not None and time.monotonic() - since > longest:
            return f"a model has been loading for more than {longest:g} s"
        return self._stall.found(self.pipeline.holds, self.pipeline.alive_at, self._depth)

    def _depth(self) -> Depth | None:
        try:
            return self._gauge.depth()
        except StreamError:
            return None  # a broker that is away lets nothing grow

    def chores(self) -> list[Chore]:
        return scoring_chores(self.database, self.settings, self.stopping)

    def has_work(self) -> bool:
        self.stream.ensure_group()
        self.stream.look_for_vanished()  # the route does, too, and may have nothing to read, or no model to read for
        # Without a champion there is nothing to be done: asking says so once, and loads one early when there is one.
        if self.champion.current() is None:
            self.stopping.wait(self.settings.watch_seconds)
            return False
        depth = self.stream.depth()
        if not depth.idle:
            return True
        if depth.length:
            self.stream.trim()  # whoever scored these was ended before it could, or another group was behind
        self.stream.wait_for_news(max(1, round(1000 * self.settings.watch_seconds)))
        return not self.stream.depth().idle

    def close(self) -> None:
        self.champion.close()
        try:
            self.stream.leave()
        except StreamError as error:
            log.warning("the consumer could not be taken off the list: %s", error)


class TrainingLane(Lane):
    kind = "training"

    def __init__(self, settings: Settings, nudge: Callable[[], None], inbox: Inbox | None = None) -> None:
        """`inbox` is where requests come in that are Celery messages."""
        super().__init__(settings, nudge)
        # Here, as a scorer has no use for what draws plots and writes TensorBoard, and starts sooner without.
        from training.job import run_next_job
        from worker.app import make_app
        from worker.requests import Requests

        self._run_next_job = run_next_job
        self.owner = f"{socket.gethostname()}-{uuid.uuid4().hex[:12]}"
        self.workshop = settings.workshop(self.claim())
        self.requests = (
            Requests(
                settings, self.database, self.gate, inbox, make_app(settings), self.owner, self._announce, self.stopping
            )
            if inbox
            else None
        )

    def start(self) -> None:
        super().start()
        if self.requests:
            self.requests.start()

    def work(self) -> int:
        done = 0
        while (
            not self.stopping.is_set()
            and self._run_next_job(self.database, self.workshop, self.owner, self.stopping) is not None
        ):
            done += 1
        return done

    def chores(self) -> list[Chore]:
        return training_chores(self.database, self.workshop, self.settings.checkpoint_days, self.stopping)

    def has_work(self) -> bool:
        with self.database.read() as session:
            if jobs.any_claimable(session):
                return True
        self.stopping.wait(self.settings.watch_seconds)
        return False
