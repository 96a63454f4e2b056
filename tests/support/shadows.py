"""A challenger beside the champion of a bench, its share, and what it dropped."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from prometheus_client import REGISTRY

from db.models import Prediction
from db.session import Database
from tests.conftest import wait_until
from tests.support.bench import CPU, Bench
from tests.support.rows import assign
from worker.scoring.pipeline import Pipeline
from worker.scoring.shadow import Shadow

WINDOW_TWEETS = 100


@dataclass
class Versions:
    champion: int
    challenger: int


def two_models(bench: Bench) -> Versions:
    """The tiny model twice: as the champion and as the challenger."""
    challenger, champion = bench.promote(), bench.promote()
    assign(bench.database, challenger, "challenger")
    return Versions(champion, challenger)


@contextmanager
def shadowed(
    bench: Bench, share: float = 1.0, backlog: Callable[[], int] = lambda: 0, database: Database | None = None
) -> Iterator[Pipeline]:
    """A worker whose windows the challenger gets; its database may be another object than the champion's."""
    stopping = threading.Event()
    shadow = Shadow(database or bench.database, CPU, share, backlog, WINDOW_TWEETS, stopping)
    worker = bench.worker(window_tweets=WINDOW_TWEETS)
    worker.after_commit = shadow.offer
    shadow.start()
    try:
        yield worker
    finally:
        stopping.set()
        shadow.close()


def scored_by(bench: Bench, version: int) -> set[str]:
    return {row["tweet_id"] for row in bench.rows(Prediction) if row["model_version_id"] == version}


def counted(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(f"tweetscore_shadow_{name}_total", labels) or 0.0


@contextmanager
def counts(name: str, expected: int, **labels: str) -> Iterator[None]:
    """After the block a counter reaches what it was before and `expected` more."""
    before = counted(name, **labels)
    yield
    wait_until(lambda: counted(name, **labels) >= before + expected)
    assert counted(name, **labels) == before + expected
