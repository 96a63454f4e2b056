"""Celery messages to the training workers, taken from their queue so that none is lost. Knows the broker, and no SQL.

Celery's own consumer pops a message from its list and only then notes it elsewhere: one that a worker was killed over
in between is gone. Here a message moves from list to list in one step, and lies there until its request is a row. Then
it goes on to the queue of this worker's own that Celery reads, where losing it costs nothing.
"""

import base64
import importlib.resources
import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import redis
from celery.utils.time import maybe_iso8601
from kombu.compression import decompress
from kombu.exceptions import KombuError
from kombu.serialization import loads
from kombu.transport.redis import Channel

from worker.redis_client import converted

TRAIN, CANCEL = "worker.tasks.train", "worker.tasks.cancel"
DEFAULT_QUEUE = "celery"
# Of a queue that others use too, so many of the oldest messages are looked at.
LOOKED_AT = 1_000
LONGEST_ID = 255


@dataclass(frozen=True)
class Request:
    """What a Celery message asks for. `kept` is the message as it is sent again when there is an outcome to tell."""

    id: str
    task: str
    args: Sequence[Any]
    kwargs: dict[str, Any]
    expires_at: datetime | None
    kept: str

    @property
    def arguments(self) -> dict[str, Any]:
        """By name, as `worker.tasks.train` has them."""
        return {**dict(zip(("dataset", "preset"), self.args, strict=False)), **self.kwargs}

    @property
    def asks_to_train(self) -> bool:
        return self.task == TRAIN and self.arguments.get("dataset") is not None

    @property
    def expired(self) -> bool:
        return self.expires_at is not None and self.expires_at <= datetime.now(UTC)


def is_message(raw: bytes) -> bool:
    """Whether this is the envelope of a message at all: anything else would end the connection of Celery's consumer."""
    try:
        message = json.loads(raw)
        properties = message["properties"]
        place = properties["delivery_info"]["exchange"], properties["delivery_info"]["routing_key"]
        if properties.get("body_encoding") == "base64":
            base64.b64decode(message["body"])
        return all(isinstance(text, str) for text in (*place, properties["delivery_tag"], message["body"]))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return False


def read_request(raw: bytes) -> Request | None:
    """The request in a message of Celery's protocol 1 or 2; None when it is no JSON task, which Celery will refuse."""
    try:
        message = json.loads(raw)
        properties, headers = message["properties"], message.get("headers") or {}
        body = message["body"]
        if properties.get("body_encoding") == "base64":
            body = base64.b64decode(body)
        if "compression" in headers:
            body = decompress(body, headers["compression"])
        said = loads(body, message["content-type"], message["content-encoding"], accept={"application/json"})
        if "task" in headers:
            head, (args, kwargs, _) = headers, said
        else:
            head, args, kwargs = said, said.get("args", ()), said.get("kwargs", {})
        expires_at = maybe_iso8601(head.get("expires"))
        if expires_at is not None and expires_at.tzinfo is None:
            expires_at = expires_at.replace(tzinfo=UTC)
        return _checked(head["id"], head["task"], args, kwargs, expires_at, _kept(message))
    except (ValueError, TypeError, KeyError, AttributeError, LookupError, RecursionError, KombuError):
        return None


def _checked(id_: Any, task: Any, args: Any, kwargs: Any, expires_at: datetime | None, kept: str) -> Request | None:
    well = isinstance(id_, str) and id_.isprintable() and 0 < len(id_) <= LONGEST_ID and isinstance(task, str)
    well = well and isinstance(args, list | tuple) and isinstance(kwargs, dict)
    return Request(id_, task, args, kwargs, expires_at, kept) if well else None


def _kept(message: dict[str, Any]) -> str:
    """Without what would keep Celery from telling an outcome: it is late by then, and meant for now."""
    headers = {**(message.get("headers") or {}), "expires": None, "eta": None}
    return json.dumps({**message, "headers": headers} if message.get("headers") else message)


class Inbox:
    """The queue `queue` in all of Celery's priorities, and, if `shared`, our messages in Celery's default queue.

    `own` is the queue that Celery reads in this worker. Raises `StreamError` while the broker does not answer.
    """

    def __init__(self, client: "redis.Redis", queue: str, own: str, shared: bool = False) -> None:
        self._redis = client
        self._queue = queue
        self._taken = f"{queue}:taken"
        self._own = own
        self._shared = shared
        scripts = importlib.resources.files("worker") / "lua"
        self._forward = client.register_script((scripts / "forward.lua").read_text(encoding="utf-8"))
        self._pick = client.register_script((scripts / "pick.lua").read_text(encoding="utf-8"))

    def take(self, block_seconds: float) -> list[bytes]:
        """Every message that was taken and not handed on, by whomever, the oldest first. Waits for one up to
        `block_seconds`."""
        with converted():
            for priority in Channel.priority_steps[1:]:
                self._redis.lmove(f"{self._queue}{Channel.sep}{priority}", self._taken, "RIGHT", "LEFT")
            if self._shared:
                self._pick(keys=[DEFAULT_QUEUE, self._taken], args=[LOOKED_AT, TRAIN, CANCEL])
            if not self._redis.llen(self._taken):
                # At least some time: 0 waits for ever.
                self._redis.blmove(self._queue, self._taken, max(0.01, block_seconds), "RIGHT", "LEFT")  # type: ignore[arg-type]
            found: Any = self._redis.lrange(self._taken, 0, -1)
            return list(reversed(found))

    def drop(self, raw: bytes) -> None:
        """Throw a message away."""
        with converted():
            self._redis.lrem(self._taken, 0, raw)  # type: ignore[arg-type]

    def forward(self, raw: bytes) -> None:
        """Hand a message on to Celery, unless another worker has: its request is a row now, or needs none."""
        with converted():
            self._forward(keys=[self._taken, self._own], args=[raw])

    def send(self, kept: str) -> None:
        """Give Celery a message again, under a delivery tag of its own."""
        message = json.loads(kept)
        message["properties"]["delivery_tag"] = str(uuid.uuid4())
        with converted():
            self._redis.lpush(self._own, json.dumps(message))
