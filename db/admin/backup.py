"""Back up a SQLite database while it is in use, and restore it.

A backup is one SQLite file: the database at one moment, and the table `tweetscore_backup` with what a restore needs to
know. PostgreSQL has programs of its own for this.
"""

import os
import shutil
import sqlite3
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from sqlalchemy import make_url

from db.base import utc_now
from db.compatibility import OLDEST_CODE, REVISION, Schema, newest_revision
from db.errors import DatabaseError, InUse, NotFound, plain
from db.session import BUSY_TIMEOUT_MS

TABLE = "tweetscore_backup"
# Files that SQLite keeps beside a database in use.
COMPANIONS = ("-wal", "-shm")


@dataclass(frozen=True)
class Backup:
    """`replay_since`: records of the stream that were received before are in the backup, or were buried; None when the
    stream was not asked. `bytes` is the size of the file."""

    path: Path
    made_at: datetime
    schema: str
    replay_since: datetime | None
    bytes: int


def sqlite_file(url: str) -> Path:
    """The file of a SQLite database. Raises `DatabaseError` for PostgreSQL."""
    parsed = make_url(url)
    if parsed.get_backend_name() != "sqlite":
        raise DatabaseError(
            "PostgreSQL is backed up with pg_dump and restored with pg_restore; docs/operations.md has the commands"
        )
    if not parsed.database or parsed.database == ":memory:":
        raise DatabaseError("DATABASE_URL names a database in memory, which has no file to back up")
    return Path(parsed.database)


def backup(database: Path, path: Path, replay_since: datetime | None) -> Backup:
    """Copy a database to `path`, which is replaced when the copy is whole and checked. Workers may write meanwhile.

    `replay_since` is kept in it. Raises `NotFound` without a database, and `DatabaseError` when the copy is damaged,
    cannot be written, or would replace a file that is no backup.
    """
    if not database.is_file():
        raise NotFound(f"there is no database {plain(database)}; set TWEETSCORE_HOME or DATABASE_URL")
    if path.exists():
        try:
            _times(path)
        except DatabaseError as error:
            raise DatabaseError(f"{plain(path)} exists and is no backup; choose another path") from error
    with _errors(f"the database {plain(database)} cannot be backed up to {plain(path)}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with _beside(path) as draft:
            _copy(database, draft)
            with closing(_open(draft)) as copy:
                copy.execute("PRAGMA journal_mode=DELETE")  # one file, without companions
                copy.execute(f"CREATE TABLE {TABLE} (made_at TEXT NOT NULL, replay_since TEXT)")
                times = (utc_now().isoformat(), None if replay_since is None else replay_since.isoformat())
                copy.execute(f"INSERT INTO {TABLE} VALUES (?, ?)", times)  # noqa: S608 - a constant
            made = read_backup(draft)
            _publish(draft, path)
    return Backup(path, made.made_at, made.schema, made.replay_since, path.stat().st_size)


def read_backup(path: Path) -> Backup:
    """Check a backup and return its particulars. Raises `DatabaseError` for one that must not be restored."""
    if not path.is_file():
        raise NotFound(f"there is no backup {plain(path)}; name a file that `tweetscore db backup` wrote")
    made_at, replay_since = _times(path)
    try:
        with _reading(path) as file:
            faults = [row[0] for row in file.execute("PRAGMA integrity_check")]
            revision, oldest = file.execute(f"SELECT ({REVISION}), ({OLDEST_CODE})").fetchone()
    except sqlite3.Error as error:
        raise DatabaseError(f"the backup {plain(path)} is damaged ({error}); use another") from error
    if faults != ["ok"]:
        raise DatabaseError(f"the backup {plain(path)} is damaged ({plain(faults[0])}); use another")
    schema = Schema(revision, oldest)
    # An older schema is upgraded after the restore.
    if schema.is_foreign or (schema.misfit and revision > newest_revision()):
        raise DatabaseError(f"the backup {plain(path)} cannot be used: {schema.misfit}")
    return Backup(path, made_at, revision, replay_since, path.stat().st_size)


def _times(path: Path) -> tuple[datetime, datetime | None]:
    """`made_at` and `replay_since` of a backup; raises `DatabaseError` for another file."""
    try:
        with _reading(path) as file:
            made_at, since = file.execute(f"SELECT made_at, replay_since FROM {TABLE}").fetchone()  # noqa: S608
    except (sqlite3.Error, TypeError) as error:
        if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_CORRUPT:
            raise DatabaseError(f"the backup {plain(path)} is damaged ({error}); use another") from error
        raise DatabaseError(
            f"{plain(path)} is no backup ({error}); name a file that `tweetscore db backup` wrote"
        ) from error
    return datetime.fromisoformat(made_at), None if since is None else datetime.fromisoformat(since)


def restore(made: Backup, database: Path, force: bool = False) -> Path | None:
    """Give a database the contents of a backup, as one transaction. Returns where its old contents were put; None when
    there was no database.

    Raises `InUse` while another process has the database open, unless `force` is set: such a process then goes on with
    the restored one.
    """
    with _errors(f"{plain(made.path)} cannot be restored to {plain(database)}"):
        database.parent.mkdir(parents=True, exist_ok=True)
        aside = database.with_name(f"{database.name}.replaced-{utc_now():%Y%m%dT%H%M%S%fZ}")
        if database.is_file() and _readable(database):
            if not force and _opened(database):
                raise InUse(f"{plain(database)} is in use; stop its workers and other users, or give --force")
            _save(database, aside)
            _copy(made.path, database)
        else:
            # A database that cannot be read, or the companions of one that is lost, which SQLite would apply to a new
            # one.
            moved = [
                (database.with_name(f"{database.name}{suffix}"), aside.with_name(f"{aside.name}{suffix}"))
                for suffix in ("", *COMPANIONS)
            ]
            for old, new in moved:
                if old.exists():
                    old.replace(new)
            with _beside(database) as draft:
                shutil.copyfile(made.path, draft)
                _publish(draft, database)
        with closing(_open(database)) as restored:
            restored.execute(f"DROP TABLE {TABLE}")
    return aside if aside.exists() else None


def _save(database: Path, path: Path) -> None:
    with _beside(path) as draft:
        _copy(database, draft)
        _publish(draft, path)


def _copy(source: Path, target: Path) -> None:
    """Copy the contents of a database into another in one transaction. In one step: writers would make SQLite begin
    again after each."""
    with closing(_open(source)) as old, closing(_open(target)) as new:
        old.backup(new)


def _open(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(path, timeout=BUSY_TIMEOUT_MS / 1000, isolation_level=None)


@contextmanager
def _reading(path: Path) -> Iterator[sqlite3.Connection]:
    """A connection that creates no file, also in a folder that cannot be written."""
    with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as connection:
        yield connection


def _readable(database: Path) -> bool:
    try:
        with closing(_open(database)) as file:
            file.execute("SELECT count(*) FROM sqlite_master").fetchone()
    except sqlite3.DatabaseError as error:
        if error.sqlite_errorcode in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT):
            return False
        raise
    return True


def _opened(database: Path) -> bool:
    """Whether another connection has the database open: then the locks of an only user are refused."""
    with closing(sqlite3.connect(database, timeout=0, isolation_level=None)) as only:
        try:
            only.execute("PRAGMA locking_mode=EXCLUSIVE")
            only.execute("BEGIN EXCLUSIVE")
            only.execute("ROLLBACK")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
                return True
            raise
    return False


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """An empty private file beside `path`, which is deleted unless it was published."""
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    os.close(os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    try:
        yield draft
    finally:
        for suffix in ("", "-journal", *COMPANIONS):
            draft.with_name(f"{draft.name}{suffix}").unlink(missing_ok=True)


def _publish(draft: Path, path: Path) -> None:
    """Give a whole file its name, so that a power cut leaves the old file or the new one."""
    _sync(draft)
    draft.replace(path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _errors(what: str) -> Iterator[None]:
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise DatabaseError(f"{what}: {reason}; correct that and try again") from error
