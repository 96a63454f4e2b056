"""The job protocol: who may claim, who may write, when a job ends and how it is cancelled."""

import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import text

from db import jobs
from db.errors import LeaseLost, NotFound
from db.models import utc_now
from db.session import Database, open_database
from tests.conftest import PATIENCE_SECONDS, wait_until
from tests.support.job_rows import cancel, claim, claim_new, epoch_metric, lapse, read, row, submit


def somebody_waits(database: Database) -> bool:
    """Whether a transaction waits for another; SQLite keeps no list of them, its writers wait from the start."""
    if database.engine.dialect.name == "sqlite":
        return True
    with database.read() as session:
        return bool(session.scalar(text("SELECT count(*) FROM pg_locks WHERE NOT granted")))


def test_same_request_gets_the_job_it_already_has(database: Database) -> None:
    first = submit(database, "r", dataset="first.csv")
    claim(database)
    assert submit(database, "r", dataset="second.csv") == first
    assert submit(database, "other") != first
    job = read(database, first)
    assert (job.dataset, job.state) == ("first.csv", "running")


def test_same_request_sent_twice_at_once_makes_one_job(database: Database) -> None:
    with ThreadPoolExecutor(1) as pool:
        with database.begin() as session:
            first = jobs.submit(session, request_id="r", dataset="d", dataset_sha256=None, config={}).id
            second = pool.submit(submit, database, "r")
            wait_until(lambda: somebody_waits(database))
        assert second.result(timeout=PATIENCE_SECONDS) == first


def test_jobs_are_claimed_in_the_order_they_came(database: Database) -> None:
    submitted = [submit(database, str(i)) for i in range(3)]
    assert [claim(database).id for _ in submitted] == submitted
    assert claim(database) is None


def test_claim_sets_lease_token_attempt_and_start(database: Database) -> None:
    submit(database)
    before = utc_now()
    job = read(database, claim(database, owner="host-1", lease_seconds=60).id)
    assert (job.state, job.lease_owner, job.fencing_token, job.attempts) == ("running", "host-1", 1, 1)
    assert before <= job.started_at <= utc_now()
    assert before + timedelta(seconds=60) <= job.lease_expires_at <= utc_now() + timedelta(seconds=60)


def test_running_job_is_claimable_only_once_its_lease_lapses(database: Database) -> None:
    job_id = submit(database)
    started = claim(database, "a").started_at
    with database.read() as session:
        assert not jobs.any_claimable(session)
    assert claim(database, "b") is None

    lapse(database, job_id)
    with database.read() as session:
        assert jobs.any_claimable(session)
    taken = claim(database, "b")
    assert (taken.id, taken.lease_owner, taken.fencing_token, taken.attempts) == (job_id, "b", 2, 2)
    assert taken.started_at == started


WRITES: dict[str, Callable[[Any, int, int], object]] = {
    "renew_lease": lambda session, job, token: jobs.renew_lease(session, job, token, 60),
    "record_data": lambda session, job, token: jobs.record_data(session, job, token, "0" * 64, {"rows": 1}),
    "record_step": lambda session, job, token: jobs.record_step(session, job, token, 7, 9, 0.1),
    "record_epoch": lambda session, job, token: jobs.record_epoch(session, token, epoch_metric(job, 1)),
    "hold": lambda session, job, token: jobs.hold(session, job, token),
    "finish": lambda session, job, token: jobs.finish(session, job, token, "succeeded"),
    "release": lambda session, job, token: jobs.release(session, job, token),
}


@pytest.mark.parametrize("name", WRITES)
def test_stale_token_is_refused_and_writes_nothing(database: Database, name: str) -> None:
    job_id = submit(database)
    stale = claim(database, "a").fencing_token
    lapse(database, job_id)
    claim(database, "b")
    before = row(database, job_id)

    def write_with_the_old_token() -> None:
        with database.begin() as session:
            WRITES[name](session, job_id, stale)

    with pytest.raises(LeaseLost):
        write_with_the_old_token()
    assert row(database, job_id) == before


@pytest.mark.parametrize("state", ["succeeded", "failed", "cancelled"])
def test_finished_job_is_neither_claimed_nor_written_nor_cancelled(database: Database, state: str) -> None:
    job = claim_new(database)
    with database.begin() as session:
        jobs.finish(session, job.id, job.fencing_token, state, "why" if state == "failed" else None)
    before = row(database, job.id)
    assert (before["state"], before["lease_owner"], before["lease_expires_at"]) == (state, None, None)
    assert before["finished_at"] is not None

    assert claim(database) is None
    with pytest.raises(LeaseLost), database.begin() as session:
        jobs.record_step(session, job.id, job.fencing_token, 1, 2, None)
    cancel(database, job.id)
    assert row(database, job.id) == before


def test_job_whose_workers_keep_dying_fails_with_the_reason_and_the_next_is_claimed(database: Database) -> None:
    killer = submit(database, "killer")
    for attempt in (1, 2, 3):
        assert claim(database, f"worker-{attempt}").attempts == attempt
        lapse(database, killer)
    harmless = submit(database, "harmless")
    assert claim(database).id == harmless
    assert read(database, killer).state == "running", "its last worker has a lease's time to be heard"
    lapse(database, killer)
    assert claim(database) is None
    job = read(database, killer)
    assert (job.state, job.attempts) == ("failed", 3)
    assert "3 times" in job.error
    assert "worker-3" in job.error
    assert job.finished_at is not None


def test_clean_stops_do_not_count_as_attempts(database: Database) -> None:
    submit(database)
    for token in range(1, 7):
        job = claim(database, max_attempts=2)
        assert (job.fencing_token, job.attempts) == (token, 1)
        with database.begin() as session:
            jobs.release(session, job.id, token)
        released = read(database, job.id)
        assert (released.state, released.lease_owner, released.attempts) == ("queued", None, 0)


def test_cancelled_queued_job_is_never_claimed(database: Database) -> None:
    job_id = submit(database)
    assert cancel(database, job_id).state == "cancelled"
    assert claim(database) is None
    job = read(database, job_id)
    assert (job.state, job.attempts) == ("cancelled", 0)
    assert job.finished_at is not None


def test_cancel_that_meets_a_claim_asks_the_new_owner(database: Database) -> None:
    job_id = submit(database)
    with ThreadPoolExecutor(1) as pool:
        with database.begin() as session:
            token = jobs.claim(session, owner="a", lease_seconds=60, max_attempts=3).fencing_token
            cancelling = pool.submit(cancel, database, job_id)
            wait_until(lambda: somebody_waits(database))
        cancelling.result(timeout=PATIENCE_SECONDS)
    assert (read(database, job_id).state, read(database, job_id).cancel_requested) == ("running", True)
    with database.begin() as session:
        assert jobs.renew_lease(session, job_id, token, 60)


@pytest.mark.parametrize("ending", ["lapsed", "released"])
def test_job_asked_to_stop_is_not_started_again(database: Database, ending: str) -> None:
    job = claim_new(database)
    cancel(database, job.id)
    if ending == "lapsed":
        lapse(database, job.id)
    else:
        with database.begin() as session:
            jobs.release(session, job.id, job.fencing_token)
    assert claim(database) is None
    assert read(database, job.id).state == "cancelled"


def test_unknown_job_is_named(database: Database) -> None:
    with pytest.raises(NotFound, match="4711"), database.read() as session:
        jobs.get(session, 4711)
    with pytest.raises(NotFound, match="4711"):
        cancel(database, 4711)


def test_epoch_that_runs_again_replaces_its_row(database: Database) -> None:
    job = claim_new(database)
    for epoch, loss in ((1, 0.9), (2, 0.8), (3, 0.7), (2, 0.1)):
        with database.begin() as session:
            jobs.record_epoch(session, job.fencing_token, epoch_metric(job.id, epoch, train_loss=loss))
    with database.begin() as session:
        jobs.forget_epochs_after(session, job.id, 2)
    with database.read() as session:
        assert [(m.epoch, m.train_loss) for m in jobs.epochs(session, job.id)] == [(1, 0.9), (2, 0.1)]


def test_claimers_at_once_never_get_the_same_job(database: Database) -> None:
    submitted = [submit(database, str(i)) for i in range(24)]
    start = threading.Barrier(4)

    def claim_all(owner: str) -> list[int]:
        url = database.engine.url.render_as_string(hide_password=False)
        own, claimed = open_database(url), []
        start.wait(timeout=PATIENCE_SECONDS)
        while (job := claim(own, owner)) is not None:
            claimed.append(job.id)
        own.close()
        return claimed

    with ThreadPoolExecutor(4) as pool:
        claimed = [job_id for ids in pool.map(claim_all, "abcd") for job_id in ids]
    assert sorted(claimed) == submitted
    assert Counter((job.attempts, job.fencing_token) for job in (read(database, i) for i in submitted)) == {(1, 1): 24}


def test_lapsed_job_is_taken_over_by_only_one_of_many(database: Database) -> None:
    job = claim_new(database)
    for token in range(2, 8):
        lapse(database, job.id)
        with ThreadPoolExecutor(4) as pool:
            taken = list(pool.map(lambda owner: claim(database, owner, max_attempts=99), "abcd"))
        assert [job.fencing_token for job in taken if job] == [token]
