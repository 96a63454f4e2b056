"""redis-py clients of the server that holds broker and stream, and the conversion of redis-py's errors."""

from collections.abc import Iterator
from contextlib import contextmanager

import redis
from redis.backoff import ExponentialBackoff, NoBackoff
from redis.exceptions import AuthenticationError, NoPermissionError
from redis.retry import Retry

from worker.errors import StreamAway, StreamDenied, StreamError, StreamFull

# A server that is silent for this long counts as unavailable, so blocking commands must return earlier.
CLIENT_TIMEOUT_SECONDS = 15
FULL = "the stream's server has reached its maxmemory; start scoring workers or raise it"


def connect(url: str) -> "redis.Redis":
    """A client that retries for a few seconds while the server is unavailable, and detects a dead connection.

    Raises `StreamError` when `url` is not the URL of a Redis server.
    """
    try:
        client = redis.Redis.from_url(
            url,
            socket_connect_timeout=5,
            socket_timeout=CLIENT_TIMEOUT_SECONDS,
            health_check_interval=15,
            retry=Retry(ExponentialBackoff(cap=1, base=0.05), retries=5),
            retry_on_error=[redis.ConnectionError, redis.TimeoutError, redis.BusyLoadingError],
        )
        client.connection_pool.make_connection()  # validates every option without connecting
    except (ValueError, TypeError, AttributeError, redis.RedisError) as error:
        # redis-py's own message is left out: it may contain the password.
        raise StreamError("it is not a valid URL; write it as redis://host:6379/0 or unix:///path/to.sock") from error
    return client


def connect_briefly(url: str) -> "redis.Redis":
    """A client for status checks: it does not retry and times out after two seconds."""
    return redis.Redis.from_url(url, socket_connect_timeout=2, socket_timeout=2, retry=Retry(NoBackoff(), 0))


@contextmanager
def converted() -> Iterator[None]:
    """Convert redis-py's errors to `StreamError` and its subclasses."""
    try:
        yield
    except redis.RedisError as error:
        if out_of_memory(error):
            raise StreamFull(FULL) from error
        if isinstance(error, NoPermissionError):
            raise StreamDenied(f"the stream's server does not allow it: {error}") from error
        away = isinstance(error, redis.ConnectionError | redis.TimeoutError) and not isinstance(
            error, AuthenticationError
        )
        raise (StreamAway if away else StreamError)(
            f"the stream's server does not answer as it should: {error}"
        ) from error


def out_of_memory(answer: object) -> bool:
    # A Lua script that is refused raises a plain ResponseError whose text contains OOM.
    return isinstance(answer, redis.OutOfMemoryError) or (isinstance(answer, redis.RedisError) and "OOM" in str(answer))
