"""Run queries of users read-only, on connections that are separate from those of the workers."""

import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psycopg
from sqlalchemy import URL, make_url, text
from sqlalchemy.dialects.postgresql.psycopg import dialect as psycopg_dialect
from sqlalchemy.exc import ArgumentError

from db.connection import connect
from db.errors import DatabaseError, shown

STATEMENT_TIMEOUT_MS = 60_000
# Interval of the timeout check in instructions of SQLite's virtual machine: about a hundred checks per second.
STEPS_BETWEEN_CHECKS = 100_000
PSYCOPG = psycopg_dialect()  # type: ignore[no-untyped-call]
READING = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}

Result = tuple[list[str], Iterator[Sequence[Any]]]


@contextmanager
def run_query(url: str, sql: str, parameters: Mapping[str, Any] | None = None) -> Iterator[Result]:
    """Column names and streamed rows of one SELECT. Raises `DatabaseError` with the message of the database.

    With `parameters`, `:name` in the query stands for a value of theirs.
    """
    parsed = _checked(url, sql)
    try:
        if parsed.get_backend_name() == "sqlite":
            with _query_sqlite(parsed.database or "", sql, parameters) as result:
                yield result
        else:
            with _query_postgresql(
                parsed.set(drivername="postgresql").render_as_string(hide_password=False), sql, parameters
            ) as result:
                yield result
    except (sqlite3.Error, psycopg.Error) as error:
        message = str(error).strip() or type(error).__name__
        raise DatabaseError(f"the query was refused: {message.splitlines()[0]}") from error


def _checked(url: str, sql: str) -> URL:
    """Parse the URL. Raises `DatabaseError` for input on which a driver would fail without a clear message."""
    try:
        sql.encode()
        valid = "\x00" not in sql
    except (UnicodeEncodeError, AttributeError):
        valid = False
    if not valid:
        raise DatabaseError(f"the query {shown(sql)} is not valid text; pass one SELECT as a string without NUL")
    try:
        return make_url(url)
    except (ArgumentError, ValueError) as error:
        raise DatabaseError(
            "the database URL cannot be parsed; use sqlite:////path/file.db or postgresql://user@host/name"
        ) from error


@contextmanager
def _query_sqlite(path: str, sql: str, parameters: Mapping[str, Any] | None) -> Iterator[Result]:
    if not Path(path).is_file():
        raise DatabaseError(f"there is no database {path} yet; run `tweetscore demo` or `tweetscore up` first")
    place = f"file:{quote(path)}?mode=ro"
    # The garbage collector may close the connection on another thread than the one that opened it.
    with closing(sqlite3.connect(place, uri=True, timeout=30, check_same_thread=False)) as connection:
        # mode=ro protects this file; the authorizer denies ATTACH and PRAGMA, which could reach other files.
        connection.set_authorizer(lambda action, *_: sqlite3.SQLITE_OK if action in READING else sqlite3.SQLITE_DENY)
        timeout = RowTimeout()
        connection.set_progress_handler(timeout.expired, STEPS_BETWEEN_CHECKS)
        cursor = connection.execute(sql, parameters or {})
        if cursor.description is None:
            raise DatabaseError("the query returns no rows; use SELECT")
        yield [column[0] for column in cursor.description], timeout.watch(cursor)


class RowTimeout:
    """Interrupts a query whose next row takes too long, like PostgreSQL's statement timeout."""

    def __init__(self) -> None:
        self._began = time.monotonic()

    def expired(self) -> bool:
        return time.monotonic() - self._began > STATEMENT_TIMEOUT_MS / 1000

    def watch(self, rows: Iterator[Sequence[Any]]) -> Iterator[Sequence[Any]]:
        self._began = time.monotonic()  # the time until the caller fetches does not count
        for row in rows:
            yield row
            self._began = time.monotonic()


@contextmanager
def _query_postgresql(url: str, sql: str, parameters: Mapping[str, Any] | None) -> Iterator[Result]:
    if parameters is not None:
        sql = str(text(sql).compile(dialect=PSYCOPG))  # :name -> %(name)s
    with connect(url, options=f"-c statement_timeout={STATEMENT_TIMEOUT_MS}") as connection:
        connection.read_only = True
        # PostgreSQL declares a cursor only for a single SELECT: no COPY to a file on the server, no second statement.
        # The rows arrive in portions.
        with connection.cursor(name="answer") as cursor:
            cursor.execute(sql.strip().rstrip(";").encode(), parameters)
            yield [column.name for column in cursor.description or ()], iter(cursor)
