"""Artifacts that no row names and none will: what trainers left behind whose job has ended without them."""

import logging
import re
from collections import defaultdict

from sqlalchemy.exc import SQLAlchemyError

from db import jobs, registry
from db.models import FINISHED_STATES
from db.session import Database, is_away
from training.errors import StoreAway
from training.patience import cause
from training.storage import Store

log = logging.getLogger(__name__)

# As `register` names them, drafts and engines included.
NAME = re.compile(r"(?P<draft>\.?)(?P<name>job-(?P<job>\d+)-\d+)(\.engines)?(?(draft)(\.draft)?)")


def artifact_name(job_id: int, token: int) -> str:
    """The token is part of the name: a stale trainer that wakes late cannot write over its successor's artifact."""
    return f"job-{job_id}-{token}"


def clear_orphans(database: Database, store: Store, job_id: int | None = None) -> None:
    """Remove what jobs that have ended, or one of them, left in the store and never registered.

    A store or database that is away is left for the next time.
    """
    try:
        found: dict[int, dict[str, str]] = defaultdict(dict)
        # Looked for first: what comes to lie there later belongs to a job that runs.
        for entry in store.names("job-" if job_id is None else f"job-{job_id}-"):
            if match := NAME.fullmatch(entry):
                found[int(match["job"])][entry] = match["name"]
        for of_job, entries in found.items():
            registered = _registered(database, of_job)
            for entry, name in entries.items():
                if registered is not None and name != registered:
                    log.info("removing %s from the model store: its job has ended and no model is it", entry)
                    store.remove_named(entry)
    except StoreAway as error:
        log.warning("artifacts that were never registered stay in the model store for now: %s", error)
    except SQLAlchemyError as error:
        if not is_away(error):
            raise
        log.warning("artifacts that were never registered stay in the model store for now: %s", cause(error))


def _registered(database: Database, job_id: int) -> str | None:
    """The name of the artifact of a job that has ended, empty without one; None for a job that may still make one."""
    with database.read() as session:
        job, version = jobs.find(session, job_id), registry.of_job(session, job_id)
    if job is None or job.state not in FINISHED_STATES:
        return None
    return version.artifact_url.rpartition("/")[2] if version else ""
