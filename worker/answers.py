"""What a Redis or Valkey server answers when it is asked: that it serves, how far it has loaded, or nothing."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.exceptions import NoPermissionError
from redis.retry import Retry

ANSWER_SECONDS = 5.0
LOOK_SECONDS = 0.01
LONGEST_LOOK_SECONDS = 0.25
# A load that is shorter than this is not worth a line.
SAID_AFTER_SECONDS = 1.0
SAID_EVERY_SECONDS = 10.0


@dataclass(frozen=True)
class Loading:
    """How far a server has loaded its data, as far as it says."""

    percent: float | None = None
    seconds_left: int | None = None

    def __str__(self) -> str:
        far = "" if self.percent is None else f", {self.percent:.0f} %"
        left = "" if self.seconds_left is None or self.seconds_left < 0 else f", about {self.seconds_left} s left"
        return f"loading{far}{left}"


def client_of(socket: Path, timeout: float = ANSWER_SECONDS) -> "redis.Redis":
    """A client without redis-py's own patience, which would wait seconds for a server that is gone.

    It does not introduce itself: a server that loads answers one message a portion, and portions may take long.
    """
    return redis.Redis(
        unix_socket_path=str(socket), socket_timeout=timeout, retry=Retry(NoBackoff(), 0), protocol=2, driver_info=None
    )


def ask(client: "redis.Redis") -> Loading | None:
    """None from a server that serves, else how far it has loaded. Raises `redis.RedisError` when it does not answer."""
    try:
        client.ping()
        return None
    except redis.BusyLoadingError:
        pass
    try:
        told: Any = client.info("persistence")
    except NoPermissionError:
        return Loading()
    left = told.get("loading_eta_seconds")
    return Loading(told.get("loading_loaded_perc"), None if left is None else int(left))


def serves(
    client: "redis.Redis", silence_seconds: float, hopeless: Callable[[], bool], loads: Callable[[Loading], None]
) -> bool:
    """Wait until a server serves: while it loads without a limit, while it says nothing for `silence_seconds` at most.

    Returns False when it stays silent, or as soon as `hopeless()` holds. `loads` hears now and then how far it is.
    """
    heard_at = time.monotonic()
    say_at, pause = heard_at + SAID_AFTER_SECONDS, LOOK_SECONDS
    while not hopeless():
        try:
            loading = ask(client)
        except redis.RedisError:
            if time.monotonic() - heard_at >= silence_seconds:
                return False
        else:
            if loading is None:
                return True
            heard_at = time.monotonic()
            if heard_at >= say_at:
                loads(loading)
                say_at = heard_at + SAID_EVERY_SECONDS
        time.sleep(pause)
        pause = min(1.2 * pause, LONGEST_LOOK_SECONDS)
    return False
