"""Holding a job: a heartbeat in its own thread, progress under the fencing token, and the three reasons to stop."""

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
from training.patience import Value, patiently

log = logging.getLogger(__name__)

losses = Counter("tweetscore_lease_losses", "jobs this worker held that another took over")

# Progress is written, and cancellation looked for, at most this often: often enough to watch, too seldom to cost.
PROGRESS_SECONDS = 0.5
# While the database is away the heartbeat looks for it at least this often.
AWAY_SECONDS = 2.0


class Lease:
    """One claimed job. The heartbeat renews every third of `lease_seconds`; `check` raises in the working thread.

    A database that is away stops nothing: what is recorded meanwhile is written when it answers, and the lease is lost
    only when somebody claimed it. `doubted` is set while a takeover may be the outage's doing: it was away since the
    last renewal.
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
        self.doubted = threading.Event()
        self._unwritten: list[Callable[[Session], object]] = []
        self._writing = threading.Lock()
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
        if due or (now - self._wrote_at >= PROGRESS_SECONDS and not self.away.is_set()):
            self._wrote_at, self._total_steps = now, total_steps
            self.record(partial(self._note, step, total_steps, loss, self._rate))
        self.check()

    def record(self, write: Callable[[Session], object]) -> None:
        """Write something of the job in a transaction, after what was recorded before: now, or when a database that is
        away answers. It may be written twice. Raises `LeaseLost`."""
        self._unwritten.append(write)
        if self.away.is_set():
            return
        try:
            self._write_or_forget()
        except SQLAlchemyError as error:
            if not is_away(error):
                raise
            self._lost_touch("progress", error)

    def patiently(self, do: Callable[[], Value]) -> Value:
        """What `do` returns, once the database answers and has all that was recorded; see `patience.patiently`."""

        def after_the_rest() -> Value:
            if not self._lost.is_set():  # else nothing of it may be written any more
                self._write_or_forget()
            return do()

        return patiently(after_the_rest, self._stopping)

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

    def _write_or_forget(self) -> None:
        """As `_write`; what the database will never take is raised once and not tried again."""
        try:
            self._write()
        except Exception as error:
            if not is_away(error):
                self._unwritten.clear()
            raise

    def _lost_touch(self, what: str, error: Exception) -> None:
        if is_away(error):
            self.away.set()
            self.doubted.set()
        log.warning("job %d: the %s could not be written, trying again: %s", self.job_id, what, error)

    def _beat(self) -> None:
        usual = self._lease_seconds / 3
        due = time.monotonic() + usual
        while not self._done.wait(min(usual, AWAY_SECONDS)):
            if time.monotonic() < due and not self.away.is_set():
                continue
            due = time.monotonic() + usual
            try:
                with self._database.begin() as session:
                    if jobs.renew_lease(session, self.job_id, self.token, self._lease_seconds):
                        self._cancelled.set()
                self.away.clear()
                self.doubted.clear()
                self._write()
            except LeaseLost:
                self._lost.set()
                return
            except (SQLAlchemyError, SchemaMismatch) as error:
                self._lost_touch("heartbeat", error)
