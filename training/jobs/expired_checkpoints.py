"""Remove expired checkpoints, which no job will resume from, on this machine and in the remote store."""

import logging
import shutil
import threading
from collections.abc import Iterable
from datetime import datetime, timedelta
from pathlib import Path

from db import jobs
from db.models import utc_now
from db.session import Database
from training.store.store import RemoteStore, Store

log = logging.getLogger(__name__)


def remove_expired_checkpoints(
    database: Database, folder: Path, remote: Store | None, days: float, stopping: threading.Event
) -> None:
    """Remove the checkpoints of jobs that succeeded, were cancelled, or failed more than `days` days ago.

    Checkpoints of jobs that are not in the database are kept. Returns early when `stopping` is set. Raises
    `StoreUnavailable`.
    """
    failed_before = utc_now() - timedelta(days=days)
    for job_id in _ended(database, (path.name for path in folder.glob("[0-9]*")), failed_before, stopping):
        _remove_local(database, folder, job_id, failed_before)
    for removed in folder.glob(".*.gone"):
        shutil.rmtree(removed, ignore_errors=True)
    if remote is not None:
        for job_id in _ended(database, remote.names(""), failed_before, stopping):
            _remove_remote(database, remote, job_id, failed_before)


def _ended(
    database: Database, names: Iterable[str], failed_before: datetime, stopping: threading.Event
) -> Iterable[int]:
    """Return the job ids among folder `names` whose checkpoints have expired, until `stopping` is set."""
    numbered = [int(name) for name in names if name.isdecimal()]
    with database.read() as session:
        found = sorted(jobs.past_resuming(session, numbered, failed_before))
    return (job_id for job_id in found if not stopping.is_set())


def _remove_local(database: Database, folder: Path, job_id: int, failed_before: datetime) -> None:
    place, gone = folder / str(job_id), folder / f".{job_id}.gone"
    # Lock the row: a failed job can be retried at any moment, and then needs its checkpoints.
    with database.begin() as session:
        if jobs.past_resuming(session, [job_id], failed_before, lock_rows=True) and place.exists():
            shutil.rmtree(gone, ignore_errors=True)
            place.rename(gone)
            log.info("job %d: removed its checkpoints, which have expired", job_id)


def _remove_remote(database: Database, store: Store, job_id: int, failed_before: datetime) -> None:
    """Remove the checkpoints listed before the check, so that a retried job keeps those it adds meanwhile.

    The row is not locked, because the removal waits for the network.
    """
    remote = RemoteStore(store.url_of(str(job_id)))
    names = remote.names(whole=False)
    with database.read() as session:
        if not jobs.past_resuming(session, [job_id], failed_before):
            return
    for name in names:
        remote.remove(name)
    log.info("job %d: removed its expired checkpoints from %s", job_id, store)
