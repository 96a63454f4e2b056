"""The end of a job's run: store the final state, or release the job so that it is resumed later."""

import logging
from collections.abc import Callable

from sqlalchemy.exc import SQLAlchemyError

from db import jobs
from db.errors import LeaseLost, SchemaMismatch, TweetscoreError
from db.models import TrainingJob
from db.session import Database, is_away
from training.errors import Cancelled, StopRequested, StoreUnavailable
from training.jobs.clean_stops import apply_clean_stop, record_clean_stop, release_job
from training.jobs.context import TrainingContext
from training.jobs.lease import Lease, lease_losses

log = logging.getLogger(__name__)

# A job that was released because a store did not answer is not claimed for this long. The pause doubles each time in a
# row.
FIRST_PAUSE_SECONDS = 5.0
LONGEST_PAUSE_SECONDS = 300.0

# Trains and registers what the job makes; returns the id of the model version or of the adapted base model.
Train = Callable[[Database, TrainingContext, TrainingJob, Lease], int]


def run_to_end(
    database: Database, context: TrainingContext, job: TrainingJob, lease: Lease, train: Train
) -> str | None:
    """Run `train` and return the final state of the job; None when the job is resumed later or by another worker."""
    try:
        state = _run(database, context, job, lease, train)
    except StopRequested:
        _release_at_stop(database, context, job)
        return None
    if state is not None:
        context.outages.pop(job.id, None)
    return state


def _run(database: Database, context: TrainingContext, job: TrainingJob, lease: Lease, train: Train) -> str | None:
    """Like `run_to_end`, but raises `StopRequested`."""
    try:
        made = train(database, context, job, lease)
        log.info("job %d: succeeded, %s %d", job.id, "base model" if job.kind == "adapt" else "model", made)
        return "succeeded"
    except StopRequested:
        raise
    except LeaseLost as error:
        lease_losses.inc()
        log.warning("%s", error)
        # After an outage the lease may have lapsed only because it could not be renewed: this worker did not fail.
        if lease.outage_since_renewal.is_set():
            _release(database, job, lease)
    except SchemaMismatch as error:
        # The schema was upgraded and this release cannot work with it. Nothing may be written, and the start does not
        # count as a failed attempt.
        record_clean_stop(context.jobs_folder, job)
        log.warning("job %d: another worker resumes it when its lease expires: %s", job.id, error)
    except Cancelled:
        return _finish(database, lease, "cancelled", None)
    except Exception as error:
        if isinstance(error, StoreUnavailable) or is_away(error):
            _release_for_outage(database, context, job, lease, error)
            return None
        if not isinstance(error, TweetscoreError):
            log.exception("job %d failed", job.id)
        message = str(error) if isinstance(error, TweetscoreError) else f"{type(error).__name__}: {error}"
        return _finish(database, lease, "failed", message)
    return None


def _finish(database: Database, lease: Lease, state: str, error: str | None) -> str | None:
    """Store the final state and return it; None when another worker has claimed the job. Raises `StopRequested`."""

    def finish() -> None:
        with database.begin() as session:
            jobs.finish(session, lease.job_id, lease.token, state, error)

    try:
        lease.retry_while_database_away(finish)
    except LeaseLost as lost:
        # An earlier commit may have taken place although its answer was lost.
        if not lease.retry_while_database_away(lambda: _is_finished(database, lease, state)):
            lease_losses.inc()
            log.warning("%s", lost)
            return None
    # The reason is only in the job's row: an error may quote the dataset.
    hint = f"; `tweetscore jobs show {lease.job_id}` shows the reason" if error else ""
    log.info("job %d: %s%s", lease.job_id, state, hint)
    return state


def _is_finished(database: Database, lease: Lease, state: str) -> bool:
    with database.read() as session:
        job = jobs.get(session, lease.job_id)
        return (job.state, job.fencing_token) == (state, lease.token)


def _release_for_outage(
    database: Database, context: TrainingContext, job: TrainingJob, lease: Lease, error: Exception
) -> None:
    """Queue a job again because a store or the database did not answer. Other jobs may not need it."""
    context.outages[job.id] += 1
    pause = min(FIRST_PAUSE_SECONDS * 2.0 ** (context.outages[job.id] - 1), LONGEST_PAUSE_SECONDS)
    log.warning("job %d: queued again with a pause of %g s: %s", job.id, pause, error)
    reason = str(error) if isinstance(error, StoreUnavailable) else "the database did not answer"
    _release(database, job, lease, f"waiting: {reason}", pause)


def _release(
    database: Database, job: TrainingJob, lease: Lease, reason: str | None = None, pause_seconds: float | None = None
) -> None:
    """Queue the job again, unless another worker has claimed it. This start does not count as an attempt."""
    sent = False

    def release() -> None:
        nonlocal sent
        with database.begin() as session:
            token, started_at = job.fencing_token, job.started_at
            # When the answer to an earlier commit was lost, this start may already be subtracted.
            release_job(session, job.id, token, started_at, reason, pause_seconds, uncount_start=not sent)
            sent = True

    lease.retry_while_database_away(release)


def _release_at_stop(database: Database, context: TrainingContext, job: TrainingJob) -> None:
    """Queue the job again because this worker shuts down; record the clean stop if the database does not answer."""
    marker = record_clean_stop(context.jobs_folder, job)
    try:
        if apply_clean_stop(database, marker):
            log.info("job %d: queued again at its checkpoint", job.id)
    except SQLAlchemyError as error:
        if not is_away(error):
            raise
        log.warning("job %d: the next worker of this home queues it again, the database does not answer", job.id)
    except OSError as error:
        log.warning("job %d: another worker resumes it when its lease expires: %s", job.id, error)
