"""Training jobs that really train: submitted, run in a thread, and looked at in the database."""

import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import func, select

from db import jobs
from db.models import TrainingJob
from db.session import Database
from tests.conftest import PATIENCE_SECONDS, wait_until
from training.config import make_config
from training.jobs.context import TrainingContext
from training.jobs.run import run_next_job
from training.store.cache import Cache
from training.store.store import Store

NEVER = threading.Event()


def context_in(folder: Path, tiny_encoder: Path) -> TrainingContext:
    cache = Cache(folder / "cache", 1_000_000_000)
    return TrainingContext(
        cache=cache,
        model_store=Store(folder / "models", cache),
        input_store=Store(folder, cache),
        jobs_folder=folder / "jobs",
        checkpoint_store=None,
        boards_folder=folder / "boards",
        read_roots=(folder, tiny_encoder.parent),
        device="cpu",
        lease_seconds=30,
        max_attempts=3,
    )


def submit(database: Database, dataset: Path, sha256: str | None = None, **settings: Any) -> int:
    config = make_config("fast", **settings).model_dump(mode="json")
    with database.begin() as session:
        return jobs.submit(
            session, request_id=uuid.uuid4().hex, dataset=str(dataset), dataset_sha256=sha256, config=config
        ).id


def job_of(database: Database, job_id: int) -> TrainingJob:
    with database.begin() as session:
        job = jobs.get(session, job_id)
        session.expunge(job)
        return job


def count(database: Database, table: type) -> int:
    with database.begin() as session:
        return session.scalar(select(func.count()).select_from(table)) or 0


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


@contextmanager
def running(database: Database, context: TrainingContext, job_id: int, stopping: threading.Event) -> Iterator[None]:
    """A worker in a thread of its own, well into the job; it must have ended by itself when the block does."""
    thread = threading.Thread(target=run_next_job, args=(database, context, "here", stopping), daemon=True)
    thread.start()
    try:
        wait_until(lambda: job_of(database, job_id).step > 0)
        yield
        thread.join(timeout=PATIENCE_SECONDS)
        assert not thread.is_alive()
    finally:
        stopping.set()
        thread.join(timeout=PATIENCE_SECONDS)


def epoch_seconds(database: Database, job_id: int) -> list[tuple[int, float]]:
    with database.begin() as session:
        return [(metric.epoch, metric.seconds) for metric in jobs.epochs(session, job_id)]


def shorten(database: Database, job_id: int, epochs: int) -> None:
    with database.begin() as session:
        job = jobs.get(session, job_id)
        job.config = {**job.config, "epochs": epochs}
