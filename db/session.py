"""Engine and sessions from a URL, with the settings that SQLite and PostgreSQL need.

SQLite runs in WAL mode, so that readers never wait for the writer. A write transaction takes the write lock when it
begins: a deferred one that changes from reading to writing fails immediately with "database is locked", regardless of
the busy timeout.
"""

import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session, sessionmaker

from db.errors import DatabaseError

BUSY_TIMEOUT_MS = 30_000
LOCK_PAUSE_SECONDS = 0.002  # a window holds the lock several times as long
# Size of the PostgreSQL connection pool, one per process. A scoring worker uses connections in the thread that stores,
# the one that checks the champion and the poller; a training worker for the job and its heartbeat; both for `/metrics`,
# whose figures of quality take a second one for seconds.
# The overflow covers short work such as retention and the challenger, and one connection for as long as the worker
# looks for webhook events. With at most six each, a server of 100 connections serves sixteen workers.
POOL_SIZE, POOL_OVERFLOW = 3, 3
# SQLite reports almost every error as operational. After one of these the same statement may succeed later.
SQLITE_AWAY = frozenset(
    getattr(sqlite3, f"SQLITE_{name}")
    for name in ("BUSY", "LOCKED", "NOMEM", "READONLY", "IOERR", "FULL", "CANTOPEN", "PROTOCOL")
)
READ_ONLY_STATE = "25006"  # a standby answered during a failover


class Database:
    """One database: `begin()` opens a transaction that writes, `read()` one that only reads.

    `guard` is called at the start of each transaction that writes, and raises when the transaction must not write.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.guard: Callable[[Session], None] = lambda session: None
        self._writing = sessionmaker(engine, expire_on_commit=False)
        self._reading = sessionmaker(engine.execution_options(tweetscore_read=True), expire_on_commit=False)

    @contextmanager
    def begin(self) -> Iterator[Session]:
        with self._writing.begin() as session:
            self.guard(session)
            yield session

    @contextmanager
    def read(self) -> Iterator[Session]:
        with self._reading() as session:
            yield session

    def close(self) -> None:
        self.engine.dispose()


def open_database(url: str) -> Database:
    """A `Database` for an SQLAlchemy URL; raises `DatabaseError` for one that is neither SQLite nor PostgreSQL."""
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError) as error:
        raise DatabaseError(
            "DATABASE_URL is not a database URL; use sqlite:////path/file.db or postgresql://user@host/name"
        ) from error
    if parsed.drivername in ("postgresql", "postgres"):
        parsed = parsed.set(drivername="postgresql+psycopg")
    if parsed.get_backend_name() not in ("sqlite", "postgresql"):
        raise DatabaseError(f"DATABASE_URL names {parsed.drivername!r}; tweetscore supports sqlite and postgresql")
    try:
        if parsed.get_backend_name() == "sqlite":
            if parsed.database:
                Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
            # Parameters contain tweets, which must not reach a log through error messages.
            engine = create_engine(parsed, connect_args={"timeout": BUSY_TIMEOUT_MS / 1000}, hide_parameters=True)
            event.listen(engine, "connect", _prepare_sqlite)
            event.listen(engine, "begin", _begin_sqlite)
            return Database(engine)
        return Database(_postgresql(parsed))
    except (ImportError, ArgumentError, ValueError, TypeError, OSError) as error:
        # NoSuchModuleError is an ArgumentError. The message omits the URL, which may hold a password.
        if not isinstance(error, NoSuchModuleError):
            raise DatabaseError(f"DATABASE_URL cannot be opened ({type(error).__name__}); correct it") from error
        raise DatabaseError(
            f"DATABASE_URL names the unknown driver {parsed.drivername!r}; use sqlite or postgresql"
        ) from error


def _postgresql(url: URL) -> Engine:
    from db import connection as postgresql  # imported here, since the driver loads slowly and SQLite does not need it

    # Replaces a connection that a server restart closed before it is used, instead of failing a window.
    engine = create_engine(
        url, pool_pre_ping=True, hide_parameters=True, pool_size=POOL_SIZE, max_overflow=POOL_OVERFLOW,
        connect_args=postgresql.limits(url.query),
    )  # fmt: skip
    event.listen(engine, "do_connect", lambda _d, _r, args, given: postgresql.Connection.connect(*args, **given))
    event.listen(engine, "connect", lambda connection, _record: postgresql.prepare(connection))
    return engine


def is_away(error: BaseException) -> bool:
    """Whether the error is due to the state of the database: down, restarting, locked, full or out of connections.

    The same statement may succeed later. After such an error in a commit it is unknown whether the commit took place.
    """
    if isinstance(error, PoolTimeout):
        return True
    if not isinstance(error, DBAPIError):
        return False
    code, state = getattr(error.orig, "sqlite_errorcode", None), getattr(error.orig, "sqlstate", None)
    if code is not None:
        return code & 0xFF in SQLITE_AWAY
    limit = (state or "").startswith("54")  # program limit exceeded: a retry fails again
    operational = isinstance(error, OperationalError) and not limit
    return error.connection_invalidated or state == READ_ONLY_STATE or operational


def _prepare_sqlite(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # `_begin_sqlite` begins transactions instead of the driver
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout={BUSY_TIMEOUT_MS}")
    if cursor.execute("PRAGMA page_count").fetchone() == (0,):
        cursor.execute("PRAGMA auto_vacuum=INCREMENTAL")  # so that retention can give pages back
    cursor.execute("PRAGMA journal_mode=WAL")
    # A commit must be on disk when it returns, since its records are acknowledged next. With NORMAL a power failure
    # could lose the commits of several seconds, whose records the stream has already dropped. The first sync of a WAL
    # file also syncs its folder.
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    if connection.get_execution_options().get("tweetscore_read", False):
        connection.exec_driver_sql("BEGIN")
    elif not _write_lock_taken(connection.connection.driver_connection):
        connection.exec_driver_sql("BEGIN IMMEDIATE")  # raises, as any statement here


def _write_lock_taken(connection: Any) -> bool:
    """Begin a transaction that writes, and return whether the lock was free within `BUSY_TIMEOUT_MS`.

    SQLite by itself looks again after pauses of up to 100 ms. While several workers write, the lock would be free for
    most of a pause.
    """
    end = time.monotonic() + BUSY_TIMEOUT_MS / 1000
    connection.execute("PRAGMA busy_timeout=0")
    try:
        while time.monotonic() < end:
            try:
                connection.execute("BEGIN IMMEDIATE")
                return True
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY:
                    return False
            time.sleep(LOCK_PAUSE_SECONDS)
        return False
    finally:
        connection.execute(f"PRAGMA busy_timeout={BUSY_TIMEOUT_MS}")
