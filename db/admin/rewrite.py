"""Rewrite the database files so that no deleted data remains in them, and verify the result.

Verification is necessary because neither database raises an error here. SQLite reports a blocked
`PRAGMA wal_checkpoint` only in its result row. PostgreSQL skips tables that the role may not vacuum, and keeps deleted
rows that an open transaction might still see.
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

# Tables with text of tweets, or with predictions or labels of them.
TABLES = ("tweets", "predictions", "dead_letters", "labels", "review_tweets", "review_asks")
# Time for retries of what is in use. One try waits only briefly for a lock, since other transactions queue behind it.
PATIENCE_SECONDS = 60.0
LOCK_MS = 2_000
PAUSE_SECONDS = 0.5
IN_USE = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
LOCK_NOT_AVAILABLE, DEADLOCK = "55P03", "40P01"
# The partitions of a table, or the table itself when it has none.
PARTITIONS = """
    WITH parts AS (SELECT relid, isleaf FROM pg_partition_tree(CAST(:table AS regclass)))
    SELECT CAST(relid AS text) FROM parts WHERE isleaf
    UNION ALL SELECT CAST(:table AS text) WHERE NOT EXISTS (SELECT 1 FROM parts)"""

# Does one part of the work. Returns None, or the reason why the part must be retried.
Step = Callable[[], str | None]


def rewrite(database: Database) -> None:
    """Rewrite the SQLite file, or the files of `TABLES` on PostgreSQL. Retries for a minute while they are in use.

    Raises `DatabaseError` that names what was not rewritten and the remedy.
    """
    try:
        with database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.detach()  # not returned to the pool: its timeouts differ
            sqlite = database.engine.dialect.name == "sqlite"
            _until_done(_sqlite_steps(connection) if sqlite else _postgresql_steps(connection))
    except (SQLAlchemyError, sqlite3.Error) as error:
        why = str(getattr(error, "orig", None) or error).strip().splitlines()[0]
        raise DatabaseError(_left("the database's files", f"{why}; correct that")) from error


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
        # The pause is at least as long as the last try, which takes long on large tables, so that others can proceed.
        pause = max(pause, time.monotonic() - began)
        time.sleep(pause)


def _left(where: str, why: str) -> str:
    return f"deleted data is still in {where}: {why}, then run the same `tweetscore delete` again"


# --- SQLite


def _sqlite_steps(connection: Connection) -> list[Step]:
    raw: Any = connection.connection.dbapi_connection
    raw.execute(f"PRAGMA busy_timeout={LOCK_MS}")
    vacuumed: list[bool] = []

    def step() -> str | None:
        if not vacuumed:
            try:
                raw.execute("PRAGMA auto_vacuum=INCREMENTAL")  # a file of before 0.2 changes to it
                raw.execute("VACUUM")
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode & 0xFF not in IN_USE:
                    raise
                return _left("the database file", "another program keeps it locked; end that program")
            vacuumed.append(True)
        # VACUUM writes the new pages to the write-ahead log. They reach the file once no reader needs the old pages.
        busy, _, _ = raw.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        return _left("the database file", "another program reads from it; end that program") if busy else None

    return [step]


# --- PostgreSQL


def _postgresql_steps(connection: Connection) -> list[Step]:
    connection.execute(text(f"SET lock_timeout = {LOCK_MS}"))
    files = [file for table in TABLES for file in connection.scalars(text(PARTITIONS), {"table": table})]
    return [partial(_vacuum_full, connection, file) for file in files]


def _vacuum_full(connection: Connection, table: str) -> str | None:
    """Raises `DatabaseError` when this role may not VACUUM the table."""
    file = text(f"SELECT pg_relation_filenode('{table}'), current_user")
    details: list[str] = []
    raw: Any = connection.connection.dbapi_connection
    raw.add_notice_handler(lambda notice: details.append(notice.message_detail or ""))
    before, role = connection.execute(file).one()
    try:
        # ANALYZE, since the statistics contain sample values of the columns.
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
    """Whether VACUUM kept deleted rows. Their number comes first in the message, in every language."""
    found = re.search(r"\d+", detail)
    return found is not None and int(found[0]) > 0
