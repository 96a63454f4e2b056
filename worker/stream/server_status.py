"""The status of a Redis or Valkey server: ready, loading its data, not answering, or without room for records."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.exceptions import NoPermissionError
from redis.retry import Retry

from worker.errors import StreamDenied, StreamError, StreamFull
from worker.stream.redis_client import converted

TIMEOUT_SECONDS = 5.0
FULL_WAIT_SECONDS = 0.5
POLL_SECONDS = 0.01
LONGEST_POLL_SECONDS = 0.25
# A shorter load is not reported.
FIRST_NOTICE_SECONDS = 1.0
NOTICE_SECONDS = 10.0
STILL_IN_LOG = "the deleted records are still in the append-only file"


@dataclass(frozen=True)
class Loading:
    """Progress of a server that loads its data; None where the server does not report it."""

    percent: float | None = None
    seconds_left: int | None = None

    def __str__(self) -> str:
        percent = "" if self.percent is None else f", {self.percent:.0f} %"
        left = "" if self.seconds_left is None or self.seconds_left < 0 else f", about {self.seconds_left} s left"
        return f"loading{percent}{left}"


@dataclass(frozen=True)
class Consumer:
    """A worker's name in the group, the records that it holds, and the time since its last command."""

    name: str
    pending: int
    idle_seconds: float


def list_consumers(client: "redis.Redis", key: str, group: str) -> list[Consumer]:
    """The consumers of a group, those with most records first; none when the group does not exist."""
    with converted():
        try:
            found: Any = client.xinfo_consumers(key, group)
        except redis.ResponseError as error:
            if "no such key" not in str(error) and "NOGROUP" not in str(error):
                raise
            return []
    consumers = [
        Consumer(one["name"].decode("utf-8", "backslashreplace"), int(one["pending"]), one["idle"] / 1000)
        for one in found
    ]
    return sorted(consumers, key=lambda one: (-one.pending, one.idle_seconds))


def connect_socket(socket: Path, timeout: float = TIMEOUT_SECONDS) -> "redis.Redis":
    """A client that does not retry: redis-py would otherwise wait seconds for a server that has ended.

    It sends no CLIENT SETINFO: a loading server answers one message per chunk it loads, and a chunk may take long.
    """
    return redis.Redis(
        unix_socket_path=str(socket), socket_timeout=timeout, retry=Retry(NoBackoff(), 0), protocol=2, driver_info=None
    )


def loading_status(client: "redis.Redis") -> Loading | None:
    """Return None when the server is ready, else its loading progress.

    Raises `redis.RedisError` when it does not answer.
    """
    try:
        client.ping()
        return None
    except redis.BusyLoadingError:
        pass
    try:
        info: Any = client.info("persistence")
    except NoPermissionError:
        return Loading()
    left = info.get("loading_eta_seconds")
    return Loading(info.get("loading_loaded_perc"), None if left is None else int(left))


def wait_until_ready(
    client: "redis.Redis", silence_seconds: float, give_up: Callable[[], bool], on_loading: Callable[[Loading], None]
) -> bool:
    """Wait until a server is ready: without a limit while it loads, for `silence_seconds` while it does not answer.

    Returns False after that silence, or as soon as `give_up()` is true. `on_loading` receives the progress every ten
    seconds.
    """
    answered_at = time.monotonic()
    notify_at, pause = answered_at + FIRST_NOTICE_SECONDS, POLL_SECONDS
    while not give_up():
        try:
            loading = loading_status(client)
        except redis.RedisError:
            if time.monotonic() - answered_at >= silence_seconds:
                return False
        else:
            if loading is None:
                return True
            answered_at = time.monotonic()
            if answered_at >= notify_at:
                on_loading(loading)
                notify_at = answered_at + NOTICE_SECONDS
        time.sleep(pause)
        pause = min(1.2 * pause, LONGEST_POLL_SECONDS)
    return False


def rewrite_log(client: "redis.Redis") -> None:
    """Rewrite the server's append-only file, and wait for it.

    Raises `StreamError` when that is not allowed or fails: what was deleted is then still in the file.
    """
    _wait_for_rewrite(client)  # a rewrite that is already running may have begun before the deletion
    try:
        with converted():
            client.bgrewriteaof()
    except StreamDenied as error:
        raise StreamDenied(f"{error}; {STILL_IN_LOG} until an administrator runs BGREWRITEAOF") from error
    status = _wait_for_rewrite(client)["aof_last_bgrewrite_status"]
    if status != "ok":
        raise StreamError(f"{STILL_IN_LOG}: its rewrite ended with {status!r}; read the server's log")


def _wait_for_rewrite(client: "redis.Redis") -> dict[str, Any]:
    """Wait until no rewrite is running or scheduled; returns the server's persistence section of INFO."""
    while True:
        with converted():
            state: dict[str, Any] = client.info("persistence")
        if not state["aof_rewrite_in_progress"] and not state.get("aof_rewrite_scheduled"):
            return state
        time.sleep(0.05)


def wait_for_room(
    length: Callable[[], int], high_water: int, on_wait: Callable[[int], None], max_seconds: float | None
) -> None:
    """Wait until at most `high_water` records wait or are pending. Meanwhile call `on_wait` with their number.

    Clients that may not call XINFO and XLEN skip the check.
    """
    started = time.monotonic()
    while (found := _length_if_allowed(length)) > high_water:
        on_wait(found)
        if max_seconds is not None and time.monotonic() - started > max_seconds:
            raise StreamFull(
                f"the stream has held over {high_water:,} records for {max_seconds:.0f} s; start scoring workers"
            )
        time.sleep(FULL_WAIT_SECONDS)


def _length_if_allowed(length: Callable[[], int]) -> int:
    try:
        return length()
    except StreamDenied:
        return 0
