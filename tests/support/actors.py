"""Worker processes that tests may kill, forked from a server that has already imported everything.

A loop takes the place of Celery and delivers the nudges, so that a worker starts in a fraction of a second. The tests
of the real command are in `test_workers.py` and `test_storm.py`.
"""

import logging
import multiprocessing
import os
import resource
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from tests.conftest import PATIENCE_SECONDS, wait_until
from training import failpoint
from worker.app import TRAINING
from worker.connections import stream_url
from worker.intake.request_queue import RequestQueue
from worker.process.worker_process import ScoringWorker, TrainingWorker, WorkerProcess
from worker.settings import Settings, load_settings
from worker.stream.redis_client import connect

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.support.actors", "training.jobs.run"])  # which a worker loads when it is to train


def make_worker(role: str, settings: Settings, nudge: Callable[[], None]) -> WorkerProcess:
    if role == "score":
        return ScoringWorker(settings, nudge)
    # Messages for Celery go to a key that no process reads.
    return TrainingWorker(
        settings, nudge, RequestQueue(connect(stream_url(settings)), TRAINING, f"{TRAINING}:{os.getpid()}")
    )


class Actor:
    """One worker process with a role and the settings `given`; its log lies in the home's folder of logs."""

    def __init__(self, role: str, given: dict[str, Any], failpoints: str = "") -> None:
        self._process = FORKS.Process(target=_act, args=(role, {**given, "failpoints": failpoints}), daemon=True)
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid
        self.log = log_file(Path(given["home"]), role, self.pid)

    @property
    def alive(self) -> bool:
        return self._process.is_alive()

    @property
    def stopped(self) -> bool:
        return psutil.Process(self.pid).status() == psutil.STATUS_STOPPED

    def send(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()
        self._process.join()

    def ended(self) -> int:
        """The exit code, -9 for SIGKILL; fails when it does not end in time."""
        self._process.join(PATIENCE_SECONDS)
        assert self._process.exitcode is not None, f"process {self.pid} did not end within {PATIENCE_SECONDS:g} s"
        return self._process.exitcode

    def said(self) -> str:
        return self.log.read_text(encoding="utf-8") if self.log.exists() else ""


@contextmanager
def acting(role: str, given: dict[str, Any], failpoints: str = "") -> Iterator[Actor]:
    """A worker for the time of the block; it is killed afterwards."""
    actor = Actor(role, given, failpoints)
    try:
        yield actor
    finally:
        actor.kill()


def killed_at(role: str, given: dict[str, Any], failpoints: str) -> None:
    """Run a worker until its failpoint ends it."""
    with acting(role, given, failpoints) as actor:
        assert actor.ended() == -signal.SIGKILL, actor.said()


def log_file(home: Path, role: str, pid: int) -> Path:
    return home / "logs" / f"{role}-{pid}.log"


def _act(role: str, given: dict[str, Any]) -> None:
    if file_bytes := given.pop("file_bytes", None):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write past the limit fails, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    settings = load_settings(**given)
    path = log_file(settings.home, role, os.getpid())
    path.parent.mkdir(exist_ok=True)
    logging.basicConfig(filename=path, level="INFO", format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    failpoint.arm(settings.failpoints)
    nudged = threading.Event()
    worker = make_worker(role, settings, nudged.set)
    signal.signal(signal.SIGTERM, lambda *_: worker.stop())
    worker.start()
    while not worker.stopping.is_set():
        if nudged.wait(0.05):
            nudged.clear()
            try:
                worker.run()
            except Exception:  # as Celery does: log it and take the next nudge
                logging.exception("the run failed")


def wait_for_log(actor: Actor, text: str) -> None:
    wait_until(lambda: text in actor.said())
