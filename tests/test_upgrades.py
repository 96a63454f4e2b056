"""Schemas and releases: which work together, what an upgrade keeps, and who may bring one."""

import signal
import subprocess
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Boolean, Column, DateTime, Float, Integer, LargeBinary, MetaData, String, Table, inspect
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.types import JSON
from typer.testing import CliRunner

from db import compatibility, migrate
from db.compatibility import OLDEST_SCHEMA, Schema, newest_revision
from db.errors import SchemaMismatch
from db.models import Base, utc_now
from db.session import Database, open_database
from tests.conftest import wait_until
from tests.faults.commands import command
from tests.test_views import REVISIONS, alembic_to, run
from tests.world import on_postgresql, on_sqlite
from worker.cli import app
from worker.doctor import examine
from worker.health import check_health
from worker.settings import load_settings

RELEASED = "0005"
LATER = REVISIONS[REVISIONS.index(RELEASED) + 1 :]
AFTER = f"{int(newest_revision()) + 1:04d}"
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def released(database_url: str) -> Iterator[Database]:
    """An empty database of the released schema, of each kind in turn."""
    opened = open_database(database_url)
    alembic_to(RELEASED)(opened)
    yield opened
    opened.close()


# --- which work together


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        (Schema(None, None), "the database is empty; let its owner run `tweetscore db upgrade`"),
        (Schema(RELEASED, None), f"schema {RELEASED}, this release needs {OLDEST_SCHEMA} or newer; let its owner run"),
        (Schema(OLDEST_SCHEMA, RELEASED), None),
        (Schema(newest_revision(), RELEASED), None),
        (Schema(newest_revision(), AFTER), None),  # older code may not; this one knows it
        (Schema(AFTER, RELEASED), None),
        (Schema(AFTER, newest_revision()), None),
        (Schema(AFTER, AFTER), f"releases that know {AFTER} or newer, this one knows {newest_revision()}; upgrade"),
        (Schema(AFTER, None), f"releases that know {AFTER} or newer, this one knows {newest_revision()}; upgrade"),
    ],
)
def test_code_and_schema_work_together_unless_one_lacks_what_the_other_needs(schema: Schema, says: str | None) -> None:
    assert (schema.misfit is None) == (says is None)
    assert (says or "") in (schema.misfit or "")


def test_migrations_follow_each_other_as_their_numbers_do() -> None:
    """Which schema is newer, and which code, is told by the numbers alone."""
    assert sorted(REVISIONS) == REVISIONS


def test_the_oldest_schema_has_all_that_the_models_name_and_no_older_one_has(database_url: str) -> None:
    opened = open_database(database_url)
    lacking = {}
    for revision in REVISIONS:
        alembic_to(revision)(opened)
        there = {(t, c["name"]) for t in inspect(opened.engine).get_table_names() for c in columns(opened, t)}
        lacking[revision] = {(t.name, c.name) for t in Base.metadata.tables.values() for c in t.columns} - there
    assert min(revision for revision in REVISIONS if not lacking[revision]) == OLDEST_SCHEMA
    opened.close()


@on_sqlite
def test_a_migration_that_takes_away_or_demands_raises_the_oldest_code(released: Database) -> None:
    """What older code selects is there, and what it does not know has a default; else the database says so."""
    before = described(released)
    for revision in LATER:
        alembic_to(revision)(released)
        after, found = described(released), compatibility.find(released)
        gone = before.keys() - after.keys()
        demanded = {key for key in after.keys() - before.keys() if key[0] in {t for t, _ in before} and after[key]}
        if gone or demanded:
            assert found.oldest_code is not None, f"{revision}: {gone | demanded}"
            assert found.oldest_code > REVISIONS[REVISIONS.index(revision) - 1], f"{revision}: {gone | demanded}"
        before = after


def columns(database: Database, table: str) -> list[Any]:
    return list(inspect(database.engine).get_columns(table))


def described(database: Database) -> dict[tuple[str, str], bool]:
    """(table or view, column) -> whether a row must give it a value."""
    look = inspect(database.engine)
    return {
        (name, column["name"]): not column["nullable"] and column["default"] is None
        for name in [*look.get_table_names(), *look.get_view_names()]
        for column in look.get_columns(name)
    }


# --- what an upgrade keeps


def value(column: Column[Any], number: int) -> object:
    """Something of a reflected column's type, another for each number."""
    if column.name == "state":
        return "succeeded"
    if isinstance(column.type, String):  # SQLite keeps times as text
        return f"2026-01-31T12:00:00.{number:06d}Z" if column.type.length == 27 else f"{column.name} {number} 雨"
    if isinstance(column.type, DateTime):
        return utc_now()
    for kind, made in (
        (Boolean, True), (Integer, number), (Float, number / 4), (LargeBinary, bytes([number])),
        ((JSON, JSONB), {"a": [number, "雨"]}),
    ):  # fmt: skip
        if isinstance(column.type, kind):
            return made
    raise AssertionError(f"no value for {column!r}")


def source(column: Column[Any]) -> Column[Any]:
    """The column whose values it has: its own, or those it refers to."""
    return next((key.column for key in column.foreign_keys), column)


def fill(database: Database, tables: list[Table]) -> None:
    with database.engine.begin() as connection:
        for table in tables:
            for number in (1, 2):
                row = {
                    column.name: value(
                        next(iter(column.foreign_keys)).column if column.foreign_keys else column, number
                    )
                    for column in table.columns
                }
                connection.execute(table.insert().values(row))


def contents(database: Database, tables: list[Table]) -> dict[str, list[Any]]:
    with database.engine.connect() as connection:
        return {table.name: sorted(map(tuple, connection.execute(table.select())), key=repr) for table in tables}


def test_db_upgrade_keeps_every_row_of_the_released_schema(released: Database, tweetscore: Run) -> None:
    metadata = MetaData()
    metadata.reflect(released.engine)
    tables = [table for table in metadata.sorted_tables if table.name != "alembic_version"]
    fill(released, tables)
    before = contents(released, tables)
    assert all(len(rows) >= 2 for rows in before.values())
    done = tweetscore("db", "upgrade", DATABASE_URL=released.engine.url.render_as_string(hide_password=False))
    assert (done.returncode, done.stderr) == (0, "")
    assert f"has schema {newest_revision()}" in done.stdout
    assert migrate.is_current(released)
    assert contents(released, tables) == before


def test_a_newer_schema_is_left_as_it_is_and_refused_only_when_it_says_so(database: Database) -> None:
    run(database, f"UPDATE alembic_version SET version_num = '{AFTER}'")
    migrate.upgrade(database)
    migrate.prepare(database)
    assert migrate.check(database) == AFTER
    run(database, f"UPDATE schema_compatibility SET oldest_code = '{AFTER}'")
    for ask in (migrate.upgrade, migrate.prepare, migrate.check):
        with pytest.raises(SchemaMismatch, match="upgrade tweetscore"):
            ask(database)
    database.guard = compatibility.check
    with pytest.raises(SchemaMismatch), database.begin():
        pytest.fail("a transaction that must not write began")


# --- who may bring one


@on_sqlite
def test_a_command_upgrades_sqlite_by_itself(released: Database, tweetscore: Run) -> None:
    done = tweetscore("jobs", "list", "--json", DATABASE_URL=str(released.engine.url))
    assert (done.returncode, done.stdout.strip()) == (0, "[]")
    assert migrate.is_current(released)


@on_postgresql
def test_only_db_upgrade_upgrades_postgresql_and_commands_say_so(
    database_url: str, labelled_csv: Path, monkeypatch: pytest.MonkeyPatch, tweetscore: Run
) -> None:
    monkeypatch.setenv("DATABASE_URL", database_url)
    opened = open_database(database_url)
    for revision, words in (
        (None, "the database is empty"),
        (RELEASED, f"this release needs {OLDEST_SCHEMA} or newer"),
    ):
        if revision:
            alembic_to(revision)(opened)
        for arguments in (
            "up", "demo", f"train {labelled_csv}", "jobs list", "models list", "dead list", "export", "query x",
            "delete --author 1", "db grant-worker x",
        ):  # fmt: skip
            refused = CliRunner().invoke(app, arguments.split())
            assert isinstance(refused.exception, SchemaMismatch), (arguments, refused.output, refused.exception)
        assert words in str(refused.exception)
        with pytest.raises(SchemaMismatch, match="`tweetscore db upgrade`"):
            check_health(load_settings(), "db")
        [found] = [check for check in examine(load_settings()) if check.name == "database"]
        assert (found.ok, "`tweetscore db upgrade`" in found.says) == (False, True)
    assert compatibility.find(opened).revision == RELEASED, "nobody changed it"
    done = tweetscore("jobs", "list")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: the database has schema")
    opened.close()


@on_postgresql
def test_who_only_asks_needs_no_right_to_see_the_schemas_number(database: Database, tweetscore: Run) -> None:
    """Neither the upgrade nor a look at its version: the views are all a role was given."""
    role = f"only_asks_{uuid.uuid4().hex}"
    run(database, f"CREATE ROLE {role} LOGIN")
    run(database, f"GRANT SELECT ON v_jobs TO {role}")
    try:
        url = database.engine.url.set(drivername="postgresql", username=role)
        done = tweetscore("query", "SELECT count(*) AS n FROM v_jobs", "--json", TWEETSCORE_READER_URL=str(url))
        assert (done.returncode, done.stdout.replace(" ", "").replace("\n", "")) == (0, '[{"n":0}]'), done.stderr
    finally:
        run(database, f"DROP OWNED BY {role}; DROP ROLE {role}")


@on_postgresql
def test_a_worker_beside_an_empty_database_waits_takes_no_message_and_ends_when_told(
    given: dict[str, Any], database_url: str, server: Any, tmp_path: Path
) -> None:
    given |= {"redis_url": server.url}
    with command(tmp_path / "train.log", given, "worker", "train") as trainer:
        trainer.says("waiting, and taking no work: the database is empty; let its owner run `tweetscore db upgrade`")
        wait_until(lambda: "it waits: the database is empty" in check_health(load_settings(**given), "training"))
        assert " ready." not in trainer.said()
        trainer.send(signal.SIGTERM)
        assert trainer.ended() == 0
    assert not list(load_settings(**given).run.glob("training-*"))
