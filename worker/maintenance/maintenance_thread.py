"""Periodic maintenance in a background thread: old tweets and windows, rollup rows, checkpoints, orphaned artifacts.

Every task deletes in chunks, can be interrupted and repeated, and is safe to run in several workers. The SQL tasks run
in one worker at a time: of all workers on PostgreSQL, of this home on SQLite.
"""

import fcntl
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import sessionmaker

from db.errors import TweetscoreError
from db.session import Database
from training.jobs.context import TrainingContext
from training.jobs.expired_checkpoints import remove_expired_checkpoints
from training.jobs.unregistered_artifacts import remove_unregistered_artifacts
from worker.maintenance.retention import (
    Begin,
    add_partitions,
    apply_retention,
    compact_sums,
    delete_old_windows,
)
from worker.settings import Settings

log = logging.getLogger(__name__)

INTERVAL_SECONDS = 3600.0
# Interval after a failure, and while another worker holds the lock: that worker may end before it is done.
RETRY_SECONDS = 60.0
# PostgreSQL's advisory locks of tasks that run in one worker at a time.
LOCK_NUMBERS = {"maintenance": 7413953, "webhook": 7413954}

# Returns False to be tried again after `RETRY_SECONDS`.
MaintenanceTask = Callable[[], bool]


class MaintenanceThread:
    """Runs each task at the start and then every hour, until `stopping` is set.

    A task that fails is logged and retried. While `allowed()` is false no task runs: the database may have a schema
    that this release cannot work with.
    """

    def __init__(
        self, tasks: list[MaintenanceTask], stopping: threading.Event, allowed: Callable[[], bool] = lambda: True
    ) -> None:
        self._due = [(task, time.monotonic()) for task in tasks]
        self._stopping = stopping
        self._allowed = allowed
        self._thread = threading.Thread(target=self._run, name="maintenance", daemon=True)

    def start(self) -> None:
        if self._due:
            self._thread.start()

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._due = [(task, self._run_task(task) if at <= time.monotonic() else at) for task, at in self._due]
            self._stopping.wait(max(0.0, min(at for _, at in self._due) - time.monotonic()))

    def _run_task(self, task: MaintenanceTask) -> float:
        """Run a task and return when it is due next."""
        try:
            done = not self._stopping.is_set() and self._allowed() and task()
        except (TweetscoreError, SQLAlchemyError, OSError) as error:
            done = False
            log.warning("maintenance failed, trying again in %g s: %s", RETRY_SECONDS, error)
        except Exception:
            done = False
            log.exception("maintenance failed, trying again in %g s", RETRY_SECONDS)
        return time.monotonic() + (INTERVAL_SECONDS if done else RETRY_SECONDS)


def scoring_maintenance(database: Database, settings: Settings, stopping: threading.Event) -> list[MaintenanceTask]:
    """Tasks of scoring workers: delete old tweets, dead letters and windows, and compact the sums."""
    days, window_days = settings.retention_days, settings.window_days

    def maintain() -> bool:
        with maintenance_lock(database, settings.run) as begin:
            if begin is None:
                return False
            if days is not None:
                apply_retention(begin, days, stopping)
            delete_old_windows(begin, window_days, stopping)
            compact_sums(begin, stopping)
            add_partitions(begin, days, stopping)
        return True

    return [maintain]


def training_maintenance(
    database: Database, context: TrainingContext, days: float, stopping: threading.Event
) -> list[MaintenanceTask]:
    """Tasks of training workers: delete checkpoints that no job needs, those of failed jobs after `days`, and artifacts
    that were never registered."""

    def clear_checkpoints() -> bool:
        remove_expired_checkpoints(database, context.jobs_folder, context.checkpoint_store, days, stopping)
        return True

    def clear_artifacts() -> bool:
        remove_unregistered_artifacts(database, context.model_store)
        return True

    return [clear_checkpoints, clear_artifacts]


@contextmanager
def maintenance_lock(database: Database, folder: Path, name: str = "maintenance") -> Iterator[Begin | None]:
    """Yield a function that begins transactions, or None while another worker holds the lock.

    `name` is one of `LOCK_NUMBERS`. The lock is released when its process ends.
    """
    if database.engine.dialect.name == "sqlite":
        with _locked(folder / f"{name}.lock") as acquired:
            yield database.begin if acquired else None
        return
    with database.engine.connect() as connection:
        acquired = connection.scalar(text(f"SELECT pg_try_advisory_lock({LOCK_NUMBERS[name]})"))
        connection.commit()
        try:
            yield sessionmaker(connection, expire_on_commit=False).begin if acquired else None
        finally:
            if acquired:
                connection.invalidate()  # closing the connection releases the lock in any state


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield True
    except BlockingIOError:
        yield False
    finally:
        os.close(descriptor)
