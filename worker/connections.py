"""Build databases, stores, streams and the broker from the settings.

A function imports what it builds: most commands need only the database, and redis-py and the stores take as long to
load.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from typing import TYPE_CHECKING

from db import compatibility, migrate
from db.errors import RightsMissing, shown
from db.session import Database, open_database
from worker.errors import BadSettings, ServerFailed, StreamAway
from worker.settings import Settings

if TYPE_CHECKING:
    from training.jobs.context import TrainingContext
    from training.store.cache import Cache
    from training.store.store import Store
    from worker.stream.sharded_stream import ShardedStream
    from worker.stream.stream import Depth

log = logging.getLogger(__name__)


def prepare_home(settings: Settings) -> None:
    """Create the home with access for its owner only, because it contains tweets. Raises `BadSettings`."""
    try:
        settings.home.mkdir(parents=True, exist_ok=True)
        settings.home.chmod(0o700)
    except OSError as error:
        raise BadSettings(
            f"TWEETSCORE_HOME is {shown(str(settings.home))}: {error.strerror}; choose a folder that you can write to"
        ) from error


def open_sql(settings: Settings) -> Database:
    """Open the database and check its schema; raises `DatabaseError` when this release cannot work with it."""
    database = open_guarded(settings)
    migrate.prepare(database)
    return database


def open_guarded(settings: Settings) -> Database:
    """Open the database without a check.

    A transaction that writes raises `SchemaMismatch` when the schema does not fit.
    """
    prepare_home(settings)
    database = open_database(settings.sql_url)
    database.guard = compatibility.check
    return database


def open_for_queries(settings: Settings) -> Database:
    """Open the database with the role that queries use.

    Without the right to read the schema's version, skip the check.
    """
    prepare_home(settings)
    database = open_database(settings.query_url)
    with suppress(RightsMissing):
        migrate.prepare(database)
    return database


def open_stream(settings: Settings, url: str, *, brief: bool = False) -> "ShardedStream":
    """The stream, on the servers of `TWEETSCORE_STREAM_URLS`, else on the broker at `url`.

    With `brief` its clients time out soon and do not retry, for status checks.
    """
    from worker.stream.sharded_stream import ShardedStream

    return ShardedStream(*_stream_address(settings, url), keep_hours=settings.stream_keep_hours, brief=brief)


def client_stream(settings: Settings, url: str) -> "ShardedStream":
    """The stream of a program that only publishes, on any thread: one for its settings and process.

    A program that publishes one tweet at a time would spend most of its time on connecting again.
    """
    return _client_stream(*_stream_address(settings, url))


@lru_cache
def _client_stream(urls: tuple[str, ...], key: str, group: str, shards: int) -> "ShardedStream":
    from worker.stream.sharded_stream import ShardedStream

    return ShardedStream(urls, key, group, shards)


def _stream_address(settings: Settings, url: str) -> tuple[tuple[str, ...], str, str, int]:
    return settings.stream_urls or (url,), settings.stream_key, settings.group, settings.stream_shards


def no_stream(settings: Settings) -> str | None:
    """Why there is no stream to ask for its state: it is on the embedded server, and that does not run."""
    from worker.stream import embedded_valkey

    if settings.stream_urls or not settings.embedded or embedded_valkey.find(settings.home) is not None:
        return None
    return embedded_valkey.failure_reason(settings.home) or "no server runs; start `tweetscore up`"


def stream_url(settings: Settings) -> str:
    """The URL of the broker, which holds the stream too by default. A server need not run there."""
    if settings.redis_url:
        return settings.redis_url
    from worker.stream import embedded_valkey

    return f"unix://{embedded_valkey.socket_path(settings.home)}"


def depth_reader(settings: Settings) -> "Callable[[], Depth | None]":
    """Return a function that reads the stream's depth with a short timeout; it returns None without an embedded
    server."""
    if no_stream(settings) is not None:
        return lambda: None
    return open_stream(settings, stream_url(settings), brief=True).depth


def wait_for_broker(settings: Settings, notify: Callable[[str], None]) -> bool:
    """Wait for the stream's server, which is the broker by default and stopped answering: while it loads, or while the
    embedded server is restarted.

    Returns False when an external server does not answer. Raises `ServerFailed` when no process owns the embedded
    server or the restart takes too long.
    """
    from worker.stream import embedded_valkey
    from worker.stream.redis_client import connect_briefly
    from worker.stream.server_status import wait_until_ready

    if settings.embedded and not settings.stream_urls:
        if (
            embedded_valkey.wait_for_server(settings.home, notify) is None
            and embedded_valkey.find(settings.home) is None
        ):
            raise ServerFailed(
                f"the embedded server of {settings.home} and the process that owned it are gone; start "
                "`tweetscore up` and try again"
            )
        return True
    try:
        for url in settings.stream_urls or (stream_url(settings),):
            with connect_briefly(url) as client:
                if not wait_until_ready(
                    client, 0, lambda: False, lambda loading: notify(f"waiting: the broker is {loading}")
                ):
                    return False
    except StreamAway:  # a cluster, whose client connects at once
        return False
    return True


@contextmanager
def broker(settings: Settings, notify: Callable[[str], None] = log.warning) -> Iterator[str]:
    """Yield the broker's URL: the configured one, or the home's embedded server, which is started if necessary."""
    if settings.redis_url:
        yield settings.redis_url
        return
    from worker.stream import embedded_valkey

    prepare_home(settings)
    with embedded_valkey.running(settings.home, settings.server_memory_mb, settings.server_sync, notify) as server:
        yield server.url


def model_store(settings: Settings) -> "Store":
    """The store of trained models."""
    return _store(settings, settings.model_store, "models")


def input_store(settings: Settings) -> "Store":
    """The store of submitted datasets, and of local base models below `encoders`."""
    return _store(settings, settings.dataset_store, "datasets")


def training_context(settings: Settings, device: str | None = None) -> "TrainingContext":
    """`device` is the one that a worker has claimed; by default that of the settings, unclaimed."""
    from training.jobs.context import TrainingContext

    checkpoints, inputs = _store(settings, settings.checkpoint_store, "jobs"), input_store(settings)
    return TrainingContext(
        cache=_cache(settings),
        model_store=model_store(settings),
        input_store=inputs,
        # The trainer writes to a local folder, which is mirrored to a remote store.
        jobs_folder=settings.home / "jobs" if checkpoints.remote else checkpoints.folder,
        checkpoint_store=checkpoints if checkpoints.remote else None,
        boards_folder=settings.boards,
        read_roots=(*(() if inputs.remote else (inputs.folder,)), *settings.read_roots),
        device=device or settings.device,
        lease_seconds=settings.lease_seconds,
        max_attempts=settings.max_attempts,
    )


def _store(settings: Settings, location: str | None, default_folder: str) -> "Store":
    from training.store.store import Store

    return Store(location or settings.home / default_folder, _cache(settings))


def _cache(settings: Settings) -> "Cache":
    from training.store.cache import Cache

    return Cache(settings.home / "cache", settings.cache_mb * 1024 * 1024)
