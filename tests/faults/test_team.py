"""Faults of a job that two processes train: one of them is killed, their trainer is killed, their trainer is to end."""

import signal
from pathlib import Path

import psutil

from tests.conftest import wait_until
from tests.faults.actors import Actor, wait_for_log
from tests.world import World, on_sqlite
from training.artifact import WEIGHTS


def members(trainer: Actor) -> dict[str, psutil.Process]:
    """The processes that train, by rank."""
    found = {}
    for child in psutil.Process(trainer.pid).children(recursive=True):
        line = child.cmdline()
        if "training.member" in line and "accelerate.commands.launch" not in line:
            found[child.environ()["RANK"]] = child
    return found


@on_sqlite
def test_a_job_one_of_whose_processes_was_killed_is_left_to_its_lease_and_ended_by_the_next_start(
    world: World, labelled_csv: Path
) -> None:
    job_id = world.submit(labelled_csv, epochs=3)
    with world.worker("train", "recorded=pause:3@1", train_processes=2) as trainer:
        wait_until(lambda: len(world.epochs(job_id)) == 1)
        members(trainer)["1"].kill()
        job = world.ends(job_id, "succeeded")
        said = trainer.said()
    assert f"job {job_id}: left to its lease: a process that trained with others was ended from outside" in said
    assert f"job {job_id}: goes on from step 2" in said
    assert (job.attempts, list(world.epochs(job_id))) == (2, [1, 2, 3])


@on_sqlite
def test_processes_end_with_their_trainer_whether_it_is_killed_or_told_to_end(world: World, labelled_csv: Path) -> None:
    job_id = world.submit(labelled_csv, epochs=3)
    with world.worker("train", "recorded=pause:600@1", train_processes=2) as trainer:
        wait_until(lambda: len(world.epochs(job_id)) == 1)
        left = list(members(trainer).values())
        assert len(left) == 2
        scratch = Path(left[0].cmdline()[-1]).parent
        assert scratch.is_dir()
        assert not (scratch / WEIGHTS).exists(), "a trainer that is killed would leave them behind"
        trainer.kill()
        wait_until(lambda: not any(process.is_running() for process in left))
    with world.worker("train", "recorded=pause:2", train_processes=2) as heir:
        wait_until(lambda: len(world.epochs(job_id)) == 2)
        left = list(members(heir).values())
        heir.send(signal.SIGTERM)
        wait_for_log(heir, f"job {job_id}: given back to the queue at its checkpoint")
        wait_until(lambda: not any(process.is_running() for process in left))
    job = world.finishes(job_id)
    assert (job.attempts, list(world.epochs(job_id))) == (2, [1, 2, 3]), "what was given back was no start"
