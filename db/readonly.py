"""Questions from outside, asked so that they cannot write. Opens connections of its own, never the workers'."""

import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psycopg
from sqlalchemy import make_url

from db.connection import connect
from db.errors import DatabaseError

STATEMENT_TIMEOUT_MS = 60_000
# How often SQLite looks at the clock, in steps of its virtual machine: some hundred times a second.
STEPS_BETWEEN_LOOKS = 100_000
READING = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}

Answer = tuple[list[str], Iterator[Sequence[Any]]]


@contextmanager
def ask(url: str, sql: str) -> Iterator[Answer]:
    """Column names and rows of one SELECT, streamed; raises `DatabaseError` with the database's own words."""
    parsed = make_url(url)
    try:
        if parsed.get_backend_name() == "sqlite":
            with _ask_sqlite(parsed.database or "", sql) as answer:
                yield answer
        else:
            with _ask_postgresql(
                parsed.set(drivername="postgresql").render_as_string(hide_password=False), sql
            ) as answer:
                yield answer
    except (sqlite3.Error, psycopg.Error) as error:
        raise DatabaseError(f"the query was refused: {str(error).strip().splitlines()[0]}") from error


@contextmanager
def _ask_sqlite(path: str, sql: str) -> Iterator[Answer]:
    if not Path(path).is_file():
        raise DatabaseError(f"there is no database {path} yet; run `tweetscore demo` or `tweetscore up` first")
    with closing(sqlite3.connect(f"file:{quote(path)}?mode=ro", uri=True, timeout=30)) as connection:
        # mode=ro guards this file; the authorizer also keeps ATTACH and PRAGMA from reaching others.
        connection.set_authorizer(lambda action, *_: sqlite3.SQLITE_OK if action in READING else sqlite3.SQLITE_DENY)
        clock = Clock()
        connection.set_progress_handler(clock.is_up, STEPS_BETWEEN_LOOKS)
        cursor = connection.execute(sql)
        if cursor.description is None:
            raise DatabaseError("the query gives no rows; ask with SELECT")
        yield [column[0] for column in cursor.description], clock.each(cursor)


class Clock:
    """Ends a question whose next row does not come in time, as PostgreSQL's statement timeout does."""

    def __init__(self) -> None:
        self._began = time.monotonic()

    def is_up(self) -> bool:
        return time.monotonic() - self._began > STATEMENT_TIMEOUT_MS / 1000

    def each(self, rows: Iterator[Sequence[Any]]) -> Iterator[Sequence[Any]]:
        for row in rows:
            yield row
            self._began = time.monotonic()


@contextmanager
def _ask_postgresql(url: str, sql: str) -> Iterator[Answer]:
    with connect(url, options=f"-c statement_timeout={STATEMENT_TIMEOUT_MS}") as connection:
        connection.read_only = True
        # A cursor is declared for one SELECT and nothing else: no COPY to a file of the server's, nothing behind a
        # semicolon. Its rows come in portions.
        with connection.cursor(name="answer") as cursor:
            cursor.execute(sql.strip().rstrip(";").encode())
            yield [column.name for column in cursor.description or ()], iter(cursor)
