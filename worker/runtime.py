"""Build the database, the stream and the broker from the settings."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from db import compatibility, migrate
from db.errors import RightsMissing
from db.session import Database, open_database
from worker import embedded
from worker.answers import wait_until_ready
from worker.errors import ServerFailed
from worker.redis_client import connect, connect_briefly
from worker.settings import Settings
from worker.stream import Depth, Stream

log = logging.getLogger(__name__)


def open_sql(settings: Settings) -> Database:
    """Open the database and check its schema; raises `DatabaseError` when this release cannot work with it."""
    database = open_guarded(settings)
    migrate.prepare(database)
    return database


def open_guarded(settings: Settings) -> Database:
    """Open the database without a check.

    A transaction that writes raises `SchemaMismatch` when the schema does not fit.
    """
    database = open_database(settings.sql_url)
    database.guard = compatibility.check
    return database


def open_for_queries(settings: Settings) -> Database:
    """Open the database with the role that queries use.

    Without the right to read the schema's version, skip the check.
    """
    database = open_database(settings.query_url)
    with suppress(RightsMissing):
        migrate.prepare(database)
    return database


def open_stream(settings: Settings, url: str) -> Stream:
    return Stream(connect(url), settings.stream_key, settings.group)


def stream_url(settings: Settings) -> str:
    """The URL of broker and stream, whether or not a server runs there."""
    return settings.redis_url or f"unix://{embedded.socket_path(settings.home)}"


def depth_reader(settings: Settings) -> Callable[[], Depth | None]:
    """Return a function that reads the stream's depth with a short timeout; it returns None without an embedded
    server."""
    if settings.embedded and embedded.find(settings.home) is None:
        return lambda: None
    return Stream(connect_briefly(stream_url(settings)), settings.stream_key, settings.group).depth


def wait_for_broker(settings: Settings, notify: Callable[[str], None]) -> bool:
    """Wait for a broker that stopped answering: while it loads, or while the embedded server is restarted.

    Returns False when an external broker does not answer. Raises `ServerFailed` when no process owns the embedded
    server or the restart takes too long.
    """
    if settings.embedded:
        if embedded.wait_for_server(settings.home, notify) is None and embedded.find(settings.home) is None:
            raise ServerFailed(
                f"the embedded server of {settings.home} and the process that owned it are gone; start "
                "`tweetscore up` and try again"
            )
        return True
    with connect_briefly(stream_url(settings)) as client:
        return wait_until_ready(client, 0, lambda: False, lambda loading: notify(f"waiting: the broker is {loading}"))


@contextmanager
def broker(settings: Settings, notify: Callable[[str], None] = log.warning) -> Iterator[str]:
    """Yield the broker's URL: the configured one, or the home's embedded server, which is started if necessary."""
    if settings.redis_url:
        yield settings.redis_url
        return
    with embedded.running(settings.home, settings.server_memory_mb, settings.server_sync, notify) as server:
        yield server.url
