"""Checkpoints that no job goes on from any more: found on this machine and in the remote store, and removed."""

import logging
import shutil
import threading
from collections.abc import Iterable
from datetime import datetime, timedelta
from pathlib import Path

from db import jobs
from db.models import utc_now
from db.session import Database
from training.storage import Remote, Store

log = logging.getLogger(__name__)


def remove_leftovers(
    database: Database, folder: Path, store: Store | None, days: float, stopping: threading.Event
) -> None:
    """Remove the checkpoints of jobs that succeeded, were cancelled, or failed more than `days` days ago.

    Those of a job that the database does not know are left alone. Raises `StoreAway`.
    """
    failed_before = utc_now() - timedelta(days=days)
    for job_id in _ended(database, (path.name for path in folder.glob("[0-9]*")), failed_before, stopping):
        _remove_here(database, folder, job_id, failed_before)
    for half in folder.glob(".*.gone"):
        shutil.rmtree(half, ignore_errors=True)
    if store is not None:
        for job_id in _ended(database, store.names(""), failed_before, stopping):
            _remove_there(database, store, job_id, failed_before)


def _ended(
    database: Database, names: Iterable[str], failed_before: datetime, stopping: threading.Event
) -> Iterable[int]:
    known = [int(name) for name in names if name.isdecimal()]
    with database.read() as session:
        found = sorted(jobs.past_resuming(session, known, failed_before))
    return (job_id for job_id in found if not stopping.is_set())


def _remove_here(database: Database, folder: Path, job_id: int, failed_before: datetime) -> None:
    place, gone = folder / str(job_id), folder / f".{job_id}.gone"
    # The row is held: a job that failed may be tried again this very moment, and then its checkpoints are needed.
    with database.begin() as session:
        if jobs.past_resuming(session, [job_id], failed_before, hold=True) and place.exists():
            shutil.rmtree(gone, ignore_errors=True)
            place.rename(gone)
            log.info("job %d: its checkpoints are removed, nothing goes on from them any more", job_id)


def _remove_there(database: Database, store: Store, job_id: int, failed_before: datetime) -> None:
    """No row is held while a network is waited for: what a job that is tried again adds meanwhile is not named here."""
    remote = Remote(store.url_of(str(job_id)))
    names = remote.names(whole=False)
    with database.read() as session:
        if not jobs.past_resuming(session, [job_id], failed_before):
            return
    for name in names:
        remote.remove(name)
    log.info("job %d: its checkpoints are removed from %s", job_id, store)
