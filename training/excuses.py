"""Starts that ended in order while the database was away: a file each, until the row can be told that none was a death.

JOBS_FOLDER/JOB/stopped-TOKEN holds when the job was first started, by which `jobs.excuse` knows it again.
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


def give_back(
    session: Session,
    job_id: int,
    token: int,
    started_at: datetime | None,
    says: str | None = None,
    pause_seconds: float | None = None,
    excuse: bool = True,
) -> bool:
    """Release a job; where another worker has it by now only take the start off the count, if it is to be excused.

    Returns whether it was released. A start may be excused once.
    """
    try:
        jobs.release(session, job_id, token, says, pause_seconds)
        return True
    except LeaseLost:
        if excuse:
            jobs.excuse(session, job_id, token, started_at)
        return False


def leave(folder: Path, job: TrainingJob) -> Path:
    """Write down that this start of a job ends in order. Where it cannot be, the start counts unless it is settled."""
    place = folder / str(job.id) / f"{PREFIX}{job.fencing_token}"
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(job.started_at.isoformat() if job.started_at else "", encoding="utf-8")
    except OSError as error:
        log.warning("%s could not be written: %s", place, error)
    return place


def settle(database: Database, place: Path) -> bool:
    """Give the job back that a file speaks of, and remove it; returns whether it was released.

    The file goes first: a process that is killed before the commit leaves a start that counts, never one that is taken
    off twice. Raises an error that `is_away` knows, mostly with the file as it was, and OSError.
    """
    job_id, token = int(place.parent.name), int(place.name.removeprefix(PREFIX))
    with database.begin() as session:
        said = place.read_text(encoding="utf-8") if place.is_file() else ""
        released = give_back(session, job_id, token, datetime.fromisoformat(said) if said else None)
        if said:
            place.unlink()  # another worker that was faster has counted already, and this transaction is undone
    with suppress(OSError):  # it holds checkpoints
        place.parent.rmdir()
    return released


def settle_all(database: Database, folder: Path) -> None:
    """Settle what workers that ended left here."""
    for place in sorted(folder.glob(f"[0-9]*/{PREFIX}[0-9]*")):
        try:
            settle(database, place)
        except SQLAlchemyError as error:
            if is_away(error):
                raise
            log.warning("%s cannot be settled: %s", place, error)
        except (ValueError, OSError) as error:
            log.warning("%s cannot be read and is removed: %s", place, error)
            place.unlink(missing_ok=True)
