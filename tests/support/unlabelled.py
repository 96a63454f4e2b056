"""Jobs that also learn from stored tweets: their tweets, runs, weights and what the terminal shows of them."""

import io
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import load_file

from db import jobs, predictions, registry
from db.models import ModelVersion, TrainingJob, utc_now
from db.session import Database
from tests.support.rows import tweet_row
from tests.support.training_jobs import NEVER, job_of
from training import failpoint
from training.jobs.context import TrainingContext
from training.jobs.run import run_next_job
from worker.cli import output
from worker.cli.training import job_output

EASY = {"epochs": 4, "learning_rate": 3e-3, "pooling": "mean", "baseline": False, "train_batch_size": 8}


def store_tweets(database: Database, texts: list[str], prefix: str = "", **values: Any) -> None:
    rows = [
        tweet_row(
            f"{prefix}{i}",
            text=text,
            **{"lang": "ja", "received_at": utc_now() - timedelta(hours=1, seconds=i), **values},
        )
        for i, text in enumerate(texts)
    ]
    with database.begin() as session:
        predictions.add_tweets(session, rows)


def easy_tweets(count: int) -> list[str]:
    """Two of three are positive."""
    return [f"今日はとても{'悲しい' if i % 3 == 0 else '嬉しい'}日だったなあ{i}" for i in range(count)]


def run(database: Database, context: TrainingContext, job_id: int) -> TrainingJob:
    assert run_next_job(database, context, "here", NEVER) == job_id
    job = job_of(database, job_id)
    assert (job.state, job.error) == ("succeeded", None)
    assert job.step == job.total_steps
    return job


def version_of(database: Database, job_id: int) -> ModelVersion:
    with database.read() as session:
        version = registry.of_job(session, job_id)
    assert version is not None
    return version


def weights_of(version: ModelVersion) -> dict[str, Any]:
    return load_file(version.artifact_url.removeprefix("file://") + "/model.safetensors")


def same_weights(one: ModelVersion, other: ModelVersion) -> bool:
    a, b = weights_of(one), weights_of(other)
    return all(np.array_equal(a[name], b[name]) for name in a)


def shown(database: Database, job: TrainingJob, monkeypatch: pytest.MonkeyPatch) -> str:
    screen = io.StringIO()
    monkeypatch.setattr(output, "console", Console(file=screen, width=250))
    job_output.job_summary(database, job)
    return screen.getvalue()


def failing(database: Database, context: TrainingContext, job_id: int, point: str) -> None:
    """Run a job that fails at this point, and queue it again."""
    failpoint.arm(point)
    try:
        run_next_job(database, context, "here", NEVER)
    finally:
        failpoint.arm("")
    assert job_of(database, job_id).state == "failed"
    with database.begin() as session:
        jobs.retry(session, job_id)
