"""From settings to the things the routes work with: database, stream, workshop. One place that knows how they fit."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from db import compatibility, migrate
from db.errors import RightsMissing
from db.session import Database, open_database
from worker import embedded
from worker.settings import Settings
from worker.stream import Depth, Stream, connect, connect_briefly


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


@contextmanager
def broker(settings: Settings) -> Iterator[str]:
    """A broker to talk to: the one named in the settings, or the home's embedded server, started here if need be."""
    if settings.redis_url:
        yield settings.redis_url
        return
    with embedded.running(settings.home, settings.server_memory_mb) as server:
        yield server.url
