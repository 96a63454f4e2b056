"""Engine and sessions from a URL. Knows SQLite's and PostgreSQL's habits, and no table.

SQLite runs in WAL mode, so that readers never wait for the writer. A write transaction takes the write lock when it
begins: a deferred one that turns from reading to writing fails at once with "database is locked", whatever the busy
timeout says.
"""

import sqlite3
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
# Of a PostgreSQL connection pool, one a process. A scorer has a thread that stores, one that asks which model is the
# champion and a watcher that does the same; a trainer has the job and its heartbeat; either has one for `/metrics`. The
# overflow is for moments such as retention. With at most five a worker, a server of 100 connections takes nineteen.
POOL_SIZE, POOL_OVERFLOW = 3, 2
# SQLite calls almost every error operational: of these the same statement may be free later.
SQLITE_AWAY = frozenset(
    getattr(sqlite3, f"SQLITE_{name}")
    for name in ("BUSY", "LOCKED", "NOMEM", "READONLY", "IOERR", "FULL", "CANTOPEN", "PROTOCOL")
)
READ_ONLY_STATE = "25006"  # a standby answers, its failover under way


class Database:
    """One database: `begin()` for a transaction that writes, `read()` for one that only looks.

    `guard` is called first in each transaction that writes, and raises when it must not.
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
            "DATABASE_URL is no database URL; use sqlite:////path/file.db or postgresql://user@host/name"
        ) from error
    if parsed.drivername in ("postgresql", "postgres"):
        parsed = parsed.set(drivername="postgresql+psycopg")
    if parsed.get_backend_name() not in ("sqlite", "postgresql"):
        raise DatabaseError(f"DATABASE_URL names {parsed.drivername!r}; tweetscore speaks sqlite and postgresql")
    try:
        if parsed.get_backend_name() == "sqlite":
            if parsed.database:
                Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
            # Parameters are tweets: an error that shows them would put them into a log.
            engine = create_engine(parsed, connect_args={"timeout": BUSY_TIMEOUT_MS / 1000}, hide_parameters=True)
            event.listen(engine, "connect", _prepare_sqlite)
            event.listen(engine, "begin", _begin_sqlite)
            return Database(engine)
        return Database(_postgresql(parsed))
    except (ImportError, ArgumentError, ValueError, TypeError, OSError) as error:
        # NoSuchModuleError is an ArgumentError. The URL itself is not quoted: it may hold a password.
        if not isinstance(error, NoSuchModuleError):
            raise DatabaseError(f"DATABASE_URL cannot be opened ({type(error).__name__}); mend it") from error
        raise DatabaseError(f"DATABASE_URL asks for an unknown driver {parsed.drivername!r}") from error


def _postgresql(url: URL) -> Engine:
    from db import connection as postgresql  # its driver takes long to load, and SQLite needs none

    # A connection that died with a restarted server is replaced before use instead of failing a window.
    engine = create_engine(
        url, pool_pre_ping=True, hide_parameters=True, pool_size=POOL_SIZE, max_overflow=POOL_OVERFLOW,
        connect_args=postgresql.limits(url.query),
    )  # fmt: skip
    event.listen(engine, "do_connect", lambda _d, _r, args, given: postgresql.Connection.connect(*args, **given))
    event.listen(engine, "connect", lambda connection, _record: postgresql.prepare(connection))
    return engine


def is_away(error: BaseException) -> bool:
    """Whether the database is to blame and not what it was asked: down, restarting, locked, full, out of connections.

    The same statement may succeed later. Of a commit that fails this way nobody can tell whether it was made.
    """
    if isinstance(error, PoolTimeout):
        return True
    if not isinstance(error, DBAPIError):
        return False
    code, state = getattr(error.orig, "sqlite_errorcode", None), getattr(error.orig, "sqlstate", None)
    if code is not None:
        return code & 0xFF in SQLITE_AWAY
    limit = (state or "").startswith("54")  # a statement that is too large stays too large
    operational = isinstance(error, OperationalError) and not limit
    return error.connection_invalidated or state == READ_ONLY_STATE or operational


def _prepare_sqlite(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # the begin event below speaks for the driver
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout={BUSY_TIMEOUT_MS}")
    cursor.execute("PRAGMA journal_mode=WAL")
    # A commit is on disk when it returns, and only then are its records acknowledged. With NORMAL a power cut could
    # take the commits of many seconds, whose records the stream has given up. The first sync of a WAL file also syncs
    # the folder it was made in.
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    reading = connection.get_execution_options().get("tweetscore_read", False)
    connection.exec_driver_sql("BEGIN" if reading else "BEGIN IMMEDIATE")
