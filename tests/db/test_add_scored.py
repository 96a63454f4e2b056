"""A window goes straight into its partition where it can; rows and sums are the same as on any other way."""

import random
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from sqlalchemy.exc import StatementError

from db import insert, predictions
from db.admin import partitions
from db.admin.partitions import first_id
from db.admin.roles import grant_worker
from db.session import Database, open_database
from tests.conftest import wait_until
from tests.support.rows import answer, assert_counted, make_version, prediction_row, run, some_text, tweet_row, url_of
from tests.support.world import on_postgresql

DAY = datetime(2026, 11, 1, tzinfo=UTC)
JST = timezone(timedelta(hours=9))
Rows = list[dict[str, Any]]


@pytest.fixture
def day(database: Database) -> Database:
    """With a partition for one day on PostgreSQL."""
    if database.engine.dialect.name == "postgresql":
        add(database, DAY)
    return database


def add(database: Database, start: datetime) -> None:
    with database.begin() as session:
        partitions.add(session, (start, start + timedelta(days=1)))


def rows(version: int, start: datetime = DAY, count: int = 100, every: timedelta = timedelta(minutes=3)) -> Any:
    rng = random.Random(count)
    tweets, scored = [], []
    for i in range(count):
        at = start + i * every
        id_ = first_id(at)
        written = rng.choice([None, at, at.astimezone(JST)])
        tweets.append(tweet_row(id_, topic=rng.choice([None, "雨", "映画"]), tweet_created_at=written, received_at=at))
        tweets[-1]["text"] = some_text(rng)
        label, score = rng.choice(["positive", "negative"]), rng.choice([None, 0.25, -0.5])
        scored.append(prediction_row(id_, version, label=label, score_signed=score, probability=rng.random()))
        scored[-1]["unknown_share"] = rng.choice([None, 0.0, 0.02, 0.021, 0.1, 0.5])
    return tweets, scored


def columns(given: Rows) -> dict[str, list[Any]]:
    return {name: [row[name] for row in given] for name in given[0]}


def store(database: Database, tweets: Rows, scored: Rows) -> None:
    with database.begin() as session:
        predictions.add_scored(session, columns(tweets), columns(scored))


def count_of(database: Database) -> tuple[int, int]:
    ((found),) = answer(database, "SELECT (SELECT count(*) FROM tweets), (SELECT count(*) FROM predictions)")
    return found  # type: ignore[return-value]


@pytest.fixture
def direct(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """Whether each attempt to add rows to a partition was one, and succeeded."""
    seen: list[bool] = []
    copied_to = insert.copied_to

    def noted(*arguments: Any) -> bool:
        seen.append(copied_to(*arguments))
        return seen[-1]

    monkeypatch.setattr(insert, "copied_to", noted)
    return seen  # type: ignore[return-value]


def test_new_tweets_are_counted_as_by_the_trigger(day: Database, direct: list[bool]) -> None:
    version = make_version(day)
    store(day, *rows(version))
    assert count_of(day) == (100, 100)
    assert_counted(day)
    by_hour = "SELECT hour, topic, label, sum(tweets) FROM sentiment_rollup GROUP BY 1, 2, 3 ORDER BY 1, 2, 3"
    hours = answer(day, by_hour)
    assert direct == ([True] if day.engine.dialect.name == "postgresql" else [])
    run(day, "DELETE FROM predictions")
    assert_counted(day)
    with day.begin() as session:
        predictions.add_predictions(session, rows(version)[1])  # counted by the trigger
    assert [row for row in answer(day, by_hour) if row[-1]] == hours
    assert len(hours) > 10


def test_tweets_that_exist_keep_their_hour_and_topic_in_the_sums(day: Database) -> None:
    first, second = make_version(day), make_version(day)
    tweets, scored = rows(first)
    store(day, tweets[:40], scored[:40])
    changed = [{**row, "topic": "別", "tweet_created_at": DAY + timedelta(hours=23)} for row in tweets]
    store(day, changed, scored)
    store(day, changed, rows(second)[1])
    store(day, changed, rows(second)[1])
    assert count_of(day) == (100, 200)
    assert_counted(day)
    assert answer(day, "SELECT count(*) FROM tweets WHERE topic = '別'") == [(60,)]


@on_postgresql
def test_windows_of_other_ids_of_two_days_or_with_repetitions_go_the_usual_way(
    day: Database, direct: list[bool]
) -> None:
    version = make_version(day)
    add(day, DAY + timedelta(days=1))
    store(day, *rows(version, DAY + timedelta(hours=22)))  # of two days
    store(day, *rows(version, DAY - timedelta(days=9)))  # without a partition
    store(day, *rows(version, DAY, 20))  # few
    tweets, scored = rows(version, DAY + timedelta(hours=12))
    store(day, tweets + tweets[:1], scored + scored[:1])
    assert direct == []
    assert count_of(day) == (320, 320)
    assert_counted(day)


@on_postgresql
def test_rows_that_another_worker_adds_meanwhile_are_skipped(
    day: Database, direct: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    version = make_version(day)
    tweets, scored = rows(version)
    store(day, tweets[50:], scored[50:])
    monkeypatch.setattr(insert, "known", lambda *_: set())  # they came after the look
    store(day, tweets, scored)
    assert direct == [True, False]
    assert count_of(day) == (100, 100)
    assert_counted(day)


@on_postgresql
def test_a_partition_that_was_dropped_since_it_was_seen_is_done_without(day: Database, direct: list[bool]) -> None:
    version = make_version(day)
    store(day, *rows(version, count=40))
    with day.begin() as session:
        (partition,) = (p for p in partitions.listed(session) if p.start == DAY)
        partitions.drop(session, partition, DAY + timedelta(days=9))
    tweets, scored = rows(version, DAY + timedelta(hours=12))
    store(day, tweets, scored)
    assert direct == [True, False]
    assert answer(day, "SELECT DISTINCT tableoid::regclass::text FROM tweets") == [("tweets_other",)]
    assert count_of(day) == (100, 100)
    store(day, tweets, scored)
    assert len(direct) == 2, "the list of partitions is read again"


@on_postgresql
def test_a_role_that_may_not_write_to_a_partition_by_its_name_goes_the_usual_way(
    day: Database, direct: list[bool]
) -> None:
    run(day, "DROP ROLE IF EXISTS worker_of_parents")
    run(day, "CREATE ROLE worker_of_parents LOGIN")
    grant_worker(day, "worker_of_parents")
    version = make_version(day)
    run(day, "REVOKE ALL ON tweets_20261101, predictions_20261101 FROM worker_of_parents")
    url = url_of(day).replace("postgres:@", "worker_of_parents:@").replace("postgres@", "worker_of_parents@")
    works = open_database(url)
    try:
        store(works, *rows(version))
    finally:
        works.close()
    assert direct == [False]
    assert count_of(day) == (100, 100)
    assert_counted(day)


@on_postgresql
def test_a_time_without_a_zone_is_refused(day: Database) -> None:
    tweets, scored = rows(make_version(day))
    tweets[7]["received_at"] = DAY.replace(tzinfo=None)
    with pytest.raises((StatementError, ValueError), match="zone"):
        store(day, tweets, scored)
    assert count_of(day) == (0, 0)


@on_postgresql
def test_windows_are_stored_and_counted_once_while_partitions_come_and_go(
    database: Database, direct: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(insert, "PARTITIONS_SECONDS", 0.0)
    version = make_version(database)
    ended, errors, written = threading.Event(), list[Exception](), 0

    def write_windows() -> None:
        nonlocal written
        try:
            while not ended.is_set():
                start = DAY + timedelta(seconds=written)
                store(database, *rows(version, start, 50, timedelta(milliseconds=1)))
                written += 50
        except Exception as error:
            errors.append(error)

    writers = threading.Thread(target=write_windows)
    writers.start()
    try:
        for number in range(6):
            before = written
            wait_until(lambda before=before: written > before + 100 or errors)
            start = DAY + timedelta(days=number // 2)
            if number % 2:
                with database.begin() as session:
                    (partition,) = (p for p in partitions.listed(session) if p.start == start)
                    partitions.drop(session, partition, DAY - timedelta(days=9))  # its tweets move to `other`
            else:
                add(database, start)
    finally:
        ended.set()
        writers.join()
    assert errors == []
    assert any(direct)
    assert count_of(database) == (written, written)
    assert_counted(database)
