"""Fixtures for faults: a home, a server, a database of each kind in turn, and the tiny model as champion."""

import signal
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import redis
from celery import Celery
from sqlalchemy import func, select

from db import jobs, migrate
from db.models import Base, DeadLetter, EpochMetric, Prediction, ScoringWindow, TrainingJob
from db.session import Database, open_database
from tests.conftest import wait_until, write_labelled
from tests.support.actors import Actor, acting, killed_at
from tests.support.bench import DRAINED
from training.jobs.run import run_next_job
from worker.app import TRAINING, broker_url
from worker.connections import open_stream, training_context
from worker.intake.submit_job import submit_training
from worker.settings import Settings, load_settings
from worker.stream import embedded_valkey
from worker.stream.sharded_stream import ShardedStream

# For tests in which the kind of database does not matter: one of the two.
on_sqlite = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
on_postgresql = pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
# For tests that are to hold with one shard and with several.
with_shards = pytest.mark.parametrize("shards", [1, 2], indirect=True)
on_two_shards = pytest.mark.parametrize("shards", [2], indirect=True)
# The 48 training rows make two steps an epoch.
TWO_STEPS = {"train_batch_size": 32}


@dataclass
class World:
    """The database, stream and home of one test. `given` are the settings of its workers."""

    given: dict[str, Any]
    database: Database
    url: str
    champion: int

    @property
    def settings(self) -> Settings:
        return load_settings(**self.given)

    @property
    def stream(self) -> ShardedStream:
        return open_stream(self.settings, self.url)

    @property
    def raw(self) -> "redis.Redis":
        return redis.Redis.from_url(self.url)

    @contextmanager
    def worker(self, role: str = "score", failpoints: str = "", **more: Any) -> Iterator[Actor]:
        with acting(role, {**self.given, **more}, failpoints) as actor:
            yield actor

    def killed_at(self, failpoints: str, role: str = "score", **more: Any) -> None:
        """Run a worker until its failpoint ends it."""
        killed_at(role, {**self.given, **more}, failpoints)

    # --- state

    def rows(self, table: type[Base]) -> list[dict[str, Any]]:
        with self.database.read() as session:
            return [dict(row) for row in session.execute(select(table.__table__)).mappings()]

    def count(self, table: type[Base]) -> int:
        with self.database.read() as session:
            return session.scalar(select(func.count()).select_from(table)) or 0

    def scored(self) -> set[str]:
        """Ids of the tweets with a prediction. `predictions` counts the rows."""
        return {row["tweet_id"] for row in self.rows(Prediction)}

    def predictions(self) -> int:
        return self.count(Prediction)

    def passes(self) -> int:
        """Tweets of all committed windows; more than there are rows when some were scored again."""
        return sum(row["tweets"] for row in self.rows(ScoringWindow))

    def dead(self) -> list[dict[str, Any]]:
        return self.rows(DeadLetter)

    def drained(self) -> None:
        """Wait until the stream is empty: lag 0, pending 0, trimmed; no record is counted as vanished."""
        wait_until(lambda: self.stream.depth() == DRAINED)
        self.stream.detect_vanished()
        assert self.stream.vanished().records == 0

    def recovers(self) -> None:
        """Let one healthy worker score everything that is left."""
        with self.worker():
            self.drained()

    # --- jobs

    def submit(self, dataset: Path, **options: Any) -> int:
        return submit_training(self.settings, self.database, dataset, "fast", **{**TWO_STEPS, **options}).id

    def ask(self, dataset: Path | str, request_id: str | None = None) -> str:
        """A request to train from a program that has only Celery; returns its id."""
        options = {**TWO_STEPS, "dataset": str(dataset), "epochs": 1}
        client = Celery(broker=broker_url(self.url))
        return str(client.send_task("worker.tasks.train", kwargs=options, queue=TRAINING, task_id=request_id).id)

    def asked(self, request_id: str) -> TrainingJob | None:
        with self.database.read() as session:
            return jobs.of_request(session, request_id)

    def job(self, job_id: int) -> TrainingJob:
        with self.database.read() as session:
            return jobs.get(session, job_id)

    def epochs(self, job_id: int) -> dict[int, float]:
        """Epoch -> validation loss."""
        with self.database.read() as session:
            found: list[EpochMetric] = jobs.epochs(session, job_id)
        return {epoch.epoch: epoch.valid_loss for epoch in found}

    def finishes(self, job_id: int, state: str = "succeeded") -> TrainingJob:
        """Let one healthy trainer finish the job and remove its checkpoints."""
        with self.worker("train") as actor:
            self.ends(job_id, state)
            actor.send(signal.SIGTERM)
            actor.ended()
        return self.job(job_id)

    def ends(self, job_id: int, state: str) -> TrainingJob:
        wait_until(lambda: self.job(job_id).finished_at is not None)
        assert (self.job(job_id).state, self.job(job_id).error) == (state, self.job(job_id).error)
        return self.job(job_id)


@pytest.fixture
def clean_queue(server: embedded_valkey.Server) -> None:
    """Empty the training queue: all tests of this process use the same name."""
    redis.Redis.from_url(server.url).delete(TRAINING, f"{TRAINING}:taken")


@pytest.fixture
def quick(tmp_path: Path, tiny_encoder: Path) -> dict[str, Any]:
    """Settings of a worker with short waits, without a database."""
    return {
        "home": tmp_path / "home",
        "base_model": str(tiny_encoder),
        "read_roots": (tmp_path, tiny_encoder.parent),
        "engine": "torch-float32",
        "min_idle_seconds": 1.0,
        "linger_seconds": 0.2,
        "watch_seconds": 0.1,
        "lease_seconds": 1.5,
    }


@pytest.fixture(scope="session")
def unbroken(tmp_path_factory: pytest.TempPathFactory, tiny_encoder: Path) -> dict[int, float]:
    """Epoch -> validation loss of three epochs on `labelled_csv`, trained without a fault."""
    folder = tmp_path_factory.mktemp("unbroken")
    database = open_database(f"sqlite:///{folder / 'unbroken.db'}")
    migrate.upgrade(database)
    settings = load_settings(home=folder / "home", base_model=str(tiny_encoder))
    world = World({"home": settings.home}, database, "", 0)
    job = submit_training(settings, database, write_labelled(folder / "labelled.csv"), "fast", epochs=3, **TWO_STEPS)
    assert run_next_job(database, training_context(settings), "here", threading.Event()) == job.id
    assert world.job(job.id).state == "succeeded"
    return world.epochs(job.id)


@pytest.fixture
def shards(request: pytest.FixtureRequest) -> int:
    """The shards of a world's stream: one, or the parameter of a test."""
    return int(getattr(request, "param", 1))


@pytest.fixture
def given(quick: dict[str, Any], database_url: str, shards: int) -> dict[str, Any]:
    return {**quick, "database_url": database_url, "stream_shards": shards}


@pytest.fixture
def world(
    given: dict[str, Any], database: Database, server: embedded_valkey.Server, promote: Callable[..., int]
) -> World:
    """A world on the server of the test process, which no test may stop."""
    given |= {"redis_url": server.url, "stream_key": f"tweets-{uuid.uuid4().hex}"}
    return World(given, database, server.url, promote(database, Path(given["home"]) / "models"))


@pytest.fixture
def own(given: dict[str, Any], database: Database, promote: Callable[..., int]) -> World:
    """A world on the home's embedded server, which the test starts and stops."""
    url = f"unix://{embedded_valkey.socket_path(Path(given['home']))}"
    return World(given, database, url, promote(database, Path(given["home"]) / "models"))
