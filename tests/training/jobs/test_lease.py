"""The lease of a job: its heartbeat renews it, and its worker notices when another one has taken it."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import pytest
from sqlalchemy import text

from db import jobs
from db.errors import LeaseLost
from db.models import TrainingJob, utc_now
from db.session import Database
from tests.conftest import PATIENCE_SECONDS, wait_until
from tests.support.job_rows import cancel, claim, claim_new, lapse, read, row, submit
from tests.support.paths import ROOT
from tests.support.world import on_postgresql, on_sqlite
from training.errors import Cancelled, StopRequested
from training.jobs.lease import Lease

# Claims a job, prints its token, and works on it until the lease is lost.
TRAINER = """
import sys, threading, time
from db import jobs
from db.errors import LeaseLost
from db.session import open_database
from training.jobs.lease import Lease

database = open_database(sys.argv[1])
lease_seconds = float(sys.argv[2])
with database.begin() as session:
    job = jobs.claim(session, owner="trainer", lease_seconds=lease_seconds, max_attempts=3)
print(job.id, job.fencing_token, flush=True)
step = 0
try:
    with Lease(database, job.id, job.fencing_token, lease_seconds, threading.Event()) as lease:
        while True:
            step += 1
            lease.step(step, 10**9, 0.5)
            time.sleep(0.01)
except LeaseLost as error:
    print("lost:", error, flush=True)
"""


@contextmanager
def trainer(database: Database, lease_seconds: float) -> Iterator[subprocess.Popen[str]]:
    url = database.engine.url.render_as_string(hide_password=False)
    process = subprocess.Popen(
        [sys.executable, "-c", TRAINER, url, str(lease_seconds)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@contextmanager
def lease_of(database: Database, job: TrainingJob, lease_seconds: float = 60) -> Iterator[Lease]:
    with Lease(database, job.id, job.fencing_token, lease_seconds, threading.Event()) as lease:
        yield lease


def raises(error: type[Exception], check: Callable[[], None]) -> bool:
    try:
        check()
    except error:
        return True
    return False


def test_cancelled_running_job_goes_on_until_its_worker_stops(database: Database) -> None:
    job = claim_new(database)
    assert cancel(database, job.id).state == "running"
    with lease_of(database, job) as lease, pytest.raises(Cancelled):
        lease.step(3, 10, 0.5)
    with database.begin() as session:
        jobs.finish(session, job.id, job.fencing_token, "cancelled")
    assert (read(database, job.id).state, read(database, job.id).step) == ("cancelled", 3)


@on_sqlite
def test_heartbeat_keeps_a_lease_past_its_length(database: Database) -> None:
    job = claim_new(database, lease_seconds=3)
    ends = job.lease_expires_at
    with lease_of(database, job, lease_seconds=3) as lease:
        wait_until(lambda: utc_now() > ends + timedelta(seconds=0.5))
        assert claim(database, "thief") is None
        lease.check()
    assert read(database, job.id).fencing_token == job.fencing_token


def test_heartbeat_ends_with_the_work(database: Database) -> None:
    job = claim_new(database)
    with lease_of(database, job):
        assert f"lease-{job.id}" in {thread.name for thread in threading.enumerate()}
    assert f"lease-{job.id}" not in {thread.name for thread in threading.enumerate()}


def test_heartbeat_notices_a_takeover_and_a_cancellation_between_steps(database: Database) -> None:
    job = claim_new(database)
    with lease_of(database, job, lease_seconds=0.3) as lease:
        cancel(database, job.id)
        wait_until(lambda: raises(Cancelled, lease.check))
    with lease_of(database, job, lease_seconds=0.3) as lease:
        with database.begin() as session:
            jobs.get(session, job.id).fencing_token += 1  # what a claim by another worker does
        wait_until(lambda: raises(LeaseLost, lease.check))


def test_step_of_a_job_taken_over_is_refused_at_once(database: Database) -> None:
    job = claim_new(database)
    lapse(database, job.id)
    claim(database, "b")
    with lease_of(database, job) as lease, pytest.raises(LeaseLost):
        lease.step(5, 10, 0.5)
    assert read(database, job.id).step == 0


def test_worker_that_must_stop_is_stopped_at_its_next_check(sqlite: Database) -> None:
    job, stopping = claim_new(sqlite), threading.Event()
    with Lease(sqlite, job.id, job.fencing_token, 60, stopping) as lease:
        lease.check()
        stopping.set()
        with pytest.raises(StopRequested):
            lease.check()


def test_heartbeat_outlives_a_database_that_fails_for_a_while(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    def rename(old: str, new: str) -> None:
        with database.begin() as session:
            session.execute(text(f"ALTER TABLE {old} RENAME TO {new}"))

    job = claim_new(database, lease_seconds=0.6)
    with lease_of(database, job, lease_seconds=0.6) as lease:
        rename("training_jobs", "away")
        wait_until(lambda: "heartbeat could not be written" in caplog.text)
        rename("away", "training_jobs")
        expired = read(database, job.id).lease_expires_at
        wait_until(lambda: read(database, job.id).lease_expires_at > expired)
        lease.check()


@on_postgresql
def test_trainer_that_wakes_after_its_lease_was_taken_stops_and_writes_nothing(database: Database) -> None:
    job_id = submit(database)
    with trainer(database, lease_seconds=3) as process:
        assert process.stdout.readline().split() == [str(job_id), "1"]
        wait_until(lambda: read(database, job_id).step > 0)
        os.kill(process.pid, signal.SIGSTOP)
        wait_until(lambda: claim(database, "successor") is not None)
        before = row(database, job_id)
        os.kill(process.pid, signal.SIGCONT)
        assert process.stdout.readline().startswith(f"lost: job {job_id} ")
        assert process.wait(timeout=PATIENCE_SECONDS) == 0
    assert row(database, job_id) == before
