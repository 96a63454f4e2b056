"""Partitions of tweets and predictions on PostgreSQL: added ahead, filled, listed, and dropped whole by retention."""

import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import psycopg
import pytest
from sqlalchemy.exc import DBAPIError, ProgrammingError
from typer.testing import CliRunner

from db import migrate, predictions
from db.admin import partitions
from db.admin.partitions import Partition, first_id, time_of
from db.admin.roles import grant_worker
from db.session import Database, open_database
from tests.conftest import wait_until
from tests.support.releases import upgrade_to
from tests.support.rows import SUMS, answer, assert_counted, make_version, prediction_row, run, tweet_row, url_of, write
from tests.support.world import on_postgresql, on_sqlite
from worker.cli.main import app
from worker.maintenance.retention import NEVER, add_partitions, apply_retention

DAYS = 60.0
NOW = datetime.now(UTC).replace(hour=12, minute=0, second=0, microsecond=0)
LONG_AGO = NOW - timedelta(days=100)


def listed(database: Database) -> list[Partition]:
    with database.read() as session:
        return partitions.listed(session)


def names(database: Database) -> set[str]:
    return {partition.name for partition in listed(database)}


def add(database: Database, start: datetime, end: datetime) -> int:
    with database.begin() as session:
        return partitions.add(session, (start, end))


def day_of(at: datetime) -> datetime:
    return at.replace(hour=0)


def scored(database: Database, version: int, rows: dict[str, datetime]) -> None:
    """Tweets by id, with the time of their arrival, each with a prediction."""
    tweets = [tweet_row(id_, received_at=at) for id_, at in rows.items()]
    write(database, tweets, [prediction_row(id_, version) for id_ in rows])


def stored_in(database: Database, tweet_id: str) -> set[str]:
    found = answer(
        database,
        f"""SELECT tableoid::regclass::text FROM tweets WHERE tweet_id = '{tweet_id}' UNION ALL
            SELECT tableoid::regclass::text FROM predictions WHERE tweet_id = '{tweet_id}'""",
    )
    return {name for (name,) in found}


def test_ids_and_times_are_those_of_twitter() -> None:
    assert time_of("1541815603606036480").isoformat(timespec="seconds") == "2022-06-28T16:07:40+00:00"
    at = datetime(2026, 11, 27, tzinfo=UTC)
    assert time_of(first_id(at)) == at
    assert time_of(str(int(first_id(at)) - 1)) < at
    assert len(first_id(datetime(2018, 6, 4, tzinfo=UTC))) == len(first_id(datetime(2080, 1, 1, tzinfo=UTC))) == 19


@pytest.mark.parametrize(
    ("days", "length"),
    [
        (None, timedelta(days=30)), (3650, timedelta(days=7)), (365, timedelta(days=7)), (60, timedelta(days=2)),
        (30, timedelta(days=1)), (7, timedelta(hours=6)), (1, timedelta(minutes=48)), (0.001, timedelta(minutes=1)),
    ],
)  # fmt: skip
def test_retention_has_about_thirty_partitions(days: float | None, length: timedelta) -> None:
    assert partitions.width(days) == length


@pytest.mark.parametrize("length", [timedelta(minutes=48), timedelta(days=1), timedelta(days=7)])
def test_missing_periods_follow_each_other_without_a_gap_and_none_is_missing_twice(length: timedelta) -> None:
    periods = partitions.missing([], NOW, length)
    assert periods[0][0] <= NOW - length
    assert periods[-1][1] >= NOW + 4 * length
    assert [end for _, end in periods[:-1]] == [start for start, _ in periods[1:]]
    existing = [Partition("", start, end, 0, 0, 0) for start, end in periods]
    assert partitions.missing(existing, NOW, length) == []
    later = partitions.missing(existing, NOW, 2 * length)
    assert later[0][0] == periods[-1][1]


@on_postgresql
def test_tweets_go_to_the_partition_of_their_time_and_other_ids_to_other(database: Database) -> None:
    add_partitions(database.begin, DAYS)
    version = make_version(database)
    scored(database, version, {first_id(NOW): NOW, "7": NOW, first_id(LONG_AGO): NOW})
    assert stored_in(database, "7") == stored_in(database, first_id(LONG_AGO)) == {"tweets_other", "predictions_other"}
    (of_now,) = {name.partition("_")[2] for name in stored_in(database, first_id(NOW))}
    (partition,) = (partition for partition in listed(database) if partition.name == of_now)
    assert partition.start is not None
    assert partition.start <= NOW < partition.end
    before = names(database)
    add_partitions(database.begin, DAYS)
    assert names(database) == before
    assert_counted(database)


@on_postgresql
def test_rows_that_came_without_a_partition_move_into_it_and_are_counted_once(database: Database) -> None:
    version = make_version(database)
    scored(database, version, {first_id(NOW): NOW, first_id(NOW + timedelta(days=3)): NOW})
    run(database, f"INSERT INTO labels (tweet_id, label, annotator, source, at) VALUES ('{first_id(NOW)}', 'x', 'a', "
        "'review', now())")  # fmt: skip
    assert add(database, day_of(NOW), day_of(NOW) + timedelta(days=1)) == 2
    assert stored_in(database, first_id(NOW)) == {f"tweets_{NOW:%Y%m%d}", f"predictions_{NOW:%Y%m%d}"}
    assert stored_in(database, first_id(NOW + timedelta(days=3))) == {"tweets_other", "predictions_other"}
    assert answer(database, "SELECT count(*) FROM labels") == [(1,)]
    assert_counted(database)


@on_postgresql
def test_retention_drops_a_partition_whole_keeps_late_tweets_and_every_sum(database: Database) -> None:
    version = make_version(database)
    add(database, day_of(LONG_AGO), day_of(LONG_AGO) + timedelta(days=1))
    old, late, new = first_id(LONG_AGO), first_id(LONG_AGO + timedelta(minutes=1)), first_id(NOW)
    scored(database, version, {old: LONG_AGO, late: NOW, new: NOW, "7": LONG_AGO})
    for id_ in (old, late):
        run(database, f"INSERT INTO labels (tweet_id, label, annotator, source, at) VALUES ('{id_}', 'x', 'a', "
            "'review', now())")  # fmt: skip
    sums = answer(database, SUMS)
    apply_retention(database.begin, DAYS, NEVER)
    assert names(database) == {"other"}
    assert answer(database, "SELECT tweet_id FROM tweets ORDER BY tweet_id") == [(late,), (new,)]
    assert answer(database, "SELECT tweet_id FROM predictions ORDER BY tweet_id") == [(late,), (new,)]
    assert answer(database, "SELECT tweet_id FROM labels") == [(late,)]
    assert answer(database, SUMS) == sums


@on_postgresql
def test_a_partition_with_many_late_tweets_is_emptied_by_rows(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(partitions, "MOST_LATE", 0)
    version = make_version(database)
    add(database, day_of(LONG_AGO), day_of(LONG_AGO) + timedelta(days=1))
    late = first_id(LONG_AGO + timedelta(minutes=1))
    scored(database, version, {first_id(LONG_AGO): LONG_AGO, late: NOW})
    apply_retention(database.begin, DAYS, NEVER)
    assert names(database) == {f"{LONG_AGO:%Y%m%d}", "other"}
    assert answer(database, "SELECT tweet_id FROM tweets") == [(late,)]


@on_postgresql
def test_deleting_tweets_deletes_what_belongs_to_them_and_subtracts_it(database: Database) -> None:
    add_partitions(database.begin, DAYS)
    version = make_version(database)
    scored(database, version, {first_id(NOW): NOW, "7": NOW, "8": NOW})
    run(database, "INSERT INTO labels (tweet_id, label, annotator, source, at) VALUES ('7', 'x', 'a', 'review', now())")
    run(database, f"DELETE FROM tweets WHERE tweet_id IN ('7', '{first_id(NOW)}')")
    assert answer(database, "SELECT tweet_id FROM predictions") == [("8",)]
    assert answer(database, "SELECT count(*) FROM labels") == [(0,)]
    assert_counted(database)


@on_postgresql
def test_a_worker_that_may_not_change_tables_adds_and_drops_partitions(database: Database) -> None:
    run(database, "DROP ROLE IF EXISTS partition_worker")
    run(database, "CREATE ROLE partition_worker LOGIN")
    grant_worker(database, "partition_worker")
    url = url_of(database).replace("postgres:@", "partition_worker:@").replace("postgres@", "partition_worker@")
    works = open_database(url)
    try:
        assert answer(works, "SELECT current_user") == [("partition_worker",)]
        add(works, day_of(LONG_AGO), day_of(LONG_AGO) + timedelta(days=1))
        version = make_version(database)
        scored(works, version, {first_id(LONG_AGO): LONG_AGO})
        assert stored_in(works, first_id(LONG_AGO)) == {f"tweets_{LONG_AGO:%Y%m%d}", f"predictions_{LONG_AGO:%Y%m%d}"}
        apply_retention(works.begin, DAYS, NEVER)
        assert names(works) == {"other"}
        with pytest.raises(ProgrammingError, match="must be owner"):
            run(works, "DROP TABLE tweets_other")
        for name in ("other", "x; DROP TABLE tweets"):
            with pytest.raises(DBAPIError, match="may be dropped"), works.begin() as session:
                partitions.drop(session, Partition(name, None, None, 0, 0, 0), NOW)
    finally:
        works.close()


@on_postgresql
def test_scoring_goes_on_while_partitions_are_added_and_dropped(database: Database) -> None:
    """Rows of the periods that change are inserted all the time; each is stored and counted once."""
    version = make_version(database)
    ended, errors = threading.Event(), []
    stored = 0

    def write_rows() -> None:
        nonlocal stored
        try:
            while not ended.is_set():
                at = day_of(NOW) + timedelta(seconds=stored)
                rows = {first_id(at + timedelta(milliseconds=i)): NOW for i in range(50)}
                scored(database, version, rows)
                stored += 50
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=write_rows)
    thread.start()
    try:
        for number in range(5):
            reached = stored
            wait_until(lambda reached=reached: stored > reached or errors)
            start = day_of(NOW) + timedelta(days=number)
            add(database, start, start + timedelta(days=1))
            with database.begin() as session:
                (partition,) = (p for p in partitions.listed(session) if p.start == start)
                if number < 4:
                    partitions.drop(session, partition, LONG_AGO)
    finally:
        ended.set()
        thread.join()
    assert errors == []
    assert answer(database, "SELECT count(*) FROM tweets") == [(stored,)]
    assert answer(database, "SELECT count(*) FROM predictions") == [(stored,)]
    assert_counted(database)


@on_postgresql
def test_a_query_that_keeps_the_tables_locked_delays_a_partition_and_not_scoring(database: Database) -> None:
    version = make_version(database)
    add(database, day_of(LONG_AGO), day_of(LONG_AGO) + timedelta(days=1))
    with psycopg.connect(url_of(database).replace("+psycopg", "")) as reader:
        reader.execute("SELECT count(*) FROM tweets")
        with pytest.raises(DBAPIError, match="lock timeout"):
            apply_retention(database.begin, DAYS, NEVER)
        scored(database, version, {first_id(NOW): NOW})
    apply_retention(database.begin, DAYS, NEVER)
    assert names(database) == {"other"}


@pytest.fixture
def before_partitions(database_url: str) -> Iterator[Database]:
    """A database with the schema of before partitions, and rows."""
    opened = open_database(database_url)
    upgrade_to(opened, "0004")
    yield opened
    opened.close()


@on_postgresql
@pytest.mark.parametrize("twitter", [True, False], ids=["ids of Twitter", "other ids"])
def test_an_upgrade_makes_the_tables_of_before_a_partition(before_partitions: Database, twitter: bool) -> None:
    """With views and privileges of its users."""
    database = before_partitions
    run(database, "DROP ROLE IF EXISTS analyst")
    run(database, "CREATE ROLE analyst")
    version = make_version(database)
    ids = [first_id(LONG_AGO), first_id(NOW)] if twitter else ["9000", "9001"]
    scored(database, version, dict.fromkeys(ids, LONG_AGO))
    with database.engine.begin() as connection:
        view = "CREATE VIEW by_analyst AS SELECT text, '50 %% :ids' AS words FROM v_predictions_current"
        connection.exec_driver_sql(view)
    run(database, "COMMENT ON VIEW by_analyst IS 'The analyst''s.'")
    run(database, "GRANT SELECT ON by_analyst, tweets TO analyst")
    sums = answer(database, SUMS)
    migrate.upgrade(database)
    assert stored_in(database, ids[0]) == (
        {"tweets_before", "predictions_before"} if twitter else {"tweets_other", "predictions_other"}
    )
    assert "'50 % :ids'" in answer(database, "SELECT pg_get_viewdef('by_analyst'::regclass)")[0][0]
    assert answer(database, "SELECT obj_description('by_analyst'::regclass)") == [("The analyst's.",)]
    for name in ("by_analyst", "tweets"):
        assert answer(database, f"SELECT has_table_privilege('analyst', '{name}', 'SELECT')") == [(True,)]
    assert answer(database, SUMS) == sums
    add_partitions(database.begin, DAYS)
    scored(database, version, {first_id(NOW + timedelta(days=2)): NOW, **dict.fromkeys(ids, NOW)})
    assert answer(database, "SELECT count(*) FROM predictions") == [(3,)]
    # The rows of before are not kept longer than others.
    apply_retention(database.begin, DAYS, NEVER)
    assert answer(database, "SELECT tweet_id FROM tweets") == [(first_id(NOW + timedelta(days=2)),)]


@on_postgresql
def test_a_writer_of_many_rows_skips_what_exists_and_what_another_adds_meanwhile(database: Database) -> None:
    """Two transactions insert the same rows, the second by COPY while the first is open."""
    rows = [tweet_row(str(1000 + i), text="first") for i in range(100)]
    again = [tweet_row(str(1050 + i), text="second\tone") for i in range(100)]
    with database.begin() as session:
        predictions.add_tweets(session, rows[:60])
    done = threading.Event()

    def write_again() -> None:
        with database.begin() as session:
            predictions.add_tweets(session, again)
        done.set()

    thread = threading.Thread(target=write_again)
    with database.begin() as session:
        predictions.add_tweets(session, rows)
        thread.start()
        wait_until(lambda: answer(database, "SELECT count(*) FROM pg_locks WHERE NOT granted") != [(0,)])
        assert not done.is_set()
    thread.join()
    assert answer(database, "SELECT text, count(*) FROM tweets GROUP BY 1 ORDER BY 1") == [
        ("first", 100), ("second\tone", 50),
    ]  # fmt: skip


@on_postgresql
def test_partitions_are_listed_with_rows_and_bytes(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    add_partitions(database.begin, DAYS)
    version = make_version(database)
    scored(database, version, {first_id(NOW + timedelta(milliseconds=i)): NOW for i in range(200)})
    run(database, "ANALYZE")
    (filled,) = (partition for partition in listed(database) if partition.tweets)
    assert (filled.tweets, filled.predictions) == (200, 200)
    assert filled.bytes > 200 * 100
    monkeypatch.setenv("DATABASE_URL", url_of(database))
    shown = CliRunner().invoke(app, ["db", "partitions"])
    assert shown.exit_code == 0
    assert f"{filled.start:%Y%m%d}" in shown.output
    assert "200" in shown.output


@on_sqlite
def test_sqlite_has_no_partitions(database: Database) -> None:
    add_partitions(database.begin, DAYS)
    assert listed(database) == []
