"""Schema, migrations and transactions, on SQLite and on PostgreSQL."""

import os
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import inspect, select, text
from sqlalchemy.exc import IntegrityError, OperationalError, StatementError

import db.session
from db import migrate, predictions
from db.compatibility import MIGRATIONS
from db.errors import DatabaseError
from db.models import Base, Tweet, utc_now
from db.session import BUSY_TIMEOUT_MS, Database, open_database
from db.views import VIEWS
from tests.conftest import PATIENCE_SECONDS
from tests.support.paths import ROOT
from tests.support.world import on_postgresql

JST = timezone(timedelta(hours=9))

# Connects, prints that it is ready, and migrates after a line of input, so that several begin at the same time.
MIGRATE_ON_INPUT = """
import sys
from db import migrate
from db.session import open_database
database = open_database(sys.argv[1])
assert not migrate.is_current(database)
print("ready", flush=True)
sys.stdin.readline()
migrate.upgrade(database)
print(migrate.is_current(database))
"""


def tweet_row(tweet_id: str, **values: object) -> dict[str, object]:
    optional = dict.fromkeys(("author_id", "lang", "topic", "tweet_created_at"))
    return {"tweet_id": tweet_id, "text": "今日はいい天気", **optional, "received_at": utc_now(), **values}


def tweet_ids(database: Database) -> list[str]:
    with database.read() as session:
        return list(session.scalars(select(Tweet.tweet_id).order_by(Tweet.tweet_id)))


def table_names(database: Database) -> set[str]:
    """Without partitions."""
    names = inspect(database.engine).get_table_names()
    return {name for name in names if name != "alembic_version" and not migrate.PARTITION.fullmatch(name)}


def view_names(database: Database) -> set[str]:
    return set(inspect(database.engine).get_view_names())


def alembic(url: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "alembic", *arguments],
        cwd=ROOT,
        env={**os.environ, "DATABASE_URL": url},
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
    )


def test_head_migration_makes_exactly_the_schema_of_the_models(database: Database) -> None:
    with database.engine.connect() as connection:
        options = {
            "compare_type": True,
            "compare_server_default": True,
            "include_object": migrate.compared_on(connection.dialect.name),
        }
        context = MigrationContext.configure(connection, opts=options)
        assert compare_metadata(context, Base.metadata) == []
        # The comparison detects a column too many and an index too few, and on PostgreSQL another comment.
        connection.execute(text("ALTER TABLE tweets ADD COLUMN mood TEXT"))
        connection.execute(text("DROP INDEX ix_scoring_windows_started_at"))
        detected = {"remove_column", "add_index"}
        if connection.dialect.supports_comments:
            connection.execute(text("COMMENT ON COLUMN tweets.text IS 'changed'"))
            connection.execute(text("COMMENT ON TABLE tweets IS NULL"))
            detected |= {"modify_comment", "add_table_comment"}
        found = compare_metadata(context, Base.metadata)
        assert {change[0][0] if isinstance(change, list) else change[0] for change in found} == detected


def test_every_table_column_and_view_is_described_in_sentences() -> None:
    tables = Base.metadata.tables.values()
    comments = [table.comment for table in tables] + [column.comment for table in tables for column in table.columns]
    comments += [view.comment for view in VIEWS] + [column.comment for view in VIEWS for column in view.columns]
    assert [c for c in comments if not re.fullmatch(r"[A-Za-z].{10,}\.", c or "")] == []


def test_views_have_exactly_the_columns_that_are_described(database: Database) -> None:
    found = inspect(database.engine)
    columns = {view: [column["name"] for column in found.get_columns(view)] for view in found.get_view_names()}
    assert columns == {view.name: [column.name for column in view.columns] for view in VIEWS}


@on_postgresql
def test_postgresql_stores_types_and_comments_of_views_as_described(database: Database) -> None:
    sql = """
        SELECT c.table_name, obj_description(c.table_name::regclass), c.column_name, c.data_type,
               col_description(c.table_name::regclass, c.ordinal_position::int)
        FROM information_schema.columns AS c JOIN information_schema.views AS v USING (table_schema, table_name)
        WHERE table_schema = 'public'"""
    with database.read() as session:
        found = {tuple(row) for row in session.execute(text(sql))}
    described = {(v.name, v.comment, c.name, c.type, c.comment) for v in VIEWS for c in v.columns}
    assert found == described


def test_migrations_need_nothing_of_this_code() -> None:
    """A released migration must not change with the models."""
    for path in sorted((MIGRATIONS / "versions").glob("*.py")):
        imported = re.findall(r"^(?:from|import) (\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
        assert set(imported) <= {"typing", "sqlalchemy", "alembic"}, path


def test_upgrade_again_changes_nothing_and_keeps_the_rows(database: Database) -> None:
    with database.begin() as session:
        predictions.add_tweets(session, [tweet_row("1")])
    migrate.upgrade(database)
    assert migrate.is_current(database)
    assert tweet_ids(database) == ["1"]


def test_processes_that_start_together_migrate_one_database(database_url: str) -> None:
    command = [sys.executable, "-c", MIGRATE_ON_INPUT, database_url]
    started = [
        subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(3)
    ]
    try:
        assert [process.stdout.readline().strip() for process in started] == [b"ready"] * 3
        for process in started:
            process.stdin.write(b"go\n")
            process.stdin.flush()
        ended = [process.communicate(timeout=PATIENCE_SECONDS) for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
    assert [(out.strip(), err) for out, err in ended] == [(b"True", b"")] * 3


@pytest.mark.parametrize("database_url", ["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)], indirect=True)
def test_alembic_command_goes_down_to_nothing_and_up_again(database_url: str) -> None:
    up = alembic(database_url, "upgrade", "head")
    assert up.returncode == 0, up.stderr
    opened = open_database(database_url)
    tables, views = table_names(opened), view_names(opened)
    assert tables == set(Base.metadata.tables)
    assert views

    down = alembic(database_url, "downgrade", "base")
    assert down.returncode == 0, down.stderr
    assert (table_names(opened), view_names(opened)) == (set(), set())

    migrate.upgrade(opened)
    assert (table_names(opened), view_names(opened)) == (tables, views)
    opened.close()


def test_empty_database_is_not_current(database_url: str) -> None:
    opened = open_database(database_url)
    assert not migrate.is_current(opened)
    opened.close()


def test_database_of_a_newer_release_is_refused_in_words(database: Database) -> None:
    with database.begin() as session:
        session.execute(text("UPDATE alembic_version SET version_num = '9999'"))
        session.execute(text("UPDATE schema_compatibility SET oldest_code = '9999'"))
    with pytest.raises(DatabaseError, match="upgrade tweetscore"):
        migrate.upgrade(database)
    assert table_names(database) == set(Base.metadata.tables)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("mysql://user@host/name", "sqlite and postgresql"),
        ("postgresql+nodriver://user@host/name", "unknown driver"),
        ("no url at all", "DATABASE_URL"),
    ],
)
def test_url_of_another_kind_is_refused_in_words(url: str, words: str) -> None:
    with pytest.raises(DatabaseError, match=words):
        open_database(url)


def test_unreachable_server_is_named_without_its_password(tmp_path: Path) -> None:
    opened = open_database(f"postgresql://someone:geheim@/name?host={tmp_path}")
    with pytest.raises(DatabaseError, match="someone") as caught:
        migrate.upgrade(opened)
    assert "geheim" not in str(caught.value)
    opened.close()


def test_folder_of_a_new_sqlite_file_is_made(tmp_path: Path) -> None:
    opened = open_database(f"sqlite:///{tmp_path / 'new' / 'deeper' / 'tweets.db'}")
    migrate.upgrade(opened)
    assert tweet_ids(opened) == []
    opened.close()


def test_naive_datetime_is_refused_and_nothing_is_stored(database: Database) -> None:
    naive = datetime(2026, 1, 31, 12)  # noqa: DTZ001 - the fault under test
    with pytest.raises((StatementError, ValueError), match="has no time zone"), database.begin() as session:
        predictions.add_tweets(session, [tweet_row("1"), tweet_row("2", tweet_created_at=naive)])
    assert tweet_ids(database) == []


@pytest.mark.parametrize(
    "when",
    [
        datetime(2026, 2, 1, 8, 59, 59, 123456, tzinfo=JST),
        datetime(2026, 1, 31, 23, 59, 59, tzinfo=UTC),
        datetime(1969, 7, 20, 20, 17, 40, tzinfo=UTC),
    ],
)
def test_time_of_any_zone_comes_back_as_the_same_instant_in_utc(database: Database, when: datetime) -> None:
    with database.begin() as session:
        predictions.add_tweets(session, [tweet_row("1", tweet_created_at=when)])
    with database.read() as session:
        kept = session.scalars(select(Tweet.tweet_created_at)).one()
    assert kept == when
    assert kept.utcoffset() == timedelta(0)


def test_sqlite_keeps_times_as_iso_text_whose_order_is_time_order(sqlite: Database) -> None:
    whens = [datetime(2026, 2, 1, 8, 59, 59, 5, tzinfo=JST), datetime(2026, 2, 1, 8, 59, 59, tzinfo=JST)]
    with sqlite.begin() as session:
        predictions.add_tweets(session, [tweet_row(str(i), tweet_created_at=when) for i, when in enumerate(whens)])
    with sqlite.engine.connect() as connection:
        kept = connection.execute(text("SELECT tweet_created_at FROM tweets ORDER BY tweet_created_at")).scalars().all()
    assert kept == ["2026-01-31T23:59:59.000000Z", "2026-01-31T23:59:59.000005Z"]


def test_text_keeps_japanese_and_ids_past_what_floats_hold(database: Database) -> None:
    beyond_floats = str(2**53 + 1)
    with database.begin() as session:
        predictions.add_tweets(session, [tweet_row(beyond_floats, text="最高😀\n𠮷野家", topic="天気")])
    with database.read() as session:
        kept = session.scalars(select(Tweet)).one()
    assert (kept.tweet_id, kept.text, kept.topic) == (beyond_floats, "最高😀\n𠮷野家", "天気")


def test_failed_transaction_leaves_nothing(database: Database) -> None:
    def fail_after_writing() -> None:
        with database.begin() as session:
            predictions.add_tweets(session, [tweet_row("1")])
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        fail_after_writing()
    assert tweet_ids(database) == []
    with database.begin() as session:  # and the connection it used is good for the next one
        predictions.add_tweets(session, [tweet_row("2")])
    assert tweet_ids(database) == ["2"]


def test_prediction_without_its_tweet_is_refused_with_the_whole_window(database: Database) -> None:
    orphan = {
        "tweet_id": "2", "model_version_id": 1, "label": "positive", "probability": 0.9, "score_signed": 0.8,
        "probabilities": {"positive": 0.9}, "scored_at": utc_now(),
    }  # fmt: skip

    def write_window() -> None:
        with database.begin() as session:
            predictions.add_tweets(session, [tweet_row("1")])
            predictions.add_predictions(session, [orphan])

    with pytest.raises(IntegrityError):
        write_window()
    assert tweet_ids(database) == []


def test_every_sqlite_connection_has_wal_foreign_keys_and_busy_timeout(sqlite: Database) -> None:
    wanted = {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "busy_timeout": BUSY_TIMEOUT_MS}
    # Two at once, both only reading, so that the second is a new connection of the pool.
    with sqlite.read() as first, sqlite.read() as second:
        for session in (first, second):
            assert {name: session.scalar(text(f"PRAGMA {name}")) for name in wanted} == wanted


def test_reader_does_not_wait_for_a_writer(database: Database) -> None:
    with ThreadPoolExecutor(1) as pool, database.begin() as session:
        predictions.add_tweets(session, [tweet_row("1")])
        assert pool.submit(tweet_ids, database).result(timeout=PATIENCE_SECONDS) == []
    assert tweet_ids(database) == ["1"]


def test_asking_for_the_schema_version_does_not_wait_for_a_writer(database: Database) -> None:
    asked = threading.Thread(target=migrate.is_current, args=[database])
    with database.begin() as session:
        predictions.add_tweets(session, [tweet_row("1")])
        asked.start()
        asked.join(timeout=BUSY_TIMEOUT_MS / 2000)
        waited = asked.is_alive()
    asked.join()
    assert not waited


def test_second_writer_waits_for_the_first_instead_of_failing(sqlite: Database) -> None:
    def write_second() -> None:
        with sqlite.begin() as session:
            predictions.add_tweets(session, [tweet_row(f"after {session.scalar(select(Tweet.tweet_id))}")])

    with ThreadPoolExecutor(1) as pool:
        with sqlite.begin() as session:
            predictions.add_tweets(session, [tweet_row("1")])
            second = pool.submit(write_second)
            # Long enough for a writer that does not wait to come back with "database is locked".
            wait([second], timeout=0.5)
            assert not second.done()
        second.result(timeout=PATIENCE_SECONDS)
    assert tweet_ids(sqlite) == ["1", "after 1"]


def test_writers_that_wait_look_every_few_milliseconds_and_are_refused_after_the_busy_timeout(
    sqlite: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    def begin() -> None:
        with sqlite.begin() as session:
            session.connection()

    pauses: list[float] = []
    monkeypatch.setattr(db.session, "BUSY_TIMEOUT_MS", 100)
    monkeypatch.setattr(db.session.time, "sleep", pauses.append)
    with ThreadPoolExecutor(1) as pool, sqlite.begin() as session:
        predictions.add_tweets(session, [tweet_row("1")])
        with pytest.raises(OperationalError, match="database is locked"):
            pool.submit(begin).result(PATIENCE_SECONDS)
    assert len(pauses) > 10
    assert set(pauses) == {db.session.LOCK_PAUSE_SECONDS}
    assert tweet_ids(sqlite) == ["1"]


def test_sqlite_writers_that_read_first_lose_no_update(sqlite: Database) -> None:
    with sqlite.begin() as session:
        predictions.add_tweets(session, [tweet_row("1", text="0")])

    def count_up(_: int) -> None:
        with sqlite.begin() as session:
            tweet = session.get_one(Tweet, "1")
            tweet.text = str(int(tweet.text) + 1)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(count_up, range(100)))
    with sqlite.read() as session:
        assert session.get_one(Tweet, "1").text == "100"
