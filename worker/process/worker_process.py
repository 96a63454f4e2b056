"""Worker lifecycle: run one pipeline at a time, poll for missed work, shut down cleanly.

The Celery tasks call `WorkerProcess.run`. One object per kind of work is created when the Celery worker starts.
"""

import logging
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable
from math import ceil

from kombu.exceptions import KombuError
from sqlalchemy.exc import SQLAlchemyError

from db import jobs
from db.errors import SchemaMismatch, TweetscoreError
from training.model.devices import answers, bound_memory, claim_device, gpus, pick_device
from worker.connections import open_guarded, open_stream, stream_url, training_context
from worker.errors import StreamError
from worker.exit_codes import DEVICE_LOST_EXIT, POLLER_DIED_EXIT, STALLED_EXIT
from worker.intake.request_queue import RequestQueue
from worker.maintenance.maintenance_thread import (
    MaintenanceTask,
    MaintenanceThread,
    scoring_maintenance,
    training_maintenance,
)
from worker.maintenance.webhook import receiver_from
from worker.maintenance.webhook_events import WebhookWatch
from worker.process.heartbeat import Heartbeat
from worker.process.metrics_endpoint import WorkerCollector
from worker.process.schema_gate import DatabaseGate
from worker.process.supervisor import PARENT_VARIABLE
from worker.process.watchdog import SLOW_STALL_FACTOR, StallDetector, end_after, end_at_once
from worker.scoring.champion import Champion
from worker.scoring.overlap import UNSCORED_ON_CPU, WINDOWS_IN_FLIGHT
from worker.scoring.pipeline import Limits, Pipeline
from worker.scoring.scoring_model import serving_from
from worker.scoring.shadow import Shadow
from worker.scoring.window import USUAL_WINDOW_TWEETS
from worker.settings import Settings
from worker.stream.stream import Depth

log = logging.getLogger(__name__)

# Interval at which a worker without a champion looks for one: somebody waits for the first rows after a promotion.
NO_CHAMPION_SECONDS = 0.2


class WorkerProcess:
    """Runs one pipeline at a time in this process.

    A nudge during a run is merged into it: the run finds new work itself.
    """

    kind: str

    def __init__(self, settings: Settings, nudge: Callable[[], None]) -> None:
        self.settings = settings
        self.stopping = threading.Event()
        self.finished = threading.Event()
        self.database = open_guarded(settings)
        self.gate = DatabaseGate(self.database, settings.watch_seconds)
        # For heartbeat and metrics, which need a shorter timeout than the pipeline.
        self._status_stream = open_stream(settings, stream_url(settings), brief=True)
        self.collector = WorkerCollector(
            self.kind, self.state, self.model_version, self._status_stream, self.database, self.engine
        )
        self._nudge = nudge
        self._busy = threading.Lock()
        self._nudged = threading.Event()
        self._poller = threading.Thread(target=self._poll, name="poller", daemon=True)
        self._heartbeat = Heartbeat(settings.run, self.kind, self.state, self._find_failure, lambda: self.gate.reason)
        self._grace_timer = threading.Thread(
            target=end_after, args=(self.stopping, settings.grace_seconds), name="grace", daemon=True
        )

    def claim(self) -> str:
        """Claim a device until this process ends, and limit its memory, so that workers of a kind share GPUs fairly."""
        workers = self.workers_a_gpu()
        device = claim_device(self.settings.device, self.settings.run / "gpus", self.kind, workers)
        share = self.settings.gpu_memory_share or 1 / workers
        if share < 1:
            bound_memory(pick_device(device), share)
        return device

    def workers_a_gpu(self) -> int:
        """How many workers of this kind may share a GPU."""
        return 1

    def start(self) -> None:
        self._poller.start()
        MaintenanceThread(self.maintenance_tasks(), self.stopping, self.gate.is_open).start()
        if (receiver := receiver_from(self.settings)) is not None:
            # A thread of its own: deleting old rows may take hours.
            watch = WebhookWatch(self.database, self.settings.run, receiver, self.stopping, self.gate.is_open)
            MaintenanceThread([watch.run], self.stopping, self.gate.is_open).start()
        self._heartbeat.start()
        self._grace_timer.start()

    def stop(self) -> None:
        """Request a stop after the current step. An idle worker is closed here, a busy one when its run returns."""
        self.stopping.set()
        if self._busy.acquire(blocking=False):  # never released, so that no run can begin
            self._close()

    def stop_and_wait(self) -> None:
        """Stop, and wait for current work. After the grace period a timer ends the process."""
        self.stop()
        self.finished.wait()

    def run(self) -> int:
        """Work until there is nothing left. Returns how much was done; 0 when another thread is already working.

        A nudge that arrives while a run ends is not lost: the running thread checks for one after it releases the lock.
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
                    self._close()  # the lock is not released, so that no run can begin
                else:
                    self._busy.release()
        return done

    def work(self) -> int:
        raise NotImplementedError

    def close(self) -> None:
        """Release resources. Called once, after the last run."""

    def _close(self) -> None:
        self._heartbeat.stop()
        try:
            self.close()
        finally:
            self.finished.set()

    def state(self) -> str:
        """The state shown in heartbeat and metrics: idle, working, waiting or ending."""
        if self.stopping.is_set():
            return "ending"
        if self.gate.reason is not None:
            return "waiting"
        return "working" if self._busy.locked() else "idle"

    def model_version(self) -> int | None:
        """The id of the model version that scores in this process; None if there is none."""
        return None

    def engine(self) -> str | None:
        """The name of the engine that runs that model; None if there is none."""
        return None

    def stall_reason(self) -> str | None:
        """Why the current work counts as stalled; None while it progresses."""
        return None

    def _find_failure(self) -> tuple[int, str] | None:
        if self.stopping.is_set():
            return None  # the grace period applies now
        if not self._poller.is_alive():
            return POLLER_DIED_EXIT, "the thread that polls for work died; its error is logged above"
        reason = self.stall_reason()
        return (STALLED_EXIT, reason) if reason else None

    def maintenance_tasks(self) -> list[MaintenanceTask]:
        """Periodic cleanup that runs in another thread during the work."""
        return []

    def has_work(self) -> bool:
        """Poll for work, for up to `watch_seconds`."""
        raise NotImplementedError

    def _poll(self) -> None:
        try:
            self._poll_until_stopped()
        except Exception:
            # Without its poller a worker looks healthy but never finds work.
            log.exception("the poller failed")
            end_at_once(POLLER_DIED_EXIT, "the thread that polls for work died; its error is logged above")

    def _poll_until_stopped(self) -> None:
        """Send a nudge when there is work, so that work without a nudge, or whose nudge was lost, is done."""
        parent = os.environ.get(PARENT_VARIABLE)
        while not self.stopping.is_set():
            if parent and os.getppid() != int(parent):
                log.warning("the process that started this worker has ended; stopping")
                os.kill(os.getpid(), signal.SIGTERM)
                return
            try:
                if not self.gate.is_open():
                    self.stopping.wait(self.settings.watch_seconds)
                    continue
                if self._busy.locked():
                    self.stopping.wait(self.settings.watch_seconds)
                elif self.has_work():
                    self._nudge_or_run()
                    self.stopping.wait(self.settings.watch_seconds)
            except (TweetscoreError, SQLAlchemyError, KombuError, OSError) as error:
                log.warning("cannot poll for work, trying again: %s", error)
                self.stopping.wait(self.settings.watch_seconds)

    def _nudge_or_run(self) -> None:
        try:
            self._nudge()
        except Exception as error:
            # A broker whose memory is full refuses nudges. Scoring frees its memory, so run in this thread.
            log.warning("the broker accepts no nudge, working without one: %s", error)
            self.run()


def scorers_a_gpu(settings: Settings, found: int) -> int:
    """How many scoring workers may share each of the GPUs that were found."""
    return settings.gpu_scorers or ceil((settings.scorers or 1) / max(1, found))


class ScoringWorker(WorkerProcess):
    kind = "scoring"

    def __init__(self, settings: Settings, nudge: Callable[[], None]) -> None:
        super().__init__(settings, nudge)
        self.stream = open_stream(settings, stream_url(settings))
        device = self.claim()
        self._device = pick_device(device)
        limits = Limits(
            settings.window_tweets, settings.min_idle_seconds, settings.linger_seconds,
            UNSCORED_ON_CPU if self._device.type == "cpu" else WINDOWS_IN_FLIGHT,
        )  # fmt: skip
        serving = serving_from(settings, device)
        self.champion = Champion(self.database, serving)
        # A backlog of more than a usual window is a load under which the challenger gives way.
        most_waiting = min(settings.window_tweets, USUAL_WINDOW_TWEETS)
        self.shadow = Shadow(self.database, serving, settings.shadow_share, self._backlog, most_waiting, self.stopping)
        self.pipeline = Pipeline(
            self.stream, self.database, self.champion, limits, self.stopping, self.gate.is_open, self.shadow.offer
        )
        self._stall_detector = StallDetector(settings.stall_seconds)

    def start(self) -> None:
        super().start()
        self.shadow.start()

    def workers_a_gpu(self) -> int:
        return scorers_a_gpu(self.settings, len(gpus(self.settings.device)))

    def work(self) -> int:
        try:
            return self.pipeline.drain()
        except Exception:
            if not answers(self._device):
                log.exception("scoring failed")
                # The records it holds go to another worker, or to this one when it is started again.
                end_at_once(DEVICE_LOST_EXIT, f"{self._device} no longer computes")
            raise

    def state(self) -> str:
        return "loading a model" if self.champion.loading_since is not None else super().state()

    def model_version(self) -> int | None:
        return self.champion.version_id

    def engine(self) -> str | None:
        return self.champion.engine

    def stall_reason(self) -> str | None:
        since, longest = self.champion.loading_since, SLOW_STALL_FACTOR * self.settings.stall_seconds
        if since is not None and time.monotonic() - since > longest:
            return f"a model has been loading for more than {longest:g} s"
        return self._stall_detector.check(self.pipeline.holds, self.pipeline.alive_at, self._depth)

    def _backlog(self) -> int:
        """Records that wait for the champion, and those that it holds."""
        depth = self._depth()
        waiting = 0 if depth is None else depth.length if depth.lag is None else depth.lag
        return waiting + len(self.pipeline.held)

    def _depth(self) -> Depth | None:
        try:
            return self._status_stream.depth()
        except StreamError:
            return None

    def maintenance_tasks(self) -> list[MaintenanceTask]:
        return scoring_maintenance(self.database, self.settings, self.stopping)

    def has_work(self) -> bool:
        waiting = self.stream.has_work()
        # Nothing can be scored without a champion. `current` logs that once, and starts to load a new champion early.
        if self.champion.current() is None:
            self.stopping.wait(min(NO_CHAMPION_SECONDS, self.settings.watch_seconds))
            return False
        if not waiting:
            self.stream.wait_for_record(max(1, round(1000 * self.settings.watch_seconds)))
            waiting = self.stream.has_work()
        return waiting

    def close(self) -> None:
        self.shadow.close()
        self.champion.close()
        try:
            self.stream.leave()
        except StreamError as error:
            log.warning("the consumer could not be removed from its group: %s", error)


class TrainingWorker(WorkerProcess):
    kind = "training"

    def __init__(
        self, settings: Settings, nudge: Callable[[], None], request_queue: RequestQueue | None = None
    ) -> None:
        """`request_queue` holds Celery messages that request training; None to run only jobs in SQL."""
        super().__init__(settings, nudge)
        # Imported here: a scoring worker needs neither plots nor TensorBoard, and starts faster without them.
        from training.jobs.run import run_next_job
        from worker.app import make_app
        from worker.process.training_requests import RequestThread

        self._run_next_job = run_next_job
        self.owner = f"{socket.gethostname()}-{uuid.uuid4().hex[:12]}"
        self.context = training_context(settings, self.claim())
        self.requests = (
            RequestThread(
                settings, self.database, self.gate, request_queue, make_app(settings), self.owner, self._nudge_or_run,
                self.stopping,
            )
            if request_queue
            else None
        )  # fmt: skip

    def start(self) -> None:
        super().start()
        if self.requests:
            self.requests.start()

    def work(self) -> int:
        done = 0
        while (
            not self.stopping.is_set()
            and self._run_next_job(self.database, self.context, self.owner, self.stopping) is not None
        ):
            done += 1
        return done

    def maintenance_tasks(self) -> list[MaintenanceTask]:
        return training_maintenance(self.database, self.context, self.settings.checkpoint_days, self.stopping)

    def has_work(self) -> bool:
        with self.database.read() as session:
            if jobs.any_claimable(session):
                return True
        self.stopping.wait(self.settings.watch_seconds)
        return False
