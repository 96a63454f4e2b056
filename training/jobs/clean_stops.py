"""Record clean stops of a job while the database is unavailable, so that they do not count as failed attempts.

A job that is started too often without finishing fails. A start that ends cleanly is written to the marker file
JOBS_FOLDER/JOB/stopped-TOKEN and later subtracted from the job's attempts. The file contains the time of the job's
first start, by which `jobs.uncount_start` detects that the job was retried in the meantime.
"""

import logging
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from db import jobs
from db.errors import LeaseLost
from db.models import TrainingJob
from db.session import Database, is_away

log = logging.getLogger(__name__)

PREFIX = "stopped-"


def release_job(
    session: Session,
    job_id: int,
    token: int,
    started_at: datetime | None,
    message: str | None = None,
    pause_seconds: float | None = None,
    uncount_start: bool = True,
) -> bool:
    """Queue a job again without counting this start. Returns whether it was released.

    `message` is stored as the job's error; no worker claims the job for `pause_seconds`. When another worker has
    claimed the job, nothing is released, and with `uncount_start` this start is subtracted from the job's attempts. A
    start must be subtracted only once.
    """
    try:
        jobs.release(session, job_id, token, message, pause_seconds)
        return True
    except LeaseLost:
        if uncount_start:
            jobs.uncount_start(session, job_id, token, started_at)
        return False


def record_clean_stop(folder: Path, job: TrainingJob) -> Path:
    """Write the marker file of a clean stop and return its path.

    Logs a warning when the file cannot be written. The start then counts as an attempt, unless `apply_clean_stop`
    releases the job while this worker still holds its lease.
    """
    place = folder / str(job.id) / f"{PREFIX}{job.fencing_token}"
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(job.started_at.isoformat() if job.started_at else "", encoding="utf-8")
    except OSError as error:
        log.warning("%s could not be written: %s", place, error)
    return place


def apply_clean_stop(database: Database, place: Path) -> bool:
    """Release the job of a marker file and remove the file. Returns whether the job was released.

    The file is removed before the commit: if the process is killed in between, the start counts as an attempt, but it
    is never subtracted twice. Raises OSError, and SQLAlchemyError when the database is unavailable; the file then
    usually remains.
    """
    job_id, token = int(place.parent.name), int(place.name.removeprefix(PREFIX))
    with database.begin() as session:
        started_at = place.read_text(encoding="utf-8") if place.is_file() else ""
        released = release_job(session, job_id, token, datetime.fromisoformat(started_at) if started_at else None)
        if started_at:
            place.unlink()  # fails, and rolls back, when another worker has applied this marker already
    with suppress(OSError):  # the folder usually contains checkpoints
        place.parent.rmdir()
    return released


def apply_clean_stops(database: Database, folder: Path) -> None:
    """Apply all marker files in the jobs folder. Raises SQLAlchemyError when the database is unavailable."""
    for place in sorted(folder.glob(f"[0-9]*/{PREFIX}[0-9]*")):
        try:
            apply_clean_stop(database, place)
        except SQLAlchemyError as error:
            if is_away(error):
                raise
            log.warning("%s cannot be applied: %s", place, error)
        except (ValueError, OSError) as error:
            log.warning("%s is invalid, removing it: %s", place, error)
            place.unlink(missing_ok=True)
