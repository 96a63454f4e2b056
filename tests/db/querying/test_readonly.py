"""Questions in SQL: answered as a stream of rows, and refused when they would write."""

import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from sqlalchemy import make_url, text
from sqlalchemy.exc import DBAPIError

from db import predictions
from db.admin.roles import grant_readonly
from db.errors import DatabaseError
from db.querying import readonly
from db.querying.readonly import run_query
from db.session import Database, open_database
from tests.support.rows import answer, everything, tweet_row, url_of, write
from tests.support.world import on_postgresql


@pytest.mark.parametrize(
    "sql",
    [
        "INSERT INTO tweets (tweet_id, text, received_at) VALUES ('2', 'x', '2026-01-31T12:00:00Z')",
        "INSERT INTO tweets (tweet_id, text, received_at) VALUES ('2', 'x', '2026-01-31T12:00:00Z') RETURNING tweet_id",
        "UPDATE tweets SET text = 'x'",
        "DELETE FROM tweets",
        "DROP TABLE dead_letters",
        "CREATE TABLE other (a INTEGER)",
        "WITH gone AS (DELETE FROM tweets RETURNING tweet_id) SELECT * FROM gone",
        "EXPLAIN ANALYZE DELETE FROM tweets",
        "SELECT 1; DROP TABLE dead_letters",
        "COMMIT; DROP TABLE dead_letters",
        "ATTACH DATABASE '{folder}/other.db' AS other",
        "VACUUM INTO '{folder}/other.db'",
        "PRAGMA user_version = 7",
        "PRAGMA journal_mode = DELETE",
        "PRAGMA writable_schema = ON",
        "SET TRANSACTION READ WRITE",
        "SELECT set_config('transaction_read_only', 'off', false)",
        "DO $$ BEGIN DELETE FROM tweets; END $$",
        "TRUNCATE tweets CASCADE",
        "",
    ],
)
def test_question_that_would_write_is_refused(database: Database, tmp_path: Path, sql: str) -> None:
    write(database, [tweet_row("1")], [])
    pragmas = "SELECT user_version, journal_mode FROM pragma_user_version, pragma_journal_mode"
    on_sqlite = database.engine.dialect.name == "sqlite"

    def state() -> list[Any]:
        with database.read() as session:
            tables = "sqlite_master" if on_sqlite else "pg_class"
            return [
                everything(database),
                session.scalar(text(f"SELECT count(*) FROM {tables}")),
                session.execute(text(pragmas)).all() if on_sqlite else None,
            ]

    before = state()
    with pytest.raises(DatabaseError), run_query(url_of(database), sql.replace("{folder}", str(tmp_path))) as (_, rows):
        list(rows)
    assert state() == before
    assert not (tmp_path / "other.db").exists()


@on_postgresql
def test_question_cannot_make_the_server_write_a_file(database: Database) -> None:
    [(folder,)] = answer(database, "SELECT setting FROM pg_settings WHERE name = 'data_directory'")
    target = Path(folder) / f"copied-{make_url(url_of(database)).database}"
    with pytest.raises(DatabaseError), run_query(url_of(database), f"COPY (SELECT 1) TO '{target}'"):
        pass
    assert not target.exists()


def test_question_is_answered_with_its_column_names(database: Database) -> None:
    write(database, [tweet_row("1", text="100%嬉しい"), tweet_row("2", text="悲しい")], [])
    sql = "WITH t AS (SELECT * FROM tweets) SELECT tweet_id AS id, text FROM t WHERE text LIKE '100!%嬉%' ESCAPE '!';"
    with run_query(url_of(database), sql) as (columns, rows):
        assert (columns, [tuple(row) for row in rows]) == (["id", "text"], [("1", "100%嬉しい")])


@pytest.mark.parametrize("sql", ["SELECT * FROM nowhere", "SELEC 1"])
def test_faulty_question_is_refused_in_the_words_of_the_database(database: Database, sql: str) -> None:
    with pytest.raises(DatabaseError, match=r"nowhere|syntax"), run_query(url_of(database), sql):
        pass


def test_question_is_answered_while_a_writer_holds_its_transaction(database: Database) -> None:
    with database.begin() as session:
        predictions.add_tweets(session, [tweet_row("1")])
        assert answer(database, "SELECT count(*) FROM tweets") == [(0,)]
    assert answer(database, "SELECT count(*) FROM tweets") == [(1,)]


def test_rows_are_streamed_rather_than_held_in_memory(database: Database) -> None:
    sql = (
        f"WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 300000) SELECT '{'x' * 500}' FROM n"
    )
    process = psutil.Process()
    before = process.memory_info().rss
    with run_query(url_of(database), sql) as (_, rows):
        next(iter(rows))
        assert process.memory_info().rss - before < 50_000_000  # all of them are 150 MB
        assert sum(1 for _ in rows) == 299_999


def test_question_to_a_missing_sqlite_file_does_not_make_one(tmp_path: Path) -> None:
    path = tmp_path / "none.db"
    with pytest.raises(DatabaseError, match=r"none\.db"), run_query(f"sqlite:///{path}", "SELECT 1"):
        pass
    assert not path.exists()


def test_sqlite_file_with_url_characters_in_its_name_is_asked(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/a b#c%d日本.db"
    opened = open_database(url)
    with opened.engine.begin() as connection:
        connection.execute(text("CREATE TABLE t AS SELECT 7 AS n"))
    assert answer(opened, "SELECT n FROM t") == [(7,)]
    opened.close()


ENDLESS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n"


def test_an_endless_question_is_ended(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readonly, "STATEMENT_TIMEOUT_MS", 300)
    began = time.monotonic()
    with (
        pytest.raises(DatabaseError, match=r"interrupted|statement timeout"),
        run_query(url_of(database), ENDLESS) as (_, rows),
    ):
        list(rows)
    assert 0.2 < time.monotonic() - began < 60


def test_a_role_that_may_only_look_can_do_nothing_else(database: Database) -> None:
    if database.engine.dialect.name == "sqlite":
        with pytest.raises(DatabaseError, match="SQLite has no roles"):
            grant_readonly(database, "looker")
        return
    write(database, [tweet_row("1")], [])
    role = f"looker_{make_url(url_of(database)).database}"[:60]
    with pytest.raises(DatabaseError, match="CREATE ROLE"):
        grant_readonly(database, role)
    with database.begin() as session:
        session.execute(text(f"CREATE ROLE {role} LOGIN PASSWORD 'x'"))
    grant_readonly(database, role)
    with database.begin() as session:  # what comes later can be looked at too
        session.execute(text("CREATE TABLE later (a INTEGER)"))
    url = make_url(url_of(database)).set(username=role, password="x").render_as_string(hide_password=False)
    with run_query(url, "SELECT tweet_id FROM v_predictions_current UNION SELECT tweet_id FROM tweets") as (_, rows):
        assert [tuple(row) for row in rows] == [("1",)]
    with run_query(url, "SELECT count(*) FROM later") as (_, rows):
        assert [tuple(row) for row in rows] == [(0,)]
    looker = open_database(url)  # a connection that writes where it may
    for sql in (
        "DELETE FROM tweets", "DROP TABLE tweets", "CREATE TABLE mine (a INTEGER)",
        "CREATE TEMP TABLE mine (a INTEGER)",
        "COPY tweets TO PROGRAM 'true'", "SET default_transaction_read_only = off; DELETE FROM tweets",
    ):  # fmt: skip
        with pytest.raises(DBAPIError, match=r"permission denied|read-only|must be|owner"), looker.begin() as session:
            session.connection().exec_driver_sql(sql)
    with looker.read() as session:
        assert session.scalar(text("SHOW statement_timeout")) == "1min"
    looker.close()
    for name in ("postgres", "a; DROP TABLE tweets"):
        with pytest.raises(DatabaseError, match=r"is privileged|not a valid role name"):
            grant_readonly(database, name)
