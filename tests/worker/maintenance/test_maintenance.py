"""What is cleared away by the clock: beside the work, a portion at a time, and nothing that is still needed."""

import json
import subprocess
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event, func, select, text

from db import jobs, predictions
from db.admin import upkeep
from db.errors import DatabaseError
from db.models import DeadLetter, ScoringWindow, SentimentRollup, TrainingJob, Tweet, utc_now
from db.session import Database, open_database
from tests.conftest import PATIENCE_SECONDS, wait_until
from tests.support.actors import wait_for_log
from tests.support.bench import wire
from tests.support.rows import (
    SUMS,
    answer,
    assert_counted,
    letter_row,
    make_version,
    prediction_row,
    run,
    some,
    tweet_row,
    url_of,
    write,
)
from tests.support.world import World, on_postgresql, on_sqlite
from training.jobs.expired_checkpoints import remove_expired_checkpoints
from training.store.cache import Cache
from training.store.store import Store
from worker.maintenance import maintenance_thread
from worker.maintenance.deletion import DeletedCounts
from worker.maintenance.maintenance_thread import MaintenanceThread, maintenance_lock
from worker.maintenance.retention import NEVER, apply_retention, compact_sums, delete_old_windows

Run = Callable[..., subprocess.CompletedProcess[str]]


# --- retention


def test_retention_deletes_what_came_in_long_ago(database: Database) -> None:
    version = make_version(database)
    old, new = datetime.now(UTC) - timedelta(days=31), datetime.now(UTC) - timedelta(days=29)
    write(
        database,
        [tweet_row("1", received_at=old), tweet_row("2", received_at=new, tweet_created_at=old)],
        [prediction_row("1", version), prediction_row("2", version)],
    )
    with database.begin() as session:
        predictions.bury(session, [letter_row("1-0", buried_at=old), letter_row("2-0", buried_at=new)])
    assert_counted(database)
    sums = answer(database, SUMS)
    assert apply_retention(database.begin, 30, NEVER) == DeletedCounts(0, 1, 1)
    assert apply_retention(database.begin, 30, NEVER) == DeletedCounts(0, 0, 0)
    assert answer(database, "SELECT tweet_id FROM predictions") == [("2",)]
    assert answer(database, SUMS) == sums, "the sums outlive the tweets"


@on_sqlite
def test_a_file_becomes_shorter_when_retention_has_deleted_rows(database: Database) -> None:
    old_tweets(database, 5_000)
    pages = pragma(database, "page_count")
    apply_retention(database.begin, 1, NEVER)
    assert pragma(database, "freelist_count") == 0
    assert pragma(database, "page_count") < pages / 2


def pragma(database: Database, name: str) -> int:
    with database.engine.connect() as connection:
        return int(connection.exec_driver_sql(f"PRAGMA {name}").scalar_one())


@pytest.mark.slow
@on_sqlite
def test_a_worker_applies_the_retention(world: World) -> None:
    """A scoring worker with nothing to do deletes what was kept too long."""
    write(world.database, [tweet_row("1", received_at=datetime.now(UTC) - timedelta(days=2))], [])
    with world.worker(retention_days=1) as worker:
        wait_for_log(worker, "retention of 1 days: 1 tweets")
    assert tweets_in(world.database) == 0


def tweets_in(database: Database) -> int:
    with database.read() as session:
        return session.scalar(select(func.count()).select_from(Tweet)) or 0


def old_tweets(database: Database, count: int) -> None:
    """Tweets of sixty days ago, fast."""
    then = {
        "sqlite": "strftime('%Y-%m-%dT%H:%M:%S', 'now', '-60 days', '+' || (i % 86400) || ' seconds') || '.000000Z'",
        "postgresql": "now() - interval '60 days' + (i % 86400) * interval '1 second'",
    }
    run(
        database,
        f"""WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {count})
        INSERT INTO tweets (tweet_id, text, received_at) SELECT 'x' || i, '雨', {then[database.engine.dialect.name]}
        FROM n""",
    )


def test_an_idle_worker_scores_a_bare_xadd_while_retention_works(world: World, report: Callable[[str], None]) -> None:
    old_tweets(world.database, 200_000)
    with world.worker(retention_days=1):
        wait_until(lambda: tweets_in(world.database) < 200_000)
        for number in (1, 2):  # the first also waits for the model
            began = time.monotonic()
            world.raw.xadd(world.stream.key, {"tweet": wire(number)})
            wait_until(lambda number=number: world.predictions() == number)
        took, left = time.monotonic() - began, tweets_in(world.database)
    assert left > 100, "retention was done before anything was scored"
    report(f"with {left:,} old tweets left to delete a bare XADD had its row after {took:.2f} s")


@pytest.mark.parametrize("what", [Tweet, DeadLetter, ScoringWindow])
def test_a_portion_is_taken_from_an_index_and_nothing_is_sorted(database: Database, what: Any) -> None:
    delete = {
        Tweet: upkeep.delete_received_before,
        DeadLetter: upkeep.delete_buried_before,
        ScoringWindow: upkeep.delete_windows_before,
    }[what]
    fill = {Tweet: old_tweets, DeadLetter: old_letters, ScoringWindow: old_windows}[what]
    fill(database, 5_000)
    run(database, "ANALYZE")
    asked: list[tuple[str, Any]] = []
    event.listen(database.engine, "before_cursor_execute", lambda c, cu, sql, values, *_: asked.append((sql, values)))
    with database.begin() as session:
        assert delete(session, utc_now() - timedelta(days=1), limit=100) == 100
        sql, values = next((sql, values) for sql, values in asked if sql.startswith("SELECT"))
        how = "EXPLAIN QUERY PLAN" if database.engine.dialect.name == "sqlite" else "EXPLAIN"
        plan = "\n".join(str(row) for row in session.connection().exec_driver_sql(f"{how} {sql}", values))
    assert f"ix_{what.__tablename__}_" in plan or "tweets_other_received_at_idx" in plan
    assert "Sort" not in plan
    assert "TEMP B-TREE" not in plan


def old_letters(database: Database, count: int) -> None:
    with database.begin() as session:
        predictions.bury(session, [letter_row(f"{i}-0", other_fields=None) for i in range(count)])


def old_windows(database: Database, count: int, **more: Any) -> None:
    version = make_version(database)
    stages = dict.fromkeys(("read_ms", "tokenise_ms", "forward_ms", "store_ms"), 1.0)
    counts = dict.fromkeys(("tweets", "buried", "tokens", "padded_tokens"), 1)
    row = {"worker": "w", "model_version_id": version, **stages, **counts, **more}
    with database.begin() as session:
        for i in range(count):
            when = utc_now() - timedelta(days=60, seconds=i)
            session.add(ScoringWindow(**{"started_at": when, **row}))


def test_windows_are_forgotten_after_their_days(database: Database) -> None:
    old_windows(database, 1_200)
    old_windows(database, 3, started_at=utc_now() - timedelta(days=29))
    assert delete_old_windows(database.begin, 30, NEVER) == 1_200
    assert delete_old_windows(database.begin, 30, NEVER) == 0
    assert answer(database, "SELECT count(*) FROM scoring_windows") == [(3,)]


# --- sums


def sums(database: Database) -> list[SentimentRollup]:
    with database.read() as session:
        return list(session.scalars(select(SentimentRollup)))


def test_sums_of_every_connection_are_folded_into_one_row_a_key(database: Database) -> None:
    version = make_version(database)
    for start in range(0, 200, 20):
        write(database, *some(version, range(start, start + 20)))
        database.engine.dispose()  # the next has a connection of its own
    keys = {(row.hour, row.topic, row.label) for row in sums(database)}
    if database.engine.dialect.name == "postgresql":
        assert len(sums(database)) > len(keys)
    for _ in range(2):
        compact_sums(database.begin, NEVER)
        assert [row.shard for row in sums(database)] == [0] * len(keys)
        assert answer(database, "SELECT DISTINCT shard FROM drift_rollup") == [(0,)]
        assert_counted(database)
    run(database, "DELETE FROM tweets")
    compact_sums(database.begin, NEVER)
    assert sums(database) == answer(database, "SELECT * FROM drift_rollup") == []


@on_postgresql
def test_a_sum_of_nothing_is_kept_while_a_connection_has_the_other_half(database: Database) -> None:
    """What came and went in one connection folds to no tweets, and what it replaced is another's, who holds its row."""
    version = make_version(database)
    write(database, [tweet_row("1"), tweet_row("2")], [prediction_row("1", version, probability=0.9)])
    [first] = sums(database)
    database.engine.dispose()
    run(database, "DELETE FROM predictions")
    write(database, [], [prediction_row("2", version, probability=0.6)])
    with database.begin() as holding:
        holding.execute(text(f"SELECT 1 FROM sentiment_rollup WHERE shard = {first.shard} FOR UPDATE"))
        compact_sums(database.begin, NEVER)
    assert {row.shard: row.tweets for row in sums(database)} == {0: 0, first.shard: 1}
    assert_counted(database)
    compact_sums(database.begin, NEVER)
    assert {row.shard: row.tweets for row in sums(database)} == {0: 1}
    assert_counted(database)


@on_postgresql
def test_readers_and_writers_never_meet_half_a_fold(database: Database) -> None:
    version = make_version(database)
    done = threading.Event()

    def score(number: int) -> None:
        mine = open_database(url_of(database))
        for start in range(0, 400, 20):
            write(mine, *some(version, range(10_000 * number + start, 10_000 * number + start + 20)))
        mine.close()

    def keep(task: Callable[[], object]) -> None:
        while not done.is_set():
            task()

    def look() -> None:
        [(counted, there)] = answer(
            database,
            "SELECT (SELECT coalesce(sum(tweets), 0) FROM sentiment_rollup), (SELECT count(*) FROM predictions)",
        )
        assert counted == there

    def tidy() -> None:
        compact_sums(database.begin, NEVER)

    with ThreadPoolExecutor(6) as pool:
        others = [pool.submit(keep, task) for task in (look, tidy, tidy)]  # two that do not know of each other
        try:
            list(pool.map(score, range(1, 4)))
        finally:
            done.set()
        for other in others:
            other.result()
    assert_counted(database)
    compact_sums(database.begin, NEVER)
    assert {row.shard for row in sums(database)} == {0}
    assert_counted(database)


# --- the thread


def test_a_chore_that_fails_is_said_and_tried_again_and_others_are_done(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(maintenance_thread, "RETRY_SECONDS", 0.05)
    stopping, done = threading.Event(), []

    def failing() -> bool:
        done.append("failing")
        if len(done) < 4:
            raise DatabaseError("it is away") if len(done) < 3 else ZeroDivisionError
        return True

    def fine() -> bool:
        done.append("fine")
        return True

    keeper = MaintenanceThread([failing, fine], stopping)
    keeper.start()
    wait_until(lambda: done.count("failing") == 3)
    assert done.count("fine") == 1
    assert "trying again in 0.05 s: it is away" in caplog.text
    assert "ZeroDivisionError" in caplog.text
    stopping.set()
    keeper._thread.join(PATIENCE_SECONDS)
    assert not keeper._thread.is_alive()


def test_one_worker_keeps_house_at_a_time(database: Database, tmp_path: Path) -> None:
    other = open_database(url_of(database))
    with suppress(ZeroDivisionError), maintenance_lock(database, tmp_path) as mine:
        assert mine is not None
        with mine() as session:
            session.execute(text("DELETE FROM tweets"))
        with maintenance_lock(other, tmp_path) as theirs:
            assert theirs is None
        raise ZeroDivisionError
    with maintenance_lock(other, tmp_path) as theirs:
        assert theirs is not None
    other.close()


# --- checkpoints


def job_in(database: Database, state: str, days_ago: float = 0) -> int:
    with database.begin() as session:
        job = jobs.submit(session, request_id=f"{state}{days_ago}", dataset="d", dataset_sha256=None, config={})
        job.state = state
        if state not in ("queued", "running"):
            job.finished_at = utc_now() - timedelta(days=days_ago)
        return job.id


def checkpoint(folder: Path) -> None:
    (folder / "step-00000001-0001").mkdir(parents=True)
    for name in ("state.pt", "SHA256SUMS"):
        (folder / "step-00000001-0001" / name).write_text("x")


@pytest.mark.parametrize("far", [False, True])
def test_checkpoints_go_when_no_job_goes_on_from_them(database: Database, tmp_path: Path, far: bool) -> None:
    ended = [job_in(database, "succeeded"), job_in(database, "cancelled"), job_in(database, "failed", 8)]
    needed = [job_in(database, "queued"), job_in(database, "running"), job_in(database, "failed", 6)]
    place = f"memory://{tmp_path}/jobs"
    store = Store(place, Cache(tmp_path / "cache", 0)) if far else None
    for job_id in [*ended, *needed, 99]:
        checkpoint(tmp_path / "jobs" / str(job_id))
        if store is not None and store.remote is not None:
            step = "step-00000001-0001"
            store.remote.upload(tmp_path / "jobs" / str(job_id) / step, f"{job_id}/{step}")
    (tmp_path / "jobs" / ".7.gone" / "step-00000001-0001").mkdir(parents=True)  # of one that was cut off
    for _ in range(2):
        remove_expired_checkpoints(database, tmp_path / "jobs", store, 7, NEVER)
        assert sorted(path.name for path in (tmp_path / "jobs").iterdir()) == sorted(map(str, [*needed, 99]))
        if store is not None:
            assert store.names("") == sorted(map(str, [*needed, 99]))
    with database.begin() as session:
        jobs.retry(session, needed[2])
        session.get_one(TrainingJob, needed[2]).finished_at = utc_now() - timedelta(days=9)
    remove_expired_checkpoints(database, tmp_path / "jobs", store, 7, NEVER)
    assert (tmp_path / "jobs" / str(needed[2])).exists(), "it is to be tried again"


def test_nothing_is_looked_for_where_no_job_ever_ran(sqlite: Database, tmp_path: Path) -> None:
    remove_expired_checkpoints(sqlite, tmp_path / "none", None, 7, NEVER)
    assert not (tmp_path / "none").exists()


@on_sqlite
def test_a_trainer_clears_away_what_a_job_left_that_was_cancelled_in_the_queue(
    world: World, labelled_csv: Path
) -> None:
    job_id = world.submit(labelled_csv, epochs=3)
    world.killed_at("recorded=kill", "train")
    kept = world.settings.home / "jobs" / str(job_id)
    with world.database.begin() as session:
        jobs.get(session, job_id).state = "queued"
        assert jobs.request_cancel(session, job_id).state == "cancelled"
    assert any(kept.glob("step-*"))
    with world.worker("train"):
        wait_until(lambda: not kept.exists())


def test_a_retry_long_after_the_failure_says_that_it_begins_from_scratch(
    tweetscore: Run, home_database: Database
) -> None:
    late, soon = job_in(home_database, "failed", 8), job_in(home_database, "failed", 6)
    said = tweetscore("jobs", "retry", str(late))
    assert said.returncode == 0
    assert "more than 7 days ago, so it has no checkpoints and starts from the beginning" in said.stdout
    said = tweetscore("jobs", "retry", str(soon), "--json")
    assert (said.returncode, json.loads(said.stdout)["from_scratch"]) == (0, False)
