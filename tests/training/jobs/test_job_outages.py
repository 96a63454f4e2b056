"""Jobs while the database or a store is unavailable: an outage is not a failed start, and no model is lost."""

import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from db import jobs, migrate, registry
from db import session as db_session
from db.models import EpochMetric, ModelVersion, utc_now
from db.session import Database, open_database
from tests.conftest import PATIENCE_SECONDS, wait_until
from tests.support.job_rows import claim, lapse
from tests.support.lossy import Door
from tests.support.outages import breakable
from tests.support.s3 import S3, s3_server
from tests.support.training_jobs import NEVER, count, job_of, left_in, running, shorten, submit
from tests.support.world import on_postgresql
from training.jobs.context import TrainingContext
from training.jobs.inputs import store_dataset
from training.jobs.run import run_next_job
from training.jobs.unregistered_artifacts import remove_unregistered_artifacts
from training.model.artifact import load_artifact
from training.store.cache import Cache
from training.store.paths import file_sha256
from training.store.store import Store

MODEL = b"INSERT INTO model_versions"
CLAIM = b"attempts=$"
END = b"finished_at=$"


@pytest.fixture
def through(database: Database, database_url: str) -> Iterator[SimpleNamespace]:
    """One PostgreSQL database twice: `near`, which is always available, and `far`, through a proxy that can fail."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ts", dir="/tmp")))
        door = Door(database_url, folder)
        stack.callback(door.end)
        far = open_database(door.url)
        stack.callback(far.close)
        yield SimpleNamespace(door=door, near=database, far=far)


def artifacts(context: TrainingContext) -> list[str]:
    return left_in(context.model_store.folder)


def is_whole(database: Database, context: TrainingContext, job_id: int) -> bool:
    """Whether the job succeeded and registered one model, which can be loaded from the only artifact in the store."""
    job = job_of(database, job_id)
    with database.read() as session:
        version = registry.of_job(session, job_id)
        assert version is not None
        assert (job.state, job.error, count(database, ModelVersion)) == ("succeeded", None, 1)
        (name,) = artifacts(context)
        load_artifact(context.model_store.folder / name, version.sha256)
        return version.artifact_url.endswith(f"/{name}")


# --- the database becomes unavailable during a job


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)])
def outage(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Database, Callable[[], Any]]]:
    """A database, and a way to make it unavailable for the time of a block."""
    monkeypatch.setattr(db_session, "BUSY_TIMEOUT_MS", 200)  # instead of 30 s each time
    with ExitStack() as stack:
        url, away = breakable(request.param, tmp_path, stack)
        database = open_database(url)
        stack.callback(database.close)
        migrate.upgrade(database)
        yield database, away


def test_more_outages_of_the_database_than_a_job_has_starts_do_not_even_interrupt_it(
    outage: Any,
    context: TrainingContext,
    labelled_csv: Path,
    base: dict[str, Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    database, away = outage
    context = replace(context, lease_seconds=1.5, max_attempts=1)
    job_id = submit(database, labelled_csv, **{**base, "epochs": 1000})
    stopping = threading.Event()
    with running(database, context, job_id, stopping):
        for _ in range(2):
            before = count(database, EpochMetric)
            wait_until(lambda before=before: count(database, EpochMetric) > before)
            caplog.clear()
            with away():
                wait_until(lambda: caplog.text.count("heartbeat could not be written") > 1)
        before = count(database, EpochMetric)
        wait_until(lambda: count(database, EpochMetric) > before)
        assert (job_of(database, job_id).attempts, job_of(database, job_id).fencing_token) == (1, 1)
        stopping.set()
    shorten(database, job_id, count(database, EpochMetric) + 1)
    assert run_next_job(database, context, "here", NEVER) == job_id
    assert job_of(database, job_id).attempts == 1
    assert is_whole(database, context, job_id)
    with database.read() as session:
        done = [epoch.epoch for epoch in jobs.epochs(session, job_id)]
    assert done == list(range(1, len(done) + 1)), "epochs during the outages are recorded too"


@pytest.mark.slow
@pytest.mark.parametrize("outage", ["postgresql"], indirect=True)
def test_a_worker_told_to_end_while_the_database_is_away_ends_at_once_and_the_next_gives_the_job_back(
    outage: Any,
    context: TrainingContext,
    labelled_csv: Path,
    base: dict[str, Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    database, away = outage
    context = replace(context, max_attempts=1, lease_seconds=1.5)
    job_id = submit(database, labelled_csv, **{**base, "epochs": 1000})
    stopping = threading.Event()
    with ExitStack() as gone:
        with running(database, context, job_id, stopping):
            wait_until(lambda: count(database, EpochMetric) > 0)
            gone.enter_context(away())
            wait_until(lambda: "could not be written" in caplog.text)
            stopped_at = time.monotonic()
            stopping.set()
        assert time.monotonic() - stopped_at < 20, "of a grace period of thirty"
        assert run_next_job(database, context, "here", NEVER) is None, "the database does not answer"
    assert left_in(context.jobs_folder / str(job_id))[-1] == "stopped-1"
    job = job_of(database, job_id)
    assert (job.state, job.attempts) == ("running", 1)
    shorten(database, job_id, 2)
    assert run_next_job(database, context, "next", NEVER) == job_id
    assert (job_of(database, job_id).attempts, job_of(database, job_id).fencing_token) == (1, 2)
    assert is_whole(database, context, job_id)


@pytest.mark.slow
@on_postgresql
def test_a_start_whose_job_was_taken_over_during_an_outage_of_its_own_is_taken_off_the_count(
    through: SimpleNamespace, context: TrainingContext, labelled_csv: Path, base: dict[str, Any],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """It happens three times, more than the two starts allowed; the other worker releases the job each time."""
    context = replace(context, lease_seconds=1.5, max_attempts=2)
    job_id = submit(through.near, labelled_csv, **{**base, "epochs": 1000})
    for _ in range(3):
        with running(through.far, context, job_id, threading.Event()):
            wait_until(lambda: job_of(through.near, job_id).state == "running")
            caplog.clear()
            with through.door.shut():
                wait_until(lambda: "could not be written" in caplog.text)
                lapse(through.near, job_id)
                taken = claim(through.near, "another")
                assert (taken.id, taken.attempts) == (job_id, 2)
            wait_until(lambda: job_of(through.near, job_id).attempts == 1)
        with through.near.begin() as session:
            jobs.release(session, job_id, taken.fencing_token)
        assert job_of(through.near, job_id).attempts == 0
    shorten(through.near, job_id, 2)
    run_next_job(through.far, context, "here", NEVER)
    assert is_whole(through.near, context, job_id)


def test_the_last_start_of_a_job_is_heard_before_it_fails(database: Database) -> None:
    """The lease lapsed while the database was unavailable, and its owner renews it after another worker looked."""
    job_id = submit(database, Path("d.csv"))
    token = claim(database, "here", max_attempts=1).fencing_token
    lapse(database, job_id)
    assert claim(database, "there", max_attempts=1) is None
    assert job_of(database, job_id).state == "running"
    with database.begin() as session:
        jobs.renew_lease(session, job_id, token, 60)
    assert job_of(database, job_id).error is None
    for state in ("running", "failed"):
        lapse(database, job_id)
        assert claim(database, "there", max_attempts=1) is None
        assert job_of(database, job_id).state == state
    assert "the worker that ran this job died 1 times (last owner here)" in job_of(database, job_id).error


def test_a_start_is_not_excused_from_a_count_that_began_anew(database: Database) -> None:
    job_id = submit(database, Path("d.csv"))
    first = claim(database)
    with database.begin() as session:
        jobs.finish(session, job_id, first.fencing_token, "failed", "why")
        jobs.retry(session, job_id)
    second = claim(database)
    with database.begin() as session:
        assert not jobs.excuse(session, job_id, first.fencing_token, first.started_at)
    assert (second.attempts, job_of(database, job_id).attempts) == (1, 1)


# --- an answer is lost

either_is_lost = pytest.mark.parametrize("answer", [True, False], ids=["the answer is lost", "the commit is lost"])
either_is_lost_one_slowly = pytest.mark.parametrize(
    "answer",
    [
        pytest.param(True, id="the answer is lost"),
        pytest.param(False, id="the commit is lost", marks=pytest.mark.slow),
    ],
)


@on_postgresql
@either_is_lost_one_slowly
def test_a_model_whose_commit_got_no_answer_is_registered_once_and_keeps_its_artifact(
    through: SimpleNamespace, context: TrainingContext, labelled_csv: Path, base: dict[str, Any], answer: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    job_id = submit(through.near, labelled_csv, **base)
    through.door.lose(MODEL, answer)
    caplog.set_level("INFO")
    assert run_next_job(through.far, context, "here", NEVER) == job_id
    assert through.door.lost.is_set()
    assert is_whole(through.near, context, job_id)
    assert f"job {job_id}: succeeded, model" in caplog.text
    assert not [said for said in ("taken over", f"job {job_id}: failed") if said in caplog.text]
    assert left_in(context.jobs_folder) == []
    assert artifacts(context) == [f"job-{job_id}-1"]


@on_postgresql
@either_is_lost_one_slowly
def test_an_artifact_nobody_can_tell_of_stays_until_somebody_can(
    through: SimpleNamespace, context: TrainingContext, labelled_csv: Path, base: dict[str, Any], answer: bool,
) -> None:  # fmt: skip
    job_id = submit(through.near, labelled_csv, **base)
    through.door.lose(MODEL, answer, then_shut=True)
    stopping = threading.Event()
    thread = threading.Thread(target=run_next_job, args=(through.far, context, "here", stopping))
    thread.start()
    assert through.door.lost.wait(PATIENCE_SECONDS)
    stopping.set()
    thread.join(PATIENCE_SECONDS)
    assert artifacts(context) == [f"job-{job_id}-1"]
    through.door.open()
    wait_until(lambda: job_of(through.near, job_id).state == ("succeeded" if answer else "running"))
    assert run_next_job(through.far, context, "next", NEVER) == (None if answer else job_id)
    assert is_whole(through.near, context, job_id)
    assert artifacts(context) == [f"job-{job_id}-{1 if answer else 2}"]
    assert job_of(through.near, job_id).attempts == 1


@on_postgresql
@either_is_lost
def test_a_claim_without_an_answer_is_one_start_or_none(
    through: SimpleNamespace, context: TrainingContext, unreadable_csv: Path, answer: bool
) -> None:
    job_id = submit(through.near, unreadable_csv)
    through.door.lose(CLAIM, answer)
    assert run_next_job(through.far, context, "here", NEVER) == (job_id if answer else None)
    assert through.door.lost.is_set()
    if not answer:
        assert run_next_job(through.far, context, "here", NEVER) == job_id
    job = job_of(through.near, job_id)
    assert (job.attempts, job.fencing_token, job.state) == (1, 1, "failed")
    assert "row 2 of bytes.csv" in job.error, "it ran to its end"


@on_postgresql
@either_is_lost
def test_a_failure_without_an_answer_is_written_once(
    through: SimpleNamespace,
    context: TrainingContext,
    unreadable_csv: Path,
    answer: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    job_id = submit(through.near, unreadable_csv)
    through.door.lose(END, answer)
    caplog.set_level("INFO")
    assert run_next_job(through.far, context, "here", NEVER) == job_id
    assert through.door.lost.is_set()
    assert job_of(through.near, job_id).state == "failed"
    assert "row 2 of bytes.csv" in job_of(through.near, job_id).error
    assert f"job {job_id}: failed" in caplog.text
    assert "taken over" not in caplog.text


# --- artifacts that were never registered


def test_what_an_ended_job_never_registered_is_removed_and_nothing_else(
    sqlite: Database,
    context: TrainingContext,
    labelled_csv: Path,
    base: dict[str, Any],
) -> None:
    store = context.model_store
    registered = submit(sqlite, labelled_csv, **base)
    run_next_job(sqlite, context, "here", NEVER)
    cancelled, runs = submit(sqlite, labelled_csv), submit(sqlite, labelled_csv)
    assert claim(sqlite).id == cancelled
    lapse(sqlite, cancelled)
    with sqlite.begin() as session:
        jobs.request_cancel(session, cancelled)
    assert claim(sqlite).id == runs
    stay = [f"job-{registered}-1", f"job-{registered}-1.engines", f"job-{runs}-1", "job-999-1", "job-mine", "tiny"]
    go = [f"job-{registered}-0", f"job-{cancelled}-1", f".job-{cancelled}-1.draft", f"job-{cancelled}-1.engines"]
    for name in stay + go:
        (store.folder / name).mkdir(exist_ok=True)
    remove_unregistered_artifacts(sqlite, store, runs)
    assert artifacts(context) == sorted(stay + go)
    remove_unregistered_artifacts(sqlite, store)
    assert artifacts(context) == sorted(stay)
    assert job_of(sqlite, cancelled).state == "cancelled"


# --- a store is unavailable


@pytest.fixture
def fragile() -> Iterator[S3]:
    with s3_server() as server:
        yield server


@pytest.mark.slow
def test_more_outages_of_a_store_than_a_job_has_starts_do_not_fail_it_and_other_jobs_go_on(
    fragile: S3,
    context: TrainingContext,
    tmp_path: Path,
    sqlite: Database,
    labelled_csv: Path,
    base: dict[str, Any],
) -> None:
    inputs = Store(fragile.url("data"), Cache(tmp_path / "cache", 10**9))
    context = replace(context, input_store=inputs, max_attempts=2)
    waits = submit(sqlite, Path("x"), file_sha256(labelled_csv), **base)
    with sqlite.begin() as session:
        jobs.get(session, waits).dataset = store_dataset(inputs, labelled_csv)
    other = submit(sqlite, labelled_csv, **base)
    fragile.kill()
    pauses = []
    for _ in range(4):
        assert run_next_job(sqlite, context, "here", NEVER) == waits
        job = job_of(sqlite, waits)
        assert (job.state, job.attempts, job.lease_owner) == ("queued", 0, None)
        assert "waiting: s3://tweetscore/data does not answer" in job.error
        pauses.append((job.lease_expires_at - utc_now()).total_seconds())
        if len(pauses) == 1:
            assert run_next_job(sqlite, context, "here", NEVER) == other, "this job needs no store"
        else:
            assert run_next_job(sqlite, context, "here", NEVER) is None, "the job is not claimed again at once"
        lapse(sqlite, waits)
    assert job_of(sqlite, other).state == "succeeded"
    assert 35 < pauses[-1] <= 40, "the pause doubles: 5, 10, 20, 40 s"
    fragile.start()
    store_dataset(inputs, labelled_csv)
    assert run_next_job(sqlite, context, "here", NEVER) == waits
    job = job_of(sqlite, waits)
    assert (job.state, job.error, job.attempts) == ("succeeded", None, 1)
    assert not context.outages
