"""The lease of a job: a heartbeat thread, progress written under the fencing token, and checks for reasons to stop."""

import logging
import threading
import time
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Self

from prometheus_client import Counter
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from db import jobs
from db.errors import LeaseLost, SchemaMismatch
from db.session import Database, is_away
from training.errors import Cancelled, StopRequested
from training.jobs.database_retry import Value, retry_while_database_away

log = logging.getLogger(__name__)

lease_losses = Counter("tweetscore_lease_losses", "jobs of this worker that another worker took over")

# Minimum interval between writes of progress, which also read whether the job is cancelled.
PROGRESS_SECONDS = 0.5
# Maximum interval between attempts of the heartbeat while the database is unavailable.
AWAY_SECONDS = 2.0


class Lease:
    """The lease of a claimed job. The heartbeat renews it every `lease_seconds` / 3.

    Call `check` often in the training thread; it raises when the work should end. Training continues while the database
    is unavailable: writes are queued until it answers. The lease is lost only when another worker claims
    the job. `away` is set while the database is unavailable, `outage_since_renewal` when it was unavailable after the
    last renewal, so that a takeover may be due to the outage.
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
        self.away = threading.Event()
        self.outage_since_renewal = threading.Event()
        self._unwritten: list[Callable[[Session], object]] = []
        self._writing = threading.Lock()
        self._wrote_at = 0.0
        # Steps of an earlier part of the job, such as learning the sample.
        self.steps_before = 0
        self._step = self._total_steps = 0
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
        """Raise `LeaseLost`, `Cancelled` or `StopRequested` when the work should end; else return."""
        if self._lost.is_set():
            raise LeaseLost(f"job {self.job_id} was taken over by another worker; this one stops")
        if self._cancelled.is_set():
            raise Cancelled
        if self._stopping.is_set():
            raise StopRequested

    def step(self, step: int, total_steps: int, loss: float | None, samples_per_second: float | None = None) -> None:
        """Record the progress, then `check`.

        Writes at most every `PROGRESS_SECONDS`. The last step and a change of `total_steps` are always written. `loss`
        is the mean over the step's rows.
        """
        step, total_steps = step + self.steps_before, total_steps + self.steps_before
        now = time.monotonic()
        due = (step == total_steps and step != self._step) or total_steps != self._total_steps
        self._rate = samples_per_second or self._rate
        if due or (now - self._wrote_at >= PROGRESS_SECONDS and not self.away.is_set()):
            self._wrote_at, self._step, self._total_steps = now, step, total_steps
            self.record(partial(self._note, step, total_steps, loss, self._rate))
        self.check()

    def record(self, write: Callable[[Session], object]) -> None:
        """Run `write` in a transaction after all earlier writes: now, or when the database answers again.

        `write` must be idempotent, since it runs again when the answer to a commit is lost. Raises `LeaseLost`.
        """
        self._unwritten.append(write)
        if self.away.is_set():
            return
        try:
            self._write_or_discard()
        except SQLAlchemyError as error:
            if not is_away(error):
                raise
            self._note_failure("progress", error)

    def retry_while_database_away(self, do: Callable[[], Value]) -> Value:
        """Run all queued writes, then return `do()`; retry both while the database is unavailable.

        Raises `StopRequested`; see `database_retry.retry_while_database_away`.
        """

        def write_then_do() -> Value:
            if not self._lost.is_set():  # after a takeover the fencing token rejects the queued writes
                self._write_or_discard()
            return do()

        return retry_while_database_away(write_then_do, self._stopping)

    def _note(self, step: int, total_steps: int, loss: float | None, rate: float | None, session: Session) -> None:
        if jobs.record_step(session, self.job_id, self.token, step, total_steps, loss, rate):
            self._cancelled.set()

    def _write(self) -> None:
        with self._writing:
            writes = list(self._unwritten)
            if writes:
                with self._database.begin() as session:
                    for write in writes:
                        write(session)
                del self._unwritten[: len(writes)]

    def _write_or_discard(self) -> None:
        """Like `_write`, but discard the queue after an error that retrying cannot resolve."""
        try:
            self._write()
        except Exception as error:
            if not is_away(error):
                self._unwritten.clear()
            raise

    def _note_failure(self, what: str, error: Exception) -> None:
        if is_away(error):
            self.away.set()
            self.outage_since_renewal.set()
        log.warning("job %d: the %s could not be written, trying again: %s", self.job_id, what, error)

    def _beat(self) -> None:
        interval = self._lease_seconds / 3
        due = time.monotonic() + interval
        while not self._done.wait(min(interval, AWAY_SECONDS)):
            if time.monotonic() < due and not self.away.is_set():
                continue
            due = time.monotonic() + interval
            try:
                with self._database.begin() as session:
                    if jobs.renew_lease(session, self.job_id, self.token, self._lease_seconds):
                        self._cancelled.set()
                self.away.clear()
                self.outage_since_renewal.clear()
                self._write()
            except LeaseLost:
                self._lost.set()
                return
            except (SQLAlchemyError, SchemaMismatch) as error:
                self._note_failure("heartbeat", error)
