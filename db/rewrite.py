"""Rewrite the files behind the tables, so that nothing of what was deleted is left in them, and look whether it is so.

Both databases refuse quietly: SQLite answers `PRAGMA wal_checkpoint` with a row that says it was busy, PostgreSQL skips
a table that the role may not vacuum, and keeps deleted rows that an open transaction might still see.
"""

import re
import sqlite3
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from sqlalchemy import Connection, text
from sqlalchemy.exc import OperationalError, SQLAlchemyError

from db.errors import DatabaseError
from db.session import Database

# Tables that hold what a tweet says, or what was said of it.
TABLES = ("tweets", "predictions", "dead_letters")
# What is in use is tried again for so long. One try waits only briefly for a lock: whoever comes behind it waits too.
PATIENCE_SECONDS = 60.0
LOCK_MS = 2_000
PAUSE_SECONDS = 0.5
IN_USE = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
LOCK_NOT_AVAILABLE, DEADLOCK = "55P03", "40P01"

# Does its part, or returns why that is not possible now.
Step = Callable[[], str | None]


def rewrite(database: Database) -> None:
    """Rewrite the database file, or the tables' files on PostgreSQL; what is in use is tried again for a minute.

    Raises `DatabaseError` with a sentence on what is left, and what to do about it.
    """
    try:
        with database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.detach()  # closed afterwards: its timeouts are not for others
            sqlite = database.engine.dialect.name == "sqlite"
            _until_done(_sqlite_steps(connection) if sqlite else _postgresql_steps(connection))
    except (SQLAlchemyError, sqlite3.Error) as error:
        why = str(getattr(error, "orig", None) or error).strip().splitlines()[0]
        raise DatabaseError(_left("the database's files", f"{why}; mend that")) from error


def _until_done(steps: list[Step]) -> None:
    ends, pause = time.monotonic() + PATIENCE_SECONDS, PAUSE_SECONDS
    while True:
        began = time.monotonic()
        left = [(step, why) for step in steps if (why := step()) is not None]
        if not left:
            return
        if time.monotonic() > ends:
            raise DatabaseError("; ".join(dict.fromkeys(why for _, why in left)))
        steps = [step for step, _ in left]
        # Others have at least as long as a try took, which is long where tables are large.
        pause = max(pause, time.monotonic() - began)
        time.sleep(pause)


def _left(where: str, why: str) -> str:
    return f"what was deleted is still in {where}: {why}, then say the same `tweetscore delete` again"


# --- SQLite


def _sqlite_steps(connection: Connection) -> list[Step]:
    raw: Any = connection.connection.dbapi_connection
    raw.execute(f"PRAGMA busy_timeout={LOCK_MS}")
    vacuumed: list[bool] = []

    def step() -> str | None:
        if not vacuumed:
            try:
                raw.execute("VACUUM")
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode & 0xFF not in IN_USE:
                    raise
                return _left("the database file", "another program keeps it locked; end that program")
            vacuumed.append(True)
        # The new pages are in the write-ahead log; the file has them when no reader needs the old ones any more.
        busy, _, _ = raw.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        return _left("the database file", "another program reads from it; end that program") if busy else None

    return [step]


# --- PostgreSQL


def _postgresql_steps(connection: Connection) -> list[Step]:
    connection.execute(text(f"SET lock_timeout = {LOCK_MS}"))
    return [partial(_vacuum_full, connection, table) for table in TABLES]


def _vacuum_full(connection: Connection, table: str) -> str | None:
    """Raises `DatabaseError` when this role may not do it."""
    file = text(f"SELECT pg_relation_filenode('{table}'), current_user")
    details: list[str] = []
    raw: Any = connection.connection.dbapi_connection
    raw.add_notice_handler(lambda notice: details.append(notice.message_detail or ""))
    before, role = connection.execute(file).one()
    try:
        # Statistics too: they hold samples of what is in a column.
        connection.execute(text(f"VACUUM (FULL, ANALYZE, VERBOSE) {table}"))
    except OperationalError as error:
        if getattr(error.orig, "sqlstate", None) not in (LOCK_NOT_AVAILABLE, DEADLOCK):
            raise
        return _left("the tables' files", "an open transaction keeps a table locked; end it")
    if connection.execute(file).one()[0] == before:
        raise DatabaseError(
            _left(
                "the tables' files",
                f"{role} may not VACUUM them; name their owner in DATABASE_URL, or from PostgreSQL 17 on let the owner "
                f"run `tweetscore db grant-worker {role}`",
            )
        )
    if any(map(_rows_kept, details)):
        return _left("the tables' files", "an open transaction may still see it; end that transaction")
    return None


def _rows_kept(detail: str) -> bool:
    """Whether VACUUM had to keep deleted rows: it tells their number first, in every language."""
    found = re.search(r"\d+", detail)
    return found is not None and int(found[0]) > 0
