"""Celery states and results of training jobs, derived from their rows. Writing them again is harmless."""

from typing import Any

from celery import Celery, states
from celery.exceptions import TaskRevokedError
from sqlalchemy.orm import Session

from db import jobs, registry
from db.models import TrainingJob
from training.model.base_model import adapted_name
from worker.errors import JobFailed

PROGRESS = "PROGRESS"
REVOKED = "the job was cancelled"


def state_of(session: Session, job: TrainingJob) -> tuple[str, Any] | None:
    """Return the Celery state of a job and its result. None for a queued job: Celery reports PENDING by itself."""
    if job.state == "running":
        if not job.step:
            return states.STARTED, {"job_id": job.id}
        epoch = _epoch(session, job)
        progress = {"step": job.step, "total_steps": job.total_steps, "epoch": epoch, "loss": job.loss}
        return PROGRESS, {"job_id": job.id, **progress}
    if job.state == "succeeded":
        return states.SUCCESS, _result(session, job)
    if job.state == "failed":
        return states.FAILURE, JobFailed(job.error or "")
    return (states.REVOKED, TaskRevokedError(job.error or REVOKED)) if job.state == "cancelled" else None


def _epoch(session: Session, job: TrainingJob) -> int:
    """The epoch in progress, from 1. The epochs of an adaptation have no rows."""
    epochs = job.config.get("epochs")
    if job.kind == "adapt":
        done = job.step * (epochs or 1) // (job.total_steps or job.step)
    else:
        done = len(jobs.epochs(session, job.id))
    return min(done + 1, epochs or done + 1)


def publish(app: Celery, job: TrainingJob, state_and_result: tuple[str, Any] | None) -> None:
    """Write the result of `state_of` to the result backend. This does not run callbacks or chained tasks."""
    if state_and_result is not None:
        state, result = state_and_result
        app.backend.store_result(job.request_id, result, state)


def _result(session: Session, job: TrainingJob) -> dict[str, Any]:
    """The return value of the task. `metrics` holds the figures of the whole test split, or of held-out tweets."""
    version, base = registry.of_job(session, job.id), registry.base_model_of_job(session, job.id)
    if base is not None:
        metrics = {"loss_before": base.loss_before, "loss_after": base.loss_after}
        return {"job_id": job.id, "base_model": adapted_name(base.id), "metrics": metrics}
    if version is None:
        return {"job_id": job.id, "model_version_id": None, "metrics": {}}
    figures = registry.metrics(session, version.id)
    metrics = {metric: value for (metric, label), value in figures.items() if not label}
    return {"job_id": job.id, "model_version_id": version.id, "metrics": metrics}
