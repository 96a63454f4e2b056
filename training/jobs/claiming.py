"""Claim the next job, also when the answer to the commit of the claim is lost."""

import logging
import threading

from sqlalchemy.exc import SQLAlchemyError

from db import jobs
from db.models import TrainingJob
from db.session import Database, is_away
from training.errors import StopRequested
from training.jobs.clean_stops import apply_clean_stops, record_clean_stop
from training.jobs.context import TrainingContext
from training.jobs.database_retry import driver_message, retry_while_database_away

log = logging.getLogger(__name__)


def claim_next_job(
    database: Database, context: TrainingContext, owner: str, stopping: threading.Event
) -> TrainingJob | None:
    """Lease the next job to `owner`, after applying recorded clean stops.

    Returns None when there is no job to claim, the database does not answer, or `stopping` is set meanwhile.
    """
    try:
        apply_clean_stops(database, context.jobs_folder)
        return _claim(database, context, owner, stopping)
    except StopRequested:
        return None
    except SQLAlchemyError as error:
        if not is_away(error):
            raise
        log.warning("cannot claim a job, the database does not answer: %s", driver_message(error))
        return None


def _claim(database: Database, context: TrainingContext, owner: str, stopping: threading.Event) -> TrainingJob | None:
    job: TrainingJob | None = None
    try:
        with database.begin() as session:
            job = jobs.claim(
                session, owner=owner, lease_seconds=context.lease_seconds, max_attempts=context.max_attempts
            )
            if job is not None:
                session.expunge(job)
        return job
    except SQLAlchemyError as error:
        if job is None or not is_away(error):
            raise
    # The answer to the commit was lost. If it took place and this worker did not notice, the claim would count as a
    # failed attempt, so ask the database.
    claimed = job
    try:
        committed = retry_while_database_away(lambda: _is_running_with_token(database, claimed), stopping)
    except StopRequested:
        record_clean_stop(context.jobs_folder, claimed)
        raise
    return claimed if committed else None


def _is_running_with_token(database: Database, job: TrainingJob) -> bool:
    with database.begin() as session:
        return jobs.is_running_with_token(session, job.id, job.fencing_token)
