"""Rows of training jobs: submitted, claimed and changed without a worker."""

from datetime import timedelta
from typing import Any

from db import jobs
from db.models import EpochMetric, TrainingJob, utc_now
from db.session import Database


def submit(database: Database, request_id: str = "request", **values: Any) -> int:
    fields = {"dataset": "file.csv", "dataset_sha256": None, "config": {"epochs": 1}, **values}
    with database.begin() as session:
        return jobs.submit(session, request_id=request_id, **fields).id


def claim(database: Database, owner: str = "a", lease_seconds: float = 60, max_attempts: int = 3) -> TrainingJob | None:
    with database.begin() as session:
        return jobs.claim(session, owner=owner, lease_seconds=lease_seconds, max_attempts=max_attempts)


def claim_new(database: Database, lease_seconds: float = 60) -> TrainingJob:
    submit(database)
    return claim(database, lease_seconds=lease_seconds)


def read(database: Database, job_id: int) -> TrainingJob:
    with database.read() as session:
        return jobs.get(session, job_id)


def row(database: Database, job_id: int) -> dict[str, Any]:
    with database.read() as session:
        job = jobs.get(session, job_id)
        values = {column.name: getattr(job, column.name) for column in TrainingJob.__table__.columns}
        return {**values, "epochs": [metric.epoch for metric in jobs.epochs(session, job_id)]}


def cancel(database: Database, job_id: int) -> TrainingJob:
    with database.begin() as session:
        return jobs.request_cancel(session, job_id)


def lapse(database: Database, job_id: int) -> None:
    """Let the lease of a job run out, as if its worker had been silent for long."""
    with database.begin() as session:
        jobs.get(session, job_id).lease_expires_at = utc_now() - timedelta(seconds=1)


def epoch_metric(job_id: int, epoch: int, **values: float) -> EpochMetric:
    figures = dict.fromkeys(
        ("train_loss", "learning_rate", "valid_loss", "valid_accuracy", "valid_f1_macro", "seconds"), 0.5
    )
    return EpochMetric(job_id=job_id, epoch=epoch, **{**figures, **values})
