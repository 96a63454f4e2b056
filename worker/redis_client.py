"""redis-py: clients of the server that holds broker and stream, and its errors in our words."""

from collections.abc import Iterator
from contextlib import contextmanager

import redis
from redis.backoff import ExponentialBackoff, NoBackoff
from redis.exceptions import AuthenticationError, NoPermissionError
from redis.retry import Retry

from worker.errors import StreamAway, StreamDenied, StreamError, StreamFull

# Past this a silent server counts as gone; no command may block as long.
CLIENT_TIMEOUT_SECONDS = 15
FULL = "the stream's server has reached its maxmemory; start scoring workers or raise it"


def connect(url: str) -> "redis.Redis":
    """A client that keeps trying for a few seconds when the server is away, and notices a dead connection.

    Raises `StreamError` for what is no URL of a server.
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
        client.connection_pool.make_connection()  # dials nobody, and sees every option
    except (ValueError, TypeError, AttributeError, redis.RedisError) as error:
        # What redis-py says of it may hold the password.
        raise StreamError("it cannot be read; write it as redis://host:6379/0 or unix:///path/to.sock") from error
    return client


def connect_briefly(url: str) -> "redis.Redis":
    """A client for a look: it gives up after some seconds, so that a half-open server does not hold whoever looks."""
    return redis.Redis.from_url(url, socket_connect_timeout=2, socket_timeout=2, retry=Retry(NoBackoff(), 0))


@contextmanager
def converted() -> Iterator[None]:
    """redis-py's errors end here."""
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
    # A script that is refused says so in words of its own.
    return isinstance(answer, redis.OutOfMemoryError) or (isinstance(answer, redis.RedisError) and "OOM" in str(answer))
