"""`tweetscore health`: one question, one answer, for orchestrators. Starts nothing, mends nothing, loads no model."""

import threading
from collections.abc import Callable
from pathlib import Path

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from sqlalchemy import make_url

from db.errors import TweetscoreError
from worker import embedded
from worker.answers import ask
from worker.pulse import FRESH_SECONDS, find_pulse, waits_for
from worker.settings import Settings

ANSWER_SECONDS = 5.0


class Ill(TweetscoreError):
    """Raised when what was asked about is not well."""


def ask_health(settings: Settings, kind: str) -> str:
    """What is well about `kind`; raises `Ill`, or what the look itself raised, with one sentence."""
    look = KINDS[kind]
    answer: list[str] = []
    faults: list[Exception] = []

    def run() -> None:
        try:
            answer.append(look(settings))
        except Exception as error:  # handed to whoever asked, below
            faults.append(error)

    # A server that keeps a connection and says nothing must not keep the orchestrator waiting.
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(ANSWER_SECONDS)
    if thread.is_alive():
        raise Ill(f"{kind} gave no answer for {ANSWER_SECONDS:.0f} s")
    if faults:
        if isinstance(faults[0], TweetscoreError):
            raise faults[0]
        raise Ill(f"{kind}: {type(faults[0]).__name__}") from faults[0]
    return answer[0]


def _worker(kind: str) -> Callable[[Settings], str]:
    def look(settings: Settings) -> str:
        found = find_pulse(settings.run, kind)
        if found is None:
            raise Ill(f"no {kind} worker of this host runs on {settings.home}")
        pid, age = found
        if age > FRESH_SECONDS:
            raise Ill(f"the {kind} worker, process {pid}, gave no sign of life for {age:.0f} s")
        # Alive, and no better for a restart: what it waits for is the database's ill health.
        why = waits_for(settings.run, kind, pid)
        return f"{kind} worker, process {pid}, seen {age:.0f} s ago" + (f"; it waits: {why}" if why else "")

    return look


def _broker(settings: Settings) -> str:
    if settings.embedded and embedded.find(settings.home) is None:
        raise Ill(embedded.trouble(settings.home) or f"no server runs on {settings.home}; start `tweetscore up`")
    url = settings.redis_url or f"unix://{embedded.socket_path(settings.home)}"
    client = redis.Redis.from_url(url, socket_timeout=3, socket_connect_timeout=3, retry=Retry(NoBackoff(), 0))
    try:
        with client:
            if loading := ask(client):
                raise Ill(f"the broker is {loading}")
            return f"broker answers, {client.xlen(settings.stream_key)} records in the stream"
    except redis.RedisError as error:
        raise Ill(f"the broker does not answer ({type(error).__name__})") from error


def _database(settings: Settings) -> str:
    from db import migrate
    from db.session import open_database

    url = make_url(settings.sql_url)
    if url.get_backend_name() == "sqlite" and not Path(url.database or "").is_file():
        raise Ill("there is no database yet; `tweetscore up` makes it")
    database = open_database(settings.sql_url)
    return f"{database.engine.dialect.name} answers, schema {migrate.check(database)}"


KINDS: dict[str, Callable[[Settings], str]] = {
    "scoring": _worker("scoring"),
    "training": _worker("training"),
    "broker": _broker,
    "db": _database,
}
