"""Every failpoint of both routes in turn: a worker is killed exactly there, and the end is the same each time."""

from pathlib import Path

import pytest

from db.models import ModelVersion, TestPrediction
from tests.support.bench import wire
from tests.support.world import World
from training.failpoint import JOB_POINTS, TWEET_POINTS
from worker.connections import model_store

TWEETS = 30


@pytest.mark.parametrize("point", TWEET_POINTS)
def test_a_scorer_killed_at_any_step_loses_nothing_and_scores_nothing_twice(world: World, point: str) -> None:
    world.stream.publish([wire(i, f"雨が{i}回降る") for i in range(TWEETS)] + [b"no tweet"])
    world.killed_at(f"{point}=kill")
    before = world.predictions()
    assert before == (TWEETS if point in ("committed", "acked", "trimmed") else 0)
    world.recovers()
    assert world.scored() == {str(i) for i in range(TWEETS)}
    assert world.predictions() == TWEETS
    assert [letter["payload"] for letter in world.dead()] == [b"no tweet"]


@pytest.mark.parametrize("point", JOB_POINTS)
def test_a_trainer_killed_at_any_step_is_followed_by_one_that_ends_the_job_as_if_nothing_had_been(
    world: World, labelled_csv: Path, unbroken: dict[int, float], point: str
) -> None:
    job_id = world.submit(labelled_csv, epochs=3)
    world.killed_at(f"{point}=kill@2" if point in ("stepped", "checkpointed", "recorded") else f"{point}=kill", "train")
    before = world.job(job_id)
    assert (before.state, before.attempts) == (("succeeded" if point == "registered" else "running"), 1)
    job = world.finishes(job_id)
    assert job.attempts == (1 if point == "registered" else 2)
    assert job.step == job.total_steps
    assert world.epochs(job_id) == pytest.approx(unbroken, abs=1e-4)
    assert [row["job_id"] for row in world.rows(ModelVersion) if row["job_id"]] == [job_id]
    assert world.count(TestPrediction) == 6
    # What a killed trainer left is cleared away after its successor's commit.
    assert [path.name for path in model_store(world.settings).folder.glob("*job-*")] == [f"job-{job_id}-{job.attempts}"]
