"""Holding a job: a heartbeat in its own thread, progress under the fencing token, and the three reasons to stop."""

import logging
import threading
import time
from types import TracebackType
from typing import Self

from prometheus_client import Counter
from sqlalchemy.exc import SQLAlchemyError

from db import jobs
from db.errors import LeaseLost, SchemaMismatch
from db.session import Database
from training.errors import Cancelled, StopRequested

log = logging.getLogger(__name__)

losses = Counter("tweetscore_lease_losses", "jobs this worker held that another took over")

# Progress is written, and cancellation looked for, at most this often: often enough to watch, too seldom to cost.
PROGRESS_SECONDS = 0.5


class Lease:
    """One claimed job. The heartbeat renews every third of `lease_seconds`; `check` raises in the working thread.

    A heartbeat that fails for want of the database is tried again: the lease is lost only when somebody claimed it.
    """

    def __init__(
        self, database: Database, job_id: int, token: int, lease_seconds: float, stopping: threading.Event
    ) -> None:
        self.job_id = job_id
        self.token = token
        self._database = database
        self._lease_seconds = lease_seconds
        self._stopping = stopping
        self._cancelled = threading.Event()
        self._lost = threading.Event()
        self._done = threading.Event()
        self._wrote_at = 0.0
        self._total_steps = 0
        self._rate: float | None = None
        self._thread = threading.Thread(target=self._beat, name=f"lease-{job_id}", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()

    def check(self) -> None:
        """Raises `LeaseLost`, `Cancelled` or `StopRequested` when the work should end here."""
        if self._lost.is_set():
            raise LeaseLost(f"job {self.job_id} was taken over by another worker; this one stops")
        if self._cancelled.is_set():
            raise Cancelled
        if self._stopping.is_set():
            raise StopRequested

    def step(self, step: int, total_steps: int, loss: float | None, samples_per_second: float | None = None) -> None:
        """Note how far the run is, then `check`. Most calls only look at the clock; the last step, and another number
        of steps to come, are always noted."""
        now = time.monotonic()
        due = (step == total_steps and loss is not None) or total_steps != self._total_steps
        self._rate = samples_per_second or self._rate
        if due or now - self._wrote_at >= PROGRESS_SECONDS:
            self._wrote_at, self._total_steps = now, total_steps
            with self._database.begin() as session:
                if jobs.record_step(session, self.job_id, self.token, step, total_steps, loss, self._rate):
                    self._cancelled.set()
        self.check()

    def _beat(self) -> None:
        while not self._done.wait(self._lease_seconds / 3):
            try:
                with self._database.begin() as session:
                    if jobs.renew_lease(session, self.job_id, self.token, self._lease_seconds):
                        self._cancelled.set()
            except LeaseLost:
                self._lost.set()
                return
            except (SQLAlchemyError, SchemaMismatch) as error:
                log.warning("job %d: the heartbeat could not be written, trying again: %s", self.job_id, error)
