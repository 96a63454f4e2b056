"""Faults on the route of a job: trainers that die, sleep and run out of disk, jobs that kill, claims that lapse.

Each fault has one kind of database, the two kinds in turn.
"""

import signal
from datetime import timedelta
from pathlib import Path

import pytest

from db import jobs
from db.models import ModelVersion, TestMetric, TestPrediction, utc_now
from tests.conftest import wait_until
from tests.support.actors import wait_for_log
from tests.support.world import World, on_postgresql, on_sqlite
from worker.connections import model_store

Epochs = dict[int, float]


@pytest.mark.slow
@on_sqlite
def test_21_a_full_disk_fails_the_job_with_that_reason_and_leaves_the_old_checkpoint_whole(
    world: World, labelled_csv: Path, unbroken: Epochs
) -> None:
    """A limit on the file size acts like a full disk for one process: the third checkpoint does not fit."""
    job_id = world.submit(labelled_csv, epochs=3)
    with world.worker("train", "draft=pause:600~step-00000006", lease_seconds=60) as trainer:
        wait_for_log(trainer, "failpoint draft")
        kept = world.settings.home / "jobs" / str(job_id)
        size = max(path.stat().st_size for path in kept.rglob("*.safetensors"))
    with world.database.begin() as session:
        jobs.get(session, job_id).lease_expires_at = utc_now() - timedelta(seconds=1)
    before = {path.name: (path / "SHA256SUMS").read_bytes() for path in kept.glob("step-*")}
    assert before
    with world.worker("train", file_bytes=size // 2):
        job = world.ends(job_id, "failed")
    assert "could not be written" in job.error
    assert "File too large" in job.error
    assert "free disk space" in job.error
    assert {path.name: (path / "SHA256SUMS").read_bytes() for path in kept.glob("step-*")} == before
    with world.database.begin() as session:
        jobs.retry(session, job_id)
    assert world.finishes(job_id).attempts == 1
    assert world.epochs(job_id) == pytest.approx(unbroken, abs=1e-4)


@pytest.mark.slow
@on_postgresql
def test_22_a_job_longer_than_every_timeout_runs_once(world: World, labelled_csv: Path) -> None:
    job_id = world.submit(labelled_csv, epochs=4)
    lease_seconds = 2.5
    with (
        world.worker("train", "validated=pause:2", lease_seconds=lease_seconds) as first,
        world.worker("train", lease_seconds=lease_seconds) as second,
    ):
        job = world.ends(job_id, "succeeded")
        assert sum(f"job {job_id}: claimed" in worker.said() for worker in (first, second)) == 1
    took = (job.finished_at - job.started_at).total_seconds()
    assert took > 3 * lease_seconds or "claimed" in second.said()
    assert (job.attempts, job.fencing_token) == (1, 1)
    assert world.count(ModelVersion) == 2


@on_postgresql
def test_23_the_job_of_a_killed_trainer_is_resumed_from_its_checkpoint_and_no_epoch_is_twice(
    world: World, labelled_csv: Path, unbroken: Epochs
) -> None:
    job_id = world.submit(labelled_csv, epochs=3)
    world.killed_at("recorded=kill@2", "train")
    before = world.job(job_id)
    assert (before.state, before.attempts, len(world.epochs(job_id))) == ("running", 1, 2)
    with world.worker("train") as heir:
        job = world.ends(job_id, "succeeded")
        assert f"job {job_id}: resumes from step 4" in heir.said()
    assert (job.attempts, job.fencing_token, job.step) == (2, 2, job.total_steps)
    assert list(world.epochs(job_id)) == [1, 2, 3]
    assert world.epochs(job_id) == pytest.approx(unbroken, abs=1e-4)
    assert [row["job_id"] for row in world.rows(ModelVersion) if row["job_id"]] == [job_id]
    assert world.count(TestPrediction) == 6


@pytest.mark.slow
@on_sqlite
def test_24_a_job_that_always_kills_its_worker_is_started_three_times_and_failed_with_the_reason(
    world: World, labelled_csv: Path
) -> None:
    job_id = world.submit(labelled_csv, epochs=3)
    for start in (1, 2, 3):
        wait_until(lambda: world.job(job_id).lease_expires_at is None or world.job(job_id).lease_expires_at < utc_now())
        world.killed_at("stepped=kill", "train")
        assert world.job(job_id).attempts == start
    with world.worker("train", "stepped=kill") as last:
        job = world.ends(job_id, "failed")
        assert last.alive
    assert job.attempts == 3
    assert "the worker that ran this job died 3 times" in job.error


@on_postgresql
def test_26_a_running_job_is_cancelled_within_a_few_steps(world: World, labelled_csv: Path) -> None:
    job_id = world.submit(labelled_csv, epochs=500)
    with world.worker("train"):
        wait_until(lambda: world.job(job_id).step > 0)
        with world.database.begin() as session:
            jobs.request_cancel(session, job_id)
        asked_at = world.job(job_id).step
        job = world.ends(job_id, "cancelled")
        checkpoints = world.settings.home / "jobs" / str(job_id)
        wait_until(lambda: not checkpoints.exists())
    assert job.step - asked_at < 500, "a fraction of the thousands there are"
    assert (job.error, job.step < job.total_steps) == (None, True)
    assert world.count(ModelVersion) == 1
    assert list(model_store(world.settings).folder.glob("*job-*")) == []


@on_sqlite
def test_27_a_checkpoint_torn_in_mid_write_or_flipped_is_passed_over_aloud(
    world: World, labelled_csv: Path, unbroken: Epochs
) -> None:
    job_id = world.submit(labelled_csv, epochs=3)
    kept = world.settings.home / "jobs" / str(job_id)
    world.killed_at("draft=kill~step-00000006", "train")
    steps = sorted(path.name for path in kept.glob("step-*"))
    assert list(kept.glob(".step-00000006*.draft")), "it was being written"
    newest = kept / steps[-1] / "model.safetensors"
    with newest.open("r+b") as file:
        file.seek(newest.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))
    with world.worker("train") as heir:
        job = world.ends(job_id, "succeeded")
        assert f"checkpoint {steps[-1]} cannot be used, trying the previous one" in heir.said()
        assert "sha256 differs" in heir.said()
        assert "resumes from step 2" in heir.said()
    assert job.attempts == 2
    assert world.epochs(job_id) == pytest.approx(unbroken, abs=1e-4)


def registered(world: World) -> list[str]:
    return sorted(map(repr, [row for table in (ModelVersion, TestMetric, TestPrediction) for row in world.rows(table)]))


@on_postgresql
def test_28_a_stale_trainer_that_wakes_and_wants_to_register_is_refused(world: World, labelled_csv: Path) -> None:
    job_id = world.submit(labelled_csv, epochs=2)
    with world.worker("train", "artifact=stop@1") as sleeper:
        wait_until(lambda: sleeper.stopped)
        assert world.finishes(job_id).fencing_token == 2
        before = registered(world)
        sleeper.send(signal.SIGCONT)
        wait_for_log(sleeper, f"job {job_id} was taken over by another worker; this one stops")
    assert registered(world) == before
    assert [path.name for path in model_store(world.settings).folder.glob("*job-*")] == [f"job-{job_id}-2"]
