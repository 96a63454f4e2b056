"""From settings to the things the routes work with: database, stream, workshop. One place that knows how they fit."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from db import compatibility, migrate
from db.errors import RightsMissing
from db.session import Database, open_database
from worker import embedded
from worker.answers import serves
from worker.errors import ServerFailed
from worker.redis_client import connect, connect_briefly
from worker.settings import Settings
from worker.stream import Depth, Stream

log = logging.getLogger(__name__)


def open_sql(settings: Settings) -> Database:
    """The database, with a schema that this release works with; raises `DatabaseError` when it has none."""
    database = open_guarded(settings)
    migrate.prepare(database)
    return database


def open_guarded(settings: Settings) -> Database:
    """The database as it is; a transaction that writes raises `SchemaMismatch` unless the schema fits then."""
    database = open_database(settings.sql_url)
    database.guard = compatibility.check
    return database


def open_to_ask(settings: Settings) -> Database:
    """The same for who only asks, by a role that may have no right to look for the schema's number."""
    database = open_database(settings.asking_url)
    with suppress(RightsMissing):
        migrate.prepare(database)
    return database


def open_stream(settings: Settings, url: str) -> Stream:
    return Stream(connect(url), settings.stream_key, settings.group)


def stream_url(settings: Settings) -> str:
    """Where broker and stream are, whether or not anybody answers there."""
    return settings.redis_url or f"unix://{embedded.socket_path(settings.home)}"


def glance(settings: Settings) -> Callable[[], Depth | None]:
    """A quick look at how much the stream holds; None from it where no embedded server runs."""
    if settings.embedded and embedded.find(settings.home) is None:
        return lambda: None
    return Stream(connect_briefly(stream_url(settings)), settings.stream_key, settings.group).depth


def returns(settings: Settings, say: Callable[[str], None]) -> bool:
    """Wait for a broker that was just away: while it loads its data, or the embedded one's owner starts it again.

    False when there is nothing to wait for. Raises `ServerFailed` when nobody owns the embedded server any more, or its
    owner takes too long.
    """
    if settings.embedded:
        if embedded.served(settings.home, say) is None and embedded.find(settings.home) is None:
            raise ServerFailed(
                f"the embedded server of {settings.home} is gone, and so is the process that ran it; start "
                "`tweetscore up` and try again"
            )
        return True
    with connect_briefly(stream_url(settings)) as client:
        return serves(client, 0, lambda: False, lambda loading: say(f"waiting: the broker is {loading}"))


@contextmanager
def broker(settings: Settings, say: Callable[[str], None] = log.warning) -> Iterator[str]:
    """A broker to talk to: the one named in the settings, or the home's embedded server, started here if need be."""
    if settings.redis_url:
        yield settings.redis_url
        return
    with embedded.running(settings.home, settings.server_memory_mb, settings.server_sync, say) as server:
        yield server.url
