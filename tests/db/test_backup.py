"""Backups of a SQLite database: taken while it is written, checked, and put in its place as a whole."""

import sqlite3
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from db import compatibility, migrate
from db.admin.backup import TABLE, backup, read_backup, restore, sqlite_file
from db.errors import DatabaseError, InUse, NotFound
from db.session import Database, open_database
from tests.conftest import PATIENCE_SECONDS, wait_until
from tests.support.rows import tweet_row, write

SINCE = datetime(2026, 11, 24, 12, tzinfo=UTC)


def file_of(database: Database) -> Path:
    return Path(str(database.engine.url.database))


def ids_in(path: Path) -> set[str]:
    with closing(sqlite3.connect(path)) as file:
        return {row[0] for row in file.execute("SELECT tweet_id FROM tweets")}


def add(database: Database, *ids: str) -> None:
    write(database, [tweet_row(id_) for id_ in ids], [])


@contextmanager
def writing(database: Database) -> Iterator[Callable[[], int]]:
    """Write tweets one by one during the block; yields how many there are."""
    written, enough = [0], threading.Event()

    def write_on() -> None:
        while not enough.is_set():
            add(database, f"{written[0]:06}")
            written[0] += 1

    thread = threading.Thread(target=write_on)
    thread.start()
    try:
        yield lambda: written[0]
    finally:
        enough.set()
        thread.join(PATIENCE_SECONDS)


def test_a_backup_holds_what_was_committed_before_it_and_nothing_half(sqlite: Database, tmp_path: Path) -> None:
    path = tmp_path / "backups" / "one.db"
    with writing(sqlite) as written:
        wait_until(lambda: written() > 50)
        before = written()
        made = backup(file_of(sqlite), path, SINCE)
        after = written()
        wait_until(lambda: written() > after)  # the writer goes on
    ids = ids_in(path)
    assert before <= len(ids) <= after + 1
    assert ids == {f"{i:06}" for i in range(len(ids))}
    assert (made.replay_since, made.schema, made.bytes) == (SINCE, compatibility.newest_revision(), path.stat().st_size)
    assert read_backup(path) == made
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [file.name for file in path.parent.iterdir()] == ["one.db"]  # a single file, and no draft


def test_an_older_backup_is_replaced_and_any_other_file_is_not(sqlite: Database, tmp_path: Path) -> None:
    path, notes = tmp_path / "one.db", tmp_path / "notes.txt"
    backup(file_of(sqlite), path, None)
    add(sqlite, "7")
    backup(file_of(sqlite), path, None)
    assert ids_in(path) == {"7"}
    notes.write_text("mine")
    for other in (notes, file_of(sqlite)):
        with pytest.raises(DatabaseError, match="is no backup"):
            backup(file_of(sqlite), other, None)
    assert notes.read_text() == "mine"
    assert ids_in(file_of(sqlite)) == {"7"}


def test_a_restored_database_is_the_one_of_the_backup_and_the_old_one_is_kept(sqlite: Database, tmp_path: Path) -> None:
    path, place = tmp_path / "one.db", file_of(sqlite)
    add(sqlite, "1")
    made = backup(place, path, SINCE)
    add(sqlite, "2")
    sqlite.close()
    aside = restore(made, place)
    assert aside is not None
    assert (ids_in(place), ids_in(aside)) == ({"1"}, {"1", "2"})
    assert {stat.S_IMODE(file.stat().st_mode) & 0o077 for file in (aside, path)} == {0}
    opened = open_database(f"sqlite:///{place}")
    assert migrate.check(opened) == compatibility.newest_revision()
    with opened.begin() as session:
        assert session.connection().exec_driver_sql(f"SELECT 1 FROM sqlite_master WHERE name = '{TABLE}'").all() == []
    opened.close()


def test_a_lost_database_comes_back_without_the_log_of_the_old_one(sqlite: Database, tmp_path: Path) -> None:
    """SQLite would apply a log that was left behind to the new file."""
    path, place = tmp_path / "one.db", file_of(sqlite)
    add(sqlite, "1")
    made = backup(place, path, None)
    add(sqlite, "2")
    log = place.with_name(f"{place.name}-wal")
    left = log.read_bytes()
    assert left
    sqlite.close()
    place.unlink()
    log.write_bytes(left)
    restore(made, place)
    assert ids_in(place) == {"1"}
    assert [file.name for file in tmp_path.glob(f"{place.name}.replaced-*")] != []


def test_a_damaged_database_is_put_aside_as_it_is(sqlite: Database, tmp_path: Path) -> None:
    path, place = tmp_path / "one.db", file_of(sqlite)
    add(sqlite, "1")
    made = backup(place, path, None)
    sqlite.close()
    place.write_bytes(b"no database" * 1000)
    aside = restore(made, place)
    assert aside is not None
    assert aside.read_bytes() == b"no database" * 1000
    assert ids_in(place) == {"1"}
    assert stat.S_IMODE(place.stat().st_mode) == 0o600


def test_a_database_in_use_is_restored_only_by_force_and_its_user_goes_on(sqlite: Database, tmp_path: Path) -> None:
    path, place = tmp_path / "one.db", file_of(sqlite)
    add(sqlite, "1")
    made = backup(place, path, None)
    add(sqlite, "2")  # its connection stays open
    with pytest.raises(InUse, match="--force"):
        restore(made, place)
    assert ids_in(place) == {"1", "2"}
    with writing(sqlite) as written:
        wait_until(lambda: written() > 20)
        restore(made, place, force=True)
        after = written()
        wait_until(lambda: written() > after + 20)
    assert "2" not in ids_in(place)
    with sqlite.read() as session:
        assert session.connection().exec_driver_sql("PRAGMA integrity_check").scalar() == "ok"


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 4096] = bytes(4096)
    path.write_bytes(data)


def newer(path: Path) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as file:
        file.execute("UPDATE alembic_version SET version_num = '9999'")
        file.execute("UPDATE schema_compatibility SET oldest_code = '9999'")


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (flip, "is damaged"),
        (lambda path: path.write_bytes(path.read_bytes()[:5000]), "is damaged|is no backup"),
        (lambda path: path.write_text("something else"), "is no backup"),
        (newer, "upgrade tweetscore"),
    ],
)
def test_a_backup_that_cannot_be_used_replaces_nothing(
    sqlite: Database, tmp_path: Path, spoil: Callable[[Path], Any], complaint: str
) -> None:
    path = tmp_path / "one.db"
    add(sqlite, *(str(i) for i in range(300)))
    backup(file_of(sqlite), path, None)
    spoil(path)
    with pytest.raises(DatabaseError, match=complaint):
        read_backup(path)


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="there is no backup"):
        read_backup(tmp_path / "none.db")
    with pytest.raises(NotFound, match="there is no database"):
        backup(tmp_path / "none.db", tmp_path / "one.db", None)
    with pytest.raises(DatabaseError, match="pg_dump"):
        sqlite_file("postgresql://host/name")
    with pytest.raises(DatabaseError, match="in memory"):
        sqlite_file("sqlite://")
