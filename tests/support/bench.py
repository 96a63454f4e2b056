"""Shared by the tests of the route: a stream, a database, workers on both, and queries of their state."""

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import redis
import torch
from sqlalchemy import select

from db.models import Base, DeadLetter, Prediction
from db.session import Database
from tests.conftest import PATIENCE_SECONDS, wait_until
from training.model.artifact import load_artifact
from training.store.cache import Cache
from training.store.store import Store
from worker.engines.engine_choice import Choice
from worker.engines.engines import TorchEngine
from worker.scoring.champion import Champion
from worker.scoring.pipeline import Limits, Pipeline
from worker.scoring.scores import Scores
from worker.scoring.scoring_model import ScoringModel, Serving
from worker.stream.stream import Depth, Stream

CPU = Serving(Store("/", Cache(Path("/nowhere"), 0)), device="cpu")  # the models of the tests lie in different folders
DRAINED = Depth(length=0, lag=0, pending=0)


class Killed(BaseException):
    """Ends a worker at this point, as SIGKILL would: no code on the route may handle it."""


class Holding(Champion):
    """A champion that is always the given model."""

    def __init__(self, database: Database, model: ScoringModel) -> None:
        super().__init__(database, CPU)
        self.model = model

    def current(self) -> ScoringModel:
        return self.model


class Slow(ScoringModel):
    """Sets `begun` when a forward starts, and waits for `go`."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.begun, self.go = threading.Event(), threading.Event()

    def forward(self, rows: Any) -> Scores:
        self.begun.set()
        assert self.go.wait(PATIENCE_SECONDS)
        return super().forward(rows)


@contextlib.contextmanager
def draining(pipeline: Pipeline) -> Iterator[threading.Thread]:
    """Drain in a thread; after the block it has ended without an error."""
    done: list[int] = []
    thread = threading.Thread(target=lambda: done.append(pipeline.drain()))
    thread.start()
    try:
        yield thread
    finally:
        thread.join(PATIENCE_SECONDS)
    assert done


class Bench:
    """The stream and the database of a test, with workers on both."""

    def __init__(self, database: Database, stream: Stream, raw: "redis.Redis", tiny: Any, promote: Any) -> None:
        self.database, self.stream, self.raw, self.tiny = database, stream, raw, tiny
        self.promote: Callable[[], int] = lambda: promote(database)

    def worker(
        self, champion: Champion | None = None, *, kind: type[Pipeline] = Pipeline, holds: type[Stream] = Stream,
        database: Database | None = None, **limits: float,
    ) -> Pipeline:  # fmt: skip
        """A new consumer with its own pipeline."""
        database = database or self.database
        chosen: dict[str, Any] = {"window_tweets": 100, "min_idle_seconds": 60, **limits}
        stream = holds(self.raw, self.stream.key, self.stream.group)
        champion = champion or Champion(database, CPU)
        return kind(stream, database, champion, Limits(**chosen, linger_seconds=0.05), threading.Event())

    def holding(self, kind: type[ScoringModel]) -> Holding:
        """The tiny model as `kind`, registered and champion of its own workers."""
        artifact = load_artifact(self.tiny.folder, self.tiny.sha256)
        engine = TorchEngine(artifact.model, torch.device("cpu"), torch.float32)
        return Holding(self.database, kind(self.promote(), artifact, engine, Choice(engine.name, 512, "", [])))

    def rows(self, table: type[Base]) -> list[dict[str, Any]]:
        with self.database.read() as session:
            return [dict(row) for row in session.execute(select(table.__table__)).mappings()]

    def scored(self) -> dict[str, int]:
        """Tweet id -> the version that scored it."""
        return {row["tweet_id"]: row["model_version_id"] for row in self.rows(Prediction)}

    def dead(self) -> list[dict[str, Any]]:
        return self.rows(DeadLetter)

    def deliveries(self) -> list[int]:
        """The number of deliveries of each pending record, in order."""
        rows = self.raw.xpending_range(self.stream.key, self.stream.group, "-", "+", 1000)
        return [row["times_delivered"] for row in rows]

    def recovers(self) -> None:
        """Healthy workers score the records that others left."""
        wait_until(lambda: self.worker(min_idle_seconds=0.02).drain() >= 0 and self.stream.depth() == DRAINED)


def wire(id_: object, words: str = "今日は嬉しい", **more: object) -> bytes:
    return json.dumps({"v": 1, "id": id_, "text": words, **more}).encode()
