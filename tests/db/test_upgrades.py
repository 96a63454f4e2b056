"""Schemas and releases: which work together, what an upgrade keeps, and who may bring one."""

import signal
import subprocess
import uuid
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import pytest
from alembic.script import ScriptDirectory
from sqlalchemy import Boolean, Column, Date, DateTime, Float, Integer, LargeBinary, MetaData, String, Table, inspect
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.types import JSON
from typer.testing import CliRunner

from db import compatibility, migrate
from db.compatibility import DEVELOPMENT_OLDEST_CODE, MIGRATIONS, OLDEST_SCHEMA, Schema, newest_revision
from db.errors import SchemaMismatch
from db.models import Base, utc_now
from db.session import Database, open_database
from tests.conftest import wait_until
from tests.support.commands import command as running
from tests.support.releases import (
    CONTRACTS,
    DEMANDS,
    EXPANDS,
    NEXT,
    RENAMES,
    config,
    next_chain,
    next_release,
    upgrade_to,
    with_mood,
)  # fmt: skip
from tests.support.rows import answer, assert_counted, prediction_row, run, tweet_row, write
from tests.support.world import on_postgresql, on_sqlite
from worker.cli.doctor import examine
from worker.cli.main import app
from worker.process.health import check_health
from worker.settings import Settings, load_settings

NEWEST = newest_revision()
Run = Callable[..., subprocess.CompletedProcess[str]]


def revisions_of(migrations: Path) -> list[str]:
    return [script.revision for script in ScriptDirectory.from_config(config(migrations)).walk_revisions()][::-1]


REVISIONS = revisions_of(MIGRATIONS)


@pytest.fixture
def empty(database_url: str) -> Iterator[Database]:
    """A database without a schema, of each kind in turn."""
    opened = open_database(database_url)
    yield opened
    opened.close()


# --- which work together


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        (Schema(None, None), "the database is empty; let its owner run `tweetscore db upgrade`"),
        (Schema("0000", "0000"), f"schema 0000, this release needs {OLDEST_SCHEMA} or newer; let its owner run"),
        (Schema(OLDEST_SCHEMA, OLDEST_SCHEMA), None),
        (Schema(NEWEST, OLDEST_SCHEMA), None),
        (Schema(NEWEST, NEXT), None),  # older code cannot work with it; this code contains the migration
        (Schema(NEXT, OLDEST_SCHEMA), None),
        (Schema(NEXT, NEWEST), None),
        (Schema(NEXT, NEXT), f"releases with migration {NEXT} or newer, this release ends at {NEWEST}; upgrade"),
        (Schema(NEXT, None), f"schema '{NEXT}' of a development version before 0.1.0 or of another program"),
        (Schema("0008", DEVELOPMENT_OLDEST_CODE), "schema '0008' of a development version before 0.1.0"),
    ],
)
def test_code_and_schema_work_together_unless_one_lacks_what_the_other_needs(schema: Schema, says: str | None) -> None:
    assert (schema.misfit is None) == (says is None)
    assert (says or "") in (schema.misfit or "")


def test_migrations_follow_each_other_as_their_numbers_do() -> None:
    """The numbers alone decide which schema and which code is newer."""
    assert sorted(REVISIONS) == REVISIONS
    assert [len(revision) for revision in REVISIONS] == [4] * len(REVISIONS)


def test_the_newest_revision_is_read_from_the_file_names(tmp_path: Path) -> None:
    assert newest_revision() == REVISIONS[-1]
    with next_chain(tmp_path, EXPANDS) as chain:
        assert newest_revision() == NEXT
        assert revisions_of(chain) == [*REVISIONS, NEXT]
    assert newest_revision() == REVISIONS[-1]


def test_the_oldest_schema_has_all_that_the_models_name_and_no_older_one_has(empty: Database) -> None:
    lacking = {}
    for revision in REVISIONS:
        upgrade_to(empty, revision)
        assert not compatibility.find(empty).is_foreign
        there = {(t, c["name"]) for t in inspect(empty.engine).get_table_names() for c in columns(empty, t)}
        lacking[revision] = {(t.name, c.name) for t in Base.metadata.tables.values() for c in t.columns} - there
    assert min(revision for revision in REVISIONS if not lacking[revision]) == OLDEST_SCHEMA


@on_postgresql
@pytest.mark.parametrize(
    ("migration", "breaks"),
    [(EXPANDS, []), (CONTRACTS, []), (RENAMES, [NEXT]), (DEMANDS, [NEXT])],
    ids=["expands", "contracts", "renames", "demands"],
)
def test_a_migration_that_takes_away_or_demands_raises_the_oldest_code(
    empty: Database, tmp_path: Path, migration: tuple[str, str], breaks: list[str]
) -> None:
    """Applies to every real migration and to the next one, whatever it does."""
    with next_chain(tmp_path, migration) as chain:
        assert unannounced(empty, chain) == breaks


def unannounced(database: Database, migrations: Path) -> list[str]:
    """Migrations that remove what older code selects, or require a value that it does not give, without saying so."""
    found = []
    first, *later = revisions_of(migrations)
    upgrade_to(database, first, migrations)
    before, code = described(database), first
    for revision in later:
        upgrade_to(database, revision, migrations)
        after = described(database)
        gone = before.keys() - after.keys()
        demanded = {key for key in after.keys() - before.keys() if key[0] in {t for t, _ in before} and after[key]}
        if (gone or demanded) and str(compatibility.find(database).oldest_code) <= code:
            found.append(revision)
        before, code = after, revision
    return found


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


# Columns that a constraint restricts.
ALLOWED = {
    ("training_jobs", "state"): "succeeded",
    ("labels", "source"): "review",
    ("review_tweets", "reason"): "random",
    ("review_asks", "state"): "labelled",
}


def value(column: Column[Any], number: int) -> object:
    """Something of a reflected column's type, another for each number."""
    if allowed := ALLOWED.get((column.table.name, column.name)):
        return allowed
    if isinstance(column.type, String):  # SQLite keeps times as text
        return f"2026-01-31T12:00:00.{number:06d}Z" if column.type.length == 27 else f"{column.name} {number} 雨"
    if isinstance(column.type, DateTime):
        return utc_now()
    for kind, made in (
        (Boolean, True), (Integer, number), (Float, number / 4), (LargeBinary, bytes([number])),
        (Date, date(2026, 1, number)), ((JSON, JSONB), {"a": [number, "雨"]}),
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


def tables_of(database: Database) -> list[Table]:
    metadata = MetaData()
    metadata.reflect(database.engine)
    own = ("alembic_version", "schema_compatibility")
    tables = [t for t in metadata.sorted_tables if t.name not in own and not migrate.PARTITION.fullmatch(t.name)]
    return sorted(tables, key=lambda table: table.name == "predictions")  # after tweets and models: triggers need them


@pytest.mark.parametrize("revision", REVISIONS)
def test_an_upgrade_keeps_every_row_of_every_released_schema(empty: Database, tmp_path: Path, revision: str) -> None:
    upgrade_to(empty, revision)
    tables = tables_of(empty)
    fill(empty, tables)
    before = contents(empty, tables)
    assert all(len(rows) >= 2 for rows in before.values())
    with next_chain(tmp_path, EXPANDS):
        assert not migrate.is_current(empty)
        migrate.upgrade(empty)
        assert migrate.is_current(empty)
        assert migrate.check(empty) == NEXT
    assert contents(empty, tables) == before
    assert answer(empty, "SELECT DISTINCT mood FROM tweets") == [("unknown",)]


@pytest.mark.parametrize("revision", REVISIONS)
def test_views_and_sums_after_an_upgrade_hold_what_was_there_before(
    empty: Database, tmp_path: Path, revision: str
) -> None:
    upgrade_to(empty, REVISIONS[0])
    first_rows(empty)
    upgrade_to(empty, revision)
    with next_chain(tmp_path, EXPANDS):
        migrate.upgrade(empty)
    assert_counted(empty)
    assert answer(empty, "SELECT tweet_id, text, label FROM v_predictions_current ORDER BY 1") == [
        ("1", "雨", "n"), ("2", "晴れ", "p")
    ]  # fmt: skip
    assert answer(empty, "SELECT topic, tweets, mean_score FROM v_topic_sentiment ORDER BY label") == [
        ("天気", 1, -0.5), (None, 1, 0.5)
    ]  # fmt: skip
    assert answer(empty, "SELECT epochs, best_valid_f1_macro FROM v_jobs") == [(2, 0.9)]
    write(empty, [tweet_row("3", tweet_created_at=datetime(2026, 1, 31, 12, tzinfo=UTC))], [prediction_row("3", 1)])
    assert_counted(empty)
    assert answer(empty, "SELECT count(DISTINCT hour_utc), sum(tweets) FROM v_sentiment_hourly") == [(1, 3)]


def first_rows(database: Database) -> None:
    """A job with two epochs, its model as the champion, and two tweets that it scored, in the first schema."""
    created = "'2026-01-31T12:34:56.000000Z'" if database.engine.dialect.name == "sqlite" else "'2026-01-31 12:34:56Z'"
    for sql in (
        f"""INSERT INTO training_jobs (id, request_id, state, config, dataset, fencing_token, attempts,
            cancel_requested, step, submitted_at)
            VALUES (1, 'a', 'succeeded', '{{}}', 'd.csv', 1, 1, false, 2, {created})""",
        "INSERT INTO epoch_metrics VALUES (1, 1, 0.5, 1e-4, 0.5, 0.9, 0.9, 1.0, true)",
        "INSERT INTO epoch_metrics VALUES (1, 2, 0.4, 1e-5, 0.6, 0.8, 0.8, 1.0, false)",
        f"""INSERT INTO model_versions (id, job_id, base_model, artifact_url, sha256, labels, cleaner_version,
            temperature, created_at) VALUES (1, 1, 'b', 'file:///m', '0', '["n", "p"]', '1', 1.0, {created})""",
        f"INSERT INTO model_aliases (alias, model_version_id, assigned_at) VALUES ('champion', 1, {created})",
        f"INSERT INTO tweets (tweet_id, text, topic, received_at) VALUES ('1', '雨', '天気', {created})",
        f"INSERT INTO tweets (tweet_id, text, received_at) VALUES ('2', '晴れ', {created})",
        f"INSERT INTO predictions VALUES ('1', 1, 'n', 0.75, -0.5, '{{}}', {created})",
        f"INSERT INTO predictions VALUES ('2', 1, 'p', 0.5, 0.5, '{{}}', {created})",
    ):
        run(database, sql)


@pytest.mark.parametrize(
    ("revision", "oldest_code"),
    [("0008", "0005"), ("0006", "0005"), ("0003", None), ("0001", None), ("1975ea83b712", None)],
)
def test_a_database_of_a_development_version_is_refused_and_stays_as_it_is(
    database: Database, tmp_path: Path, revision: str, oldest_code: str | None
) -> None:
    """By this release, which has fewer migrations, and by a later one, which has some with the same numbers."""
    run(database, f"UPDATE alembic_version SET version_num = '{revision}'")
    if oldest_code:
        run(database, f"UPDATE schema_compatibility SET oldest_code = '{oldest_code}'")
    else:
        run(database, "DROP TABLE schema_compatibility")
    before = described(database)
    for migration in (None, EXPANDS):
        with next_chain(tmp_path, migration) if migration else nullcontext():
            for ask in (migrate.upgrade, migrate.prepare, migrate.check):
                with pytest.raises(SchemaMismatch, match=f"schema '{revision}' of a development .* to a new database"):
                    ask(database)
    assert described(database) == before
    assert compatibility.find(database).revision == revision


def test_a_newer_schema_is_left_as_it_is_and_refused_only_when_it_says_so(database: Database) -> None:
    run(database, f"UPDATE alembic_version SET version_num = '{NEXT}'")
    migrate.upgrade(database)
    migrate.prepare(database)
    assert migrate.check(database) == NEXT
    run(database, f"UPDATE schema_compatibility SET oldest_code = '{NEXT}'")
    for ask in (migrate.upgrade, migrate.prepare, migrate.check):
        with pytest.raises(SchemaMismatch, match="upgrade tweetscore"):
            ask(database)
    database.guard = compatibility.check
    with pytest.raises(SchemaMismatch), database.begin():
        pytest.fail("a transaction that must not write began")


# --- who may bring one


@on_sqlite
def test_a_command_upgrades_sqlite_by_itself(database: Database, settings: Settings, tmp_path: Path) -> None:
    settings = settings.model_copy(update={"database_url": str(database.engine.url)})
    newer = next_release(tmp_path / "newer", EXPANDS, with_mood)
    done = newer.run(settings, "worker.cli.main", "jobs", "list", "--json")
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr
    assert compatibility.find(database).revision == NEXT


@on_postgresql
def test_only_db_upgrade_upgrades_postgresql_and_commands_say_so(
    empty: Database, database_url: str, labelled_csv: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DATABASE_URL", database_url)
    for revision, words in ((None, "the database is empty"), (NEWEST, f"this release needs {NEXT} or newer")):
        if revision:
            upgrade_to(empty, revision)
        with next_chain(tmp_path / str(revision), EXPANDS, oldest_schema=NEXT):
            assert_commands_refuse(labelled_csv, words)
    assert compatibility.find(empty).revision == NEWEST, "no command changed it"
    newer = next_release(tmp_path / "newer", EXPANDS, with_mood)
    done = newer.run(load_settings(), "worker.cli.main", "jobs", "list")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: the database has schema")
    newer.upgrades(load_settings())
    assert compatibility.find(empty).revision == NEXT


def assert_commands_refuse(labelled_csv: Path, words: str) -> None:
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
    assert (found.ok, "`tweetscore db upgrade`" in found.finding) == (False, True)


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


@pytest.mark.slow
@on_postgresql
def test_a_worker_beside_an_empty_database_waits_takes_no_message_and_ends_when_told(
    given: dict[str, Any], database_url: str, server: Any, tmp_path: Path
) -> None:
    given |= {"redis_url": server.url}
    with running(tmp_path / "train.log", given, "worker", "train") as trainer:
        trainer.says("waiting, and taking no work: the database is empty; let its owner run `tweetscore db upgrade`")
        wait_until(lambda: "it waits: the database is empty" in check_health(load_settings(**given), "training"))
        assert " ready." not in trainer.said()
        trainer.send(signal.SIGTERM)
        assert trainer.ended() == 0
    assert not list(load_settings(**given).run.glob("training-*"))
