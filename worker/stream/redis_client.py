"""redis-py clients of the servers that hold broker and stream, and the conversion of redis-py's errors.

Besides redis-py's own URLs there are two for the stream:
    redis+sentinel://[user[:password]@]host:port[,host:port...]/SERVICE[/db]   the primary that Sentinels name
    redis+cluster://[user[:password]@]host:port[,host:port...]                 a Redis Cluster
Both exist with `rediss` for TLS, and take redis-py's options after a question mark.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import redis
from redis.backoff import ExponentialBackoff, NoBackoff
from redis.cluster import ClusterNode
from redis.connection import parse_url
from redis.exceptions import AuthenticationError, ClusterDownError, NoPermissionError, RedisClusterException
from redis.retry import Retry
from redis.sentinel import Sentinel

from worker.errors import StreamAway, StreamDenied, StreamError, StreamFull

# A server that is silent for this long counts as unavailable, so blocking commands must return earlier.
CLIENT_TIMEOUT_SECONDS = 15
FULL = "the stream's server has reached its maxmemory; start scoring workers or raise it"
SENTINEL, CLUSTER = "+sentinel://", "+cluster://"
AWAY = (redis.ConnectionError, redis.TimeoutError, ClusterDownError, RedisClusterException)
DEFAULT_PORTS = {SENTINEL: 26_379, CLUSTER: 6_379}


def connect(url: str, *, patient: bool = True) -> "redis.Redis":
    """A client that retries for a few seconds while the server is unavailable, and detects a dead connection.

    A client that is not patient, because there are other servers to serve, retries once, and not after a timeout.
    Raises `StreamError` when `url` is not the URL of a Redis server, and `StreamAway` when it is that of a cluster
    that does not answer: only such a client connects at once.
    """
    again = [redis.ConnectionError, redis.BusyLoadingError, *([redis.TimeoutError] if patient else [])]
    backoff = ExponentialBackoff(cap=1, base=0.05)
    return _client(
        url,
        socket_connect_timeout=5,
        socket_timeout=CLIENT_TIMEOUT_SECONDS,
        health_check_interval=15,
        retry=Retry(backoff, 5) if patient else Retry(backoff, 1, (redis.ConnectionError,)),
        retry_on_error=again,
    )


def connect_briefly(url: str) -> "redis.Redis":
    """A client for status checks: it does not retry and times out after two seconds."""
    return _client(url, socket_connect_timeout=2, socket_timeout=2, retry=Retry(NoBackoff(), 0))


def check_url(url: str) -> None:
    """Raise `StreamError` when `url` is not the URL of a Redis server. Connects to none."""
    if CLUSTER in url or SENTINEL in url:
        _parsed(url)
    else:
        connect(url).close()


def is_cluster(client: Any) -> bool:
    return isinstance(client, redis.RedisCluster)


def nodes(client: Any) -> "list[redis.Redis]":
    """The client itself, or one for each server of a cluster."""
    return [client.get_redis_connection(node) for node in client.get_nodes()] if is_cluster(client) else [client]


def _client(url: str, **options: Any) -> "redis.Redis":
    if SENTINEL not in url and CLUSTER not in url:
        with _valid_url():
            client = redis.Redis.from_url(url, **options)
            client.connection_pool.make_connection()  # validates every option without connecting
        return client
    places, path, given = _parsed(url)
    if CLUSTER in url:
        options.pop("retry_on_error", None)
        given |= {"ssl": True} if url.startswith("rediss") else {}
        with converted():
            startup_nodes = [ClusterNode(*place) for place in places]  # type: ignore[no-untyped-call]
            return redis.RedisCluster(startup_nodes=startup_nodes, **given, **options)  # type: ignore[return-value]
    service, _, database = path.partition("/")
    given |= {"ssl": True} if url.startswith("rediss") else {}
    # A Sentinel is asked with the same limits of time and TLS options, but without the user of the server.
    asked = {name: value for name, value in {**given, **options}.items() if name.startswith(("socket_", "ssl"))}
    asked["retry"] = Retry(NoBackoff(), 0)
    sentinel = Sentinel(places, sentinel_kwargs=asked, **given)  # type: ignore[no-untyped-call]
    found: redis.Redis = sentinel.master_for(service, db=int(database or 0), **options)  # type: ignore[no-untyped-call]
    return found


def _parsed(url: str) -> tuple[list[tuple[str, int]], str, dict[str, Any]]:
    """Hosts with their ports, the path, and the options of a URL for Sentinels or a cluster."""
    kind = CLUSTER if CLUSTER in url else SENTINEL
    with _valid_url():
        scheme, _, rest = url.partition(kind)
        place, _, query = rest.partition("?")
        location, _, path = place.partition("/")
        user, at, hosts = location.rpartition("@")
        given: dict[str, Any] = parse_url(f"{scheme}://{user}{at}host?{query}")  # type: ignore[no-untyped-call]
        for name in ("host", "connection_class"):
            given.pop(name, None)
        places = [_host_and_port(one, DEFAULT_PORTS[kind]) for one in hosts.split(",")]
        service, _, database = path.partition("/")
        if kind == SENTINEL and not service:
            raise ValueError(url)
        int(database or 0)
    return places, path, given


def _host_and_port(place: str, default: int) -> tuple[str, int]:
    host, colon, port = place.rpartition(":")
    if not colon or port.endswith("]"):
        host, port = place, str(default)
    if not host:
        raise ValueError(place)
    return host.strip("[]"), int(port)


@contextmanager
def _valid_url() -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError, AttributeError, redis.RedisError) as error:
        # redis-py's own message is left out: it may contain the password.
        raise StreamError(
            "it is not a valid URL; write it as redis://host:6379/0, unix:///path/to.sock, "
            "redis+sentinel://host:26379/service or redis+cluster://host:6379"
        ) from error


@contextmanager
def converted() -> Iterator[None]:
    """Convert redis-py's errors to `StreamError` and its subclasses."""
    try:
        yield
    except (redis.RedisError, RedisClusterException) as error:
        if out_of_memory(error):
            raise StreamFull(FULL) from error
        if isinstance(error, NoPermissionError):
            raise StreamDenied(f"the stream's server does not allow it: {error}") from error
        away = isinstance(error, AWAY) and not isinstance(error, AuthenticationError)
        raise (StreamAway if away else StreamError)(
            f"the stream's server does not answer as it should: {error}"
        ) from error


def out_of_memory(answer: object) -> bool:
    # A Lua script that is refused raises a plain ResponseError whose text contains OOM.
    return isinstance(answer, redis.OutOfMemoryError) or (isinstance(answer, redis.RedisError) and "OOM" in str(answer))
