"""Queries of the job protocol: submit, claim, renew, progress, finish. The caller owns the transaction.

A claim sets a lease and raises the fencing token. Every later write passes that token and raises `LeaseLost` once
another worker has claimed the job. Times come from the caller's clock: leases last tens of seconds, and clocks that NTP
synchronises differ by milliseconds.
"""

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, and_, delete, func, or_, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from db.errors import JobNotRetryable, LeaseLost, NotFound
from db.models import FINISHED_STATES, EpochMetric, TrainingJob, utc_now


def submit(
    session: Session,
    *,
    request_id: str,
    dataset: str,
    dataset_sha256: str | None,
    config: dict[str, Any],
    kind: str = "train",
    message: str | None = None,
    ended: tuple[str, str] | None = None,
    data_report: dict[str, Any] | None = None,
    labels_until: datetime | None = None,
) -> TrainingJob:
    """The queued job of this request. A repeated `request_id` returns the existing job unchanged.

    `kind` is one of `JOB_KINDS`. `message` is the Celery message that carried the request. `ended` is the final state
    and the reason of a request that was refused or cancelled before it became a job. `data_report` describes the
    dataset, if it was read already. `labels_until` is set when labels of stored tweets are among its rows.
    """
    known = of_request(session, request_id)
    if known:
        return known
    job = TrainingJob(
        request_id=request_id,
        kind=kind,
        dataset=dataset,
        dataset_sha256=dataset_sha256,
        config=config,
        message=message,
        data_report=data_report,
        labels_until=labels_until,
    )
    if ended is not None:
        (job.state, job.error), job.finished_at = ended, utc_now()
    try:
        with session.begin_nested():
            session.add(job)
    except IntegrityError:
        # Another transaction inserted the same request first.
        return session.scalars(select(TrainingJob).where(TrainingJob.request_id == request_id)).one()
    return job


def of_request(session: Session, request_id: str) -> TrainingJob | None:
    return session.scalar(select(TrainingJob).where(TrainingJob.request_id == request_id))


def get(session: Session, job_id: int) -> TrainingJob:
    job = find(session, job_id)
    if job is None:
        raise NotFound(f"there is no job {job_id}; `tweetscore jobs list` shows the existing ones")
    return job


def find(session: Session, job_id: int) -> TrainingJob | None:
    return session.get(TrainingJob, job_id)


def recent(session: Session, limit: int = 20) -> list[TrainingJob]:
    return list(session.scalars(select(TrainingJob).order_by(TrainingJob.id.desc()).limit(limit)))


def counts(session: Session) -> dict[str, int]:
    """Jobs by state."""
    query = select(TrainingJob.state, func.count()).group_by(TrainingJob.state)
    return {state: int(number) for state, number in session.execute(query)}


def epochs(session: Session, job_id: int) -> list[EpochMetric]:
    return list(session.scalars(select(EpochMetric).where(EpochMetric.job_id == job_id).order_by(EpochMetric.epoch)))


def _claimable() -> ColumnElement[bool]:
    """Running with a lapsed lease, or queued. A queued job with a `lease_expires_at` waits until that time."""
    lapsed = TrainingJob.lease_expires_at < utc_now()
    waiting = and_(TrainingJob.state == "queued", or_(TrainingJob.lease_expires_at.is_(None), lapsed))
    return or_(waiting, and_(TrainingJob.state == "running", lapsed))


def any_claimable(session: Session) -> bool:
    return session.scalar(select(TrainingJob.id).where(_claimable()).limit(1)) is not None


def claim(session: Session, *, owner: str, lease_seconds: float, max_attempts: int) -> TrainingJob | None:
    """Lease the oldest queued or lapsed job to `owner` under a new fencing token; None when there is no such job.

    A lapsed job whose cancellation was requested is cancelled instead. A job whose worker died `max_attempts` times
    fails, but only after one more lease: its last worker may be alive and could not renew because of a database outage.
    """
    while True:
        job = session.scalar(
            select(TrainingJob).where(_claimable()).order_by(TrainingJob.id).limit(1).with_for_update(skip_locked=True)
        )
        if job is None:
            return None
        if job.cancel_requested:
            job.state, job.finished_at, job.error = "cancelled", utc_now(), None
        elif job.attempts >= max_attempts and job.state == "running" and job.error is None:
            job.lease_expires_at = utc_now() + timedelta(seconds=lease_seconds)
            job.error = f"{job.lease_owner} has not renewed its lease; the job fails unless it renews soon"
        elif job.attempts >= max_attempts:
            job.state, job.finished_at = "failed", utc_now()
            job.error = (
                f"the worker that ran this job died {job.attempts} times (last owner {job.lease_owner}); "
                "look at the log of that worker, then submit the job again"
            )
        else:
            job.state, job.error = "running", None
            job.lease_owner = owner
            job.lease_expires_at = utc_now() + timedelta(seconds=lease_seconds)
            job.fencing_token += 1
            job.attempts += 1
            job.started_at = job.started_at or utc_now()
            session.flush()
            return job
        session.flush()


def _write(session: Session, job_id: int, token: int, values: dict[str, Any]) -> bool:
    """Update a running job under its fencing token; raises `LeaseLost` when the token is not the newest.

    Returns whether cancellation was requested.
    """
    changed = session.execute(
        update(TrainingJob)
        .where(TrainingJob.id == job_id, TrainingJob.fencing_token == token, TrainingJob.state == "running")
        .values(**values)
        .returning(TrainingJob.cancel_requested)
    ).first()
    if changed is None:
        raise LeaseLost(f"job {job_id} was taken over by another worker; this one stops")
    return bool(changed[0])


def renew_lease(session: Session, job_id: int, token: int, lease_seconds: float) -> bool:
    """Extend the lease to `lease_seconds` from now. Returns whether cancellation was requested."""
    ends = utc_now() + timedelta(seconds=lease_seconds)
    return _write(session, job_id, token, {"lease_expires_at": ends, "error": None})


def is_running_with_token(session: Session, job_id: int, token: int) -> bool:
    """Whether the job is running and this token is its newest.

    Raises an error for which `is_away` is true while another transaction has locked the row, such as one whose
    connection was lost and that may still commit.
    """
    job = lock(session, job_id)
    return job is not None and (job.state, job.fencing_token) == ("running", token)


def lock(session: Session, job_id: int) -> TrainingJob | None:
    """Lock a job's row until the transaction ends; fails at once when another transaction has locked it."""
    return session.get(TrainingJob, job_id, with_for_update={"nowait": True}, populate_existing=True)


def record_data(session: Session, job_id: int, token: int, sha256: str | None, report: dict[str, Any]) -> None:
    _write(session, job_id, token, {"dataset_sha256": sha256, "data_report": report})


def record_step(
    session: Session,
    job_id: int,
    token: int,
    step: int,
    total_steps: int,
    loss: float | None,
    samples_per_second: float | None = None,
) -> bool:
    """Store the progress of a job; None keeps the last value. Returns whether cancellation was requested."""
    values = {"step": step, "total_steps": total_steps, "loss": loss, "samples_per_second": samples_per_second}
    values = {name: value for name, value in values.items() if value is not None}
    return _write(session, job_id, token, values)


def record_epoch(session: Session, token: int, metric: EpochMetric) -> None:
    """Store the metrics of an epoch. An epoch that is repeated after a resume replaces its row."""
    require_token(session, metric.job_id, token)
    session.merge(metric)


def delete_epochs_after(session: Session, job_id: int, epoch: int) -> None:
    """Delete the epochs that a resumed run will repeat."""
    session.execute(delete(EpochMetric).where(EpochMetric.job_id == job_id, EpochMetric.epoch > epoch))


def require_token(session: Session, job_id: int, token: int) -> None:
    """Lock the job's row and raise `LeaseLost` unless the token is still the newest."""
    _write(session, job_id, token, {"fencing_token": token})


def finish(session: Session, job_id: int, token: int, state: str, error: str | None = None) -> None:
    _write(
        session,
        job_id,
        token,
        {"state": state, "error": error, "finished_at": utc_now(), "lease_owner": None, "lease_expires_at": None},
    )


def release(
    session: Session, job_id: int, token: int, reason: str | None = None, pause_seconds: float | None = None
) -> None:
    """Queue the job again; this start does not count as an attempt.

    `reason` is shown to users. No worker may claim the job for `pause_seconds`.
    """
    _write(
        session,
        job_id,
        token,
        {
            "state": "queued",
            "attempts": TrainingJob.attempts - 1,
            "lease_owner": None,
            "lease_expires_at": None if pause_seconds is None else utc_now() + timedelta(seconds=pause_seconds),
            "error": reason,
        },
    )


def uncount_start(session: Session, job_id: int, token: int, started_at: datetime | None) -> bool:
    """Uncount the start of a live worker whose lease lapsed and whose job another worker has claimed since.

    Call it once per start. Returns False and changes nothing when the job has finished, or when `retry` has reset the
    count: then `started_at` differs from the value that this start saw.
    """
    changed = session.execute(
        update(TrainingJob)
        .where(
            TrainingJob.id == job_id,
            TrainingJob.fencing_token > token,
            TrainingJob.started_at == started_at,
            TrainingJob.state.not_in(FINISHED_STATES),
            TrainingJob.attempts > 0,
        )
        .values(attempts=TrainingJob.attempts - 1)
        .returning(TrainingJob.id)
    ).first()
    return changed is not None


def retry(session: Session, job_id: int) -> TrainingJob:
    """Queue a failed job again with its attempts reset. Raises `JobNotRetryable` for a job that has not failed."""
    job = get(session, job_id)
    if job.state != "failed":
        raise JobNotRetryable(f"job {job_id} is {job.state}; only a failed job can be retried")
    job.state, job.attempts, job.error, job.finished_at, job.cancel_requested = "queued", 0, None, None, False
    job.started_at = None
    session.flush()
    return job


def past_resuming(
    session: Session, job_ids: Sequence[int], failed_before: datetime, lock_rows: bool = False
) -> set[int]:
    """The jobs that will not resume from a checkpoint: succeeded, cancelled, or failed before `failed_before`.

    With `lock_rows` their rows are locked until the transaction ends.
    """
    failed = and_(TrainingJob.state == "failed", TrainingJob.finished_at < failed_before)
    ended = or_(TrainingJob.state.in_(("succeeded", "cancelled")), failed)
    query = select(TrainingJob.id).where(TrainingJob.id.in_(job_ids), ended)
    return set(session.scalars(query.with_for_update() if lock_rows else query))


def request_cancel(session: Session, job_id: int) -> TrainingJob:
    """Cancel a queued job at once, or request that the worker of a running job stops within a few steps."""
    get(session, job_id)
    # Locked, since a worker may be claiming or finishing it.
    job = session.get_one(TrainingJob, job_id, with_for_update=True, populate_existing=True)
    if job.state not in FINISHED_STATES:
        job.cancel_requested = True
    if job.state == "queued":
        job.state, job.finished_at, job.error, job.lease_expires_at = "cancelled", utc_now(), None, None
    session.flush()
    return job


# --- results for requests that came as Celery messages


def held_by(session: Session, owner: str) -> list[TrainingJob]:
    """The running jobs whose lease `owner` holds."""
    query = select(TrainingJob).where(TrainingJob.state == "running", TrainingJob.lease_owner == owner)
    return list(session.scalars(query))


def _unanswered() -> ColumnElement[bool]:
    """Finished jobs of Celery messages whose result is not yet sent and that no worker is sending now."""
    due = or_(TrainingJob.answer_due_at.is_(None), TrainingJob.answer_due_at < utc_now())
    return and_(TrainingJob.message.is_not(None), TrainingJob.state.in_(FINISHED_STATES), due)


def any_unanswered(session: Session) -> bool:
    return session.scalar(select(TrainingJob.id).where(_unanswered()).limit(1)) is not None


def claim_answers(session: Session, seconds: float, limit: int = 100) -> list[TrainingJob]:
    """Reserve finished jobs whose result is not yet sent. They are due again after `seconds` unless
    `mark_answered` is called."""
    query = select(TrainingJob).where(_unanswered()).order_by(TrainingJob.id).limit(limit)
    due = list(session.scalars(query.with_for_update(skip_locked=True)))
    for job in due:
        job.answer_due_at = utc_now() + timedelta(seconds=seconds)
    session.flush()
    return due


def mark_answered(session: Session, request_id: str) -> None:
    """Note that the result was sent; the message is deleted."""
    values = {"message": None, "answer_due_at": None}
    session.execute(update(TrainingJob).where(TrainingJob.request_id == request_id).values(**values))
