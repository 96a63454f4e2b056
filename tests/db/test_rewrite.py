"""Deleted text leaves the files too, or an error names what prevents it: readers, writers and other roles."""

import json
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy import make_url, text
from typer.testing import CliRunner

from db import migrate
from db.admin import rewrite
from db.admin.roles import grant_worker
from db.errors import DatabaseError
from db.session import Database, open_database
from tests.conftest import PATIENCE_SECONDS
from tests.support.leaks import SECRET, found_in
from tests.support.rows import tweet_row, url_of, write
from tests.support.world import on_postgresql
from worker.cli.main import app
from worker.maintenance.deletion import compact
from worker.settings import Settings
from worker.stream import embedded_valkey
from worker.stream.redis_client import connect
from worker.stream.stream import Stream

OPEN = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute(sys.argv[2])
print(connection.execute("SELECT count(*) FROM tweets").fetchone(), flush=True)
sys.stdin.read()
"""


@contextmanager
def program(database: Database, begin: str) -> Iterator["subprocess.Popen[str]"]:
    """Another program with an open transaction on an SQLite file, until its input ends."""
    place = str(database.engine.url.database)
    with subprocess.Popen(
        [sys.executable, "-c", OPEN, place, begin], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline().startswith("(")
            yield process
        finally:
            process.stdin.close()
            process.wait(PATIENCE_SECONDS)


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """What is in use is tried again for half a second instead of a minute."""
    monkeypatch.setattr(rewrite, "PATIENCE_SECONDS", 0.5)
    monkeypatch.setattr(rewrite, "LOCK_MS", 100)
    monkeypatch.setattr(rewrite, "PAUSE_SECONDS", 0.1)
    return monkeypatch


def patient(hasty: pytest.MonkeyPatch) -> None:
    hasty.setattr(rewrite, "PATIENCE_SECONDS", PATIENCE_SECONDS)


def secrets(database: Database, count: int = 50) -> None:
    write(database, [tweet_row(str(i), text=f"{SECRET}{i}", author_id="a") for i in range(count)], [])


def empty(database: Database) -> None:
    with database.begin() as session:
        session.execute(text("DELETE FROM tweets"))


def test_delete_beside_an_open_reader_says_what_is_left_and_is_whole_when_that_ends(
    settings: Settings, hasty: pytest.MonkeyPatch
) -> None:
    database = open_database(settings.sql_url)
    migrate.upgrade(database)
    secrets(database)
    rewrite.rewrite(database)  # into the file itself, out of its log
    delete = ("delete", "--author", "a")
    with embedded_valkey.owned(settings.home, 64), program(database, "BEGIN") as reader:
        said = CliRunner().invoke(app, [*delete, "--json"])
        assert said.exit_code == 1
        found = json.loads(said.stdout)
        assert (found["tweets"], len(found["not_rewritten"])) == (50, 1)
        assert "still in the database file: another program reads" in said.stderr
        assert found_in(settings.home), "the message is true: the text is still there"
        again = CliRunner().invoke(app, delete)
        assert (again.exit_code, "deleted 0 tweets" in again.stdout) == (1, True)
        patient(hasty)
        threading.Timer(1, reader.stdin.close).start()
        said = CliRunner().invoke(app, [*delete, "--json"])
        assert (said.exit_code, json.loads(said.stdout)["not_rewritten"]) == (0, []), said.stderr
        assert found_in(settings.home) == []
    database.close()


def test_a_writer_that_keeps_sqlite_locked_is_waited_for_and_named(sqlite: Database, hasty: pytest.MonkeyPatch) -> None:
    secrets(sqlite)
    empty(sqlite)
    with program(sqlite, "BEGIN IMMEDIATE") as writer:
        with pytest.raises(DatabaseError, match="keeps it locked"):
            rewrite.rewrite(sqlite)
        patient(hasty)
        threading.Timer(0.5, writer.stdin.close).start()
        rewrite.rewrite(sqlite)
    assert found_in(Path(str(sqlite.engine.url.database)).parent) == []


def test_a_log_that_may_not_be_rewritten_is_said(sqlite: Database, stream: Stream, raw: Any) -> None:
    url = f"unix://worker:x@{raw.connection_pool.connection_kwargs['path']}"
    raw.acl_setuser("worker", enabled=True, passwords=["+x"], categories=["+@all", "-@admin"], keys=["*"])
    try:
        [said] = compact(sqlite, Stream(connect(url), stream.key, stream.group))
        assert "still in the append-only file until an administrator runs BGREWRITEAOF" in said
        raw.acl_setuser("worker", enabled=True, commands=["+bgrewriteaof"])
        assert compact(sqlite, Stream(connect(url), stream.key, stream.group)) == []
    finally:
        raw.acl_deluser("worker")


# --- PostgreSQL


def found_in_tables(database: Database) -> list[str]:
    """Which tables' files, as the server has them on disk, still hold the text."""
    with database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("CHECKPOINT"))
        folder = Path(str(connection.scalar(text("SHOW data_directory"))))
        # The tests' ids are in the partition of other ids.
        files = {t: f"{t}_other" if t in ("tweets", "predictions") else t for t in rewrite.TABLES}
        places = {
            table: folder / str(connection.scalar(text(f"SELECT pg_relation_filepath('{file}')")))
            for table, file in files.items()
        }
    return [table for table, place in places.items() if SECRET.encode() in place.read_bytes()]


@pytest.fixture
def works(database: Database) -> Iterator[Database]:
    """The database as a role that `tweetscore db grant-worker` let work with it."""
    role = f"worker_{uuid.uuid4().hex}"
    with database.begin() as session:
        session.execute(text(f"CREATE ROLE {role} LOGIN PASSWORD 'x'"))
    grant_worker(database, role)
    url = make_url(url_of(database)).set(username=role, password="x")
    opened = open_database(url.render_as_string(hide_password=False))
    yield opened
    opened.close()


@on_postgresql
def test_a_role_that_may_not_rewrite_the_tables_says_who_may(database: Database, works: Database) -> None:
    """As on PostgreSQL 16, where there is no MAINTAIN to grant."""
    secrets(database)
    if server_version(database) >= 170_000:
        with database.begin() as session:
            role = works.engine.url.username
            session.execute(text(f"REVOKE MAINTAIN ON ALL TABLES IN SCHEMA public FROM {role}"))
    empty(works)
    with pytest.raises(DatabaseError, match=r"may not VACUUM them; name their owner in DATABASE_URL.*grant-worker"):
        rewrite.rewrite(works)
    assert found_in_tables(database) == ["tweets"]
    rewrite.rewrite(database)
    assert found_in_tables(database) == []


@on_postgresql
def test_a_workers_role_rewrites_the_tables_where_postgresql_can_let_it(database: Database, works: Database) -> None:
    if server_version(database) < 170_000:
        pytest.skip("PostgreSQL before 17 lets owners alone")
    secrets(database)
    empty(works)
    assert found_in_tables(database) == ["tweets"]
    rewrite.rewrite(works)
    assert found_in_tables(database) == []


def server_version(database: Database) -> int:
    with database.read() as session:
        return int(session.scalar(text("SHOW server_version_num")) or 0)


@on_postgresql
@pytest.mark.parametrize(
    ("looks_at", "says"),
    [("tweets", "keeps a table locked"), ("model_versions", "an open transaction may still see it")],
)
def test_an_open_transaction_is_waited_for_and_named(
    database: Database, hasty: pytest.MonkeyPatch, looks_at: str, says: str
) -> None:
    """One that holds the table, and one that only has a view of it from before the deletion."""
    secrets(database)
    with psycopg.connect(url_of(database).replace("+psycopg", "")) as other:
        other.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        other.execute(f"SELECT count(*) FROM {looks_at}")
        empty(database)
        with pytest.raises(DatabaseError, match=says):
            rewrite.rewrite(database)
        assert found_in_tables(database) == ["tweets"]
        patient(hasty)
        threading.Timer(0.5, other.rollback).start()
        rewrite.rewrite(database)
    assert found_in_tables(database) == []
