"""Remove unregistered artifacts: those of finished jobs that no model version refers to."""

import logging
import re
from collections import defaultdict

from sqlalchemy.exc import SQLAlchemyError

from db import jobs, registry
from db.models import FINISHED_STATES
from db.session import Database, is_away
from training.errors import StoreUnavailable
from training.jobs.database_retry import driver_message
from training.store.store import Store

log = logging.getLogger(__name__)

# Names that `register` creates in the model store, including drafts and engines.
NAME = re.compile(r"(?P<draft>\.?)(?P<name>job-(?P<job>\d+)-\d+)(\.engines)?(?(draft)(\.draft)?)")


def artifact_name(job_id: int, token: int) -> str:
    """Return the name of an artifact. It contains the fencing token, so a stale worker cannot overwrite a newer one."""
    return f"job-{job_id}-{token}"


def remove_unregistered_artifacts(database: Database, store: Store, job_id: int | None = None) -> None:
    """Remove unregistered artifacts of all finished jobs, or of one job.

    Logs a warning when the store or the database is unavailable; the next call tries again.
    """
    try:
        found: dict[int, dict[str, str]] = defaultdict(dict)
        # List before reading the jobs, so that an artifact stored in between is not considered.
        for entry in store.names("job-" if job_id is None else f"job-{job_id}-"):
            if match := NAME.fullmatch(entry):
                found[int(match["job"])][entry] = match["name"]
        for of_job, entries in found.items():
            registered = _registered(database, of_job)
            for entry, name in entries.items():
                if registered is not None and name != registered:
                    log.info("removing %s from the model store: its job has finished and it is not registered", entry)
                    store.remove_named(entry)
    except StoreUnavailable as error:
        log.warning("unregistered artifacts remain in the model store for now: %s", error)
    except SQLAlchemyError as error:
        if not is_away(error):
            raise
        log.warning("unregistered artifacts remain in the model store for now: %s", driver_message(error))


def _registered(database: Database, job_id: int) -> str | None:
    """Return the name of a finished job's artifact, "" if it has none; None for a job that may still create one."""
    with database.read() as session:
        job, version = jobs.find(session, job_id), registry.of_job(session, job_id)
    if job is None or job.state not in FINISHED_STATES:
        return None
    return version.artifact_url.rpartition("/")[2] if version else ""
