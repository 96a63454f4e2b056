"""`tweetscore health`: check one component for an orchestrator. Starts nothing and loads no model."""

import threading
from collections.abc import Callable
from pathlib import Path

import redis
from sqlalchemy import make_url

from db.errors import TweetscoreError, public_url
from worker.connections import open_stream, stream_url
from worker.errors import StreamAway
from worker.process.heartbeat import STALE_SECONDS, find_heartbeat, find_waiting_reason
from worker.settings import Settings
from worker.stream import embedded_valkey
from worker.stream.redis_client import connect_briefly
from worker.stream.server_status import loading_status

TIMEOUT_SECONDS = 5.0


class Unhealthy(TweetscoreError):
    """Raised when the component that was checked is not healthy."""


def check_health(settings: Settings, kind: str) -> str:
    """Describe a healthy component in one sentence; raises `Unhealthy` or another `TweetscoreError` otherwise."""
    check = KINDS[kind]
    findings: list[str] = []
    errors: list[Exception] = []

    def run() -> None:
        try:
            findings.append(check(settings))
        except Exception as error:  # raised in the caller's thread below
            errors.append(error)

    # In a thread: a server that keeps the connection and does not answer must not block the orchestrator.
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(TIMEOUT_SECONDS)
    if thread.is_alive():
        raise Unhealthy(f"{kind} gave no answer for {TIMEOUT_SECONDS:.0f} s")
    if errors:
        if isinstance(errors[0], TweetscoreError):
            raise errors[0]
        raise Unhealthy(f"{kind}: {type(errors[0]).__name__}") from errors[0]
    return findings[0]


def _worker(kind: str) -> Callable[[Settings], str]:
    def check(settings: Settings) -> str:
        found = find_heartbeat(settings.run, kind)
        if found is None:
            raise Unhealthy(f"no {kind} worker of this host runs on {settings.home}")
        pid, age = found
        if age > STALE_SECONDS:
            raise Unhealthy(f"the {kind} worker, process {pid}, has written no heartbeat for {age:.0f} s")
        # A worker that waits for its database is healthy: a restart would not help.
        reason = find_waiting_reason(settings.run, kind, pid)
        return f"{kind} worker, process {pid}, seen {age:.0f} s ago" + (f"; it waits: {reason}" if reason else "")

    return check


def _broker(settings: Settings) -> str:
    if settings.embedded and embedded_valkey.find(settings.home) is None:
        reason = embedded_valkey.failure_reason(settings.home)
        raise Unhealthy(reason or f"no server runs on {settings.home}; start `tweetscore up`")
    broker = stream_url(settings)
    for url in (broker, *settings.stream_urls):
        name = "broker" if url == broker else f"stream's server {public_url(url)}"
        try:
            with connect_briefly(url) as client:
                if loading := loading_status(client):
                    raise Unhealthy(f"the {name} is {loading}")
        except (redis.RedisError, StreamAway) as error:
            raise Unhealthy(f"the {name} does not answer ({type(error).__name__})") from error
    return f"broker answers, {open_stream(settings, broker, brief=True).length()} records in the stream"


def _database(settings: Settings) -> str:
    from db import migrate
    from db.session import open_database

    url = make_url(settings.sql_url)
    if url.get_backend_name() == "sqlite" and not Path(url.database or "").is_file():
        raise Unhealthy("there is no database yet; `tweetscore up` creates it")
    database = open_database(settings.sql_url)
    return f"{database.engine.dialect.name} answers, schema {migrate.check(database)}"


KINDS: dict[str, Callable[[Settings], str]] = {
    "scoring": _worker("scoring"),
    "training": _worker("training"),
    "broker": _broker,
    "db": _database,
}
