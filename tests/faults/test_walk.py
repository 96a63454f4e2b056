"""Every failpoint of both routes in turn: a worker is killed exactly there, and the end is the same each time.

Tests 02, 03 and 23 kill workers at the points that are not walked here. The ordinary run visits three of these points.
"""

from collections.abc import Iterable
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest

from db.models import ModelVersion, TestPrediction
from tests.support.bench import wire
from tests.support.world import World
from training.failpoint import JOB_POINTS, TWEET_POINTS
from worker.connections import model_store

TWEETS = 30
TESTED_ELSEWHERE = {"forwarded", "committed", "recorded"}
ORDINARY = {"stored", "draft", "artifact"}


def walk(points: Iterable[str], shards: int = 1) -> list[Any]:
    """(point, kind of database, shards), the two kinds in turn; all but the ordinary ones are slow."""
    return [
        pytest.param(
            point, kind, shards, id=f"{point}-{kind}-{shards}", marks=[] if point in ORDINARY else pytest.mark.slow
        )
        for point, kind in zip(
            (point for point in points if point not in TESTED_ELSEWHERE), cycle(("sqlite", "postgresql"))
        )
    ]


@pytest.mark.parametrize(
    ("point", "database_url", "shards"),
    [*walk(TWEET_POINTS), *walk(TWEET_POINTS, 2)],
    indirect=["database_url", "shards"],
)
def test_a_scorer_killed_at_any_step_loses_nothing_and_scores_nothing_twice(world: World, point: str) -> None:
    world.stream.publish([wire(i, f"雨が{i}回降る") for i in range(TWEETS)] + [b"no tweet"])
    world.killed_at(f"{point}=kill")
    assert world.predictions() == (TWEETS if point in ("acked", "trimmed") else 0)
    world.recovers()
    assert world.scored() == {str(i) for i in range(TWEETS)}
    assert world.predictions() == TWEETS
    assert [letter["payload"] for letter in world.dead()] == [b"no tweet"]


@pytest.mark.parametrize(("point", "database_url", "shards"), walk(JOB_POINTS), indirect=["database_url", "shards"])
def test_a_trainer_killed_at_any_step_is_followed_by_one_that_ends_the_job_as_if_nothing_had_been(
    world: World, labelled_csv: Path, unbroken: dict[int, float], point: str
) -> None:
    job_id = world.submit(labelled_csv, epochs=3)
    world.killed_at(f"{point}=kill@2" if point in ("stepped", "checkpointed") else f"{point}=kill", "train")
    before = world.job(job_id)
    assert (before.state, before.attempts) == (("succeeded" if point == "registered" else "running"), 1)
    job = world.finishes(job_id)
    assert job.attempts == (1 if point == "registered" else 2)
    assert job.step == job.total_steps
    assert world.epochs(job_id) == pytest.approx(unbroken, abs=1e-4)
    assert [row["job_id"] for row in world.rows(ModelVersion) if row["job_id"]] == [job_id]
    assert world.count(TestPrediction) == 6
    # The successor removes what the killed trainer left, after its own commit.
    assert [path.name for path in model_store(world.settings).folder.glob("*job-*")] == [f"job-{job_id}-{job.attempts}"]
