"""The queue of Celery messages that request training, read so that no message is lost. Uses the broker and no SQL.

Celery's consumer pops a message from its list and stores it elsewhere afterwards, so a worker killed in between loses
it. Here a message moves from the queue to a second list in one step, and stays there until its request is a row in SQL.
Then it moves to this worker's own queue, which Celery reads; losing it there loses no work.
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

from worker.stream.redis_client import converted

TRAIN, ADAPT, CANCEL = "worker.tasks.train", "worker.tasks.adapt", "worker.tasks.cancel"
DEFAULT_QUEUE = "celery"
# How many of the oldest messages in the shared default queue are searched for ours.
SCAN_LIMIT = 1_000
LONGEST_ID = 255


@dataclass(frozen=True)
class Request:
    """The content of a Celery message. `message` is the message to send again when the job has an outcome."""

    id: str
    task: str
    args: Sequence[Any]
    kwargs: dict[str, Any]
    expires_at: datetime | None
    message: str

    @property
    def arguments(self) -> dict[str, Any]:
        """All arguments by name, with the parameter names of `worker.tasks.train`."""
        return {**dict(zip(("dataset", "preset"), self.args, strict=False)), **self.kwargs}

    @property
    def is_training_request(self) -> bool:
        """Whether it requests a job. A message for `worker.tasks.train` without a dataset is a nudge."""
        return self.task == ADAPT or (self.task == TRAIN and self.arguments.get("dataset") is not None)

    @property
    def expired(self) -> bool:
        return self.expires_at is not None and self.expires_at <= datetime.now(UTC)


def is_message(raw: bytes) -> bool:
    """Whether this is the envelope of a Celery message. Anything else would end the connection of Celery's consumer."""
    try:
        message = json.loads(raw)
        properties = message["properties"]
        target = properties["delivery_info"]["exchange"], properties["delivery_info"]["routing_key"]
        if properties.get("body_encoding") == "base64":
            base64.b64decode(message["body"])
        return all(isinstance(text, str) for text in (*target, properties["delivery_tag"], message["body"]))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return False


def read_request(raw: bytes) -> Request | None:
    """Parse a message of Celery's protocol 1 or 2.

    Returns None for anything but a JSON task; Celery will refuse that.
    """
    try:
        message = json.loads(raw)
        properties, headers = message["properties"], message.get("headers") or {}
        body = message["body"]
        if properties.get("body_encoding") == "base64":
            body = base64.b64decode(body)
        if "compression" in headers:
            body = decompress(body, headers["compression"])
        content = loads(body, message["content-type"], message["content-encoding"], accept={"application/json"})
        if "task" in headers:
            head, (args, kwargs, _) = headers, content
        else:
            head, args, kwargs = content, content.get("args", ()), content.get("kwargs", {})
        expires_at = maybe_iso8601(head.get("expires"))
        if expires_at is not None and expires_at.tzinfo is None:
            expires_at = expires_at.replace(tzinfo=UTC)
        return _checked(head["id"], head["task"], args, kwargs, expires_at, _without_expiry(message))
    except (ValueError, TypeError, KeyError, AttributeError, LookupError, RecursionError, KombuError):
        return None


def _checked(id_: Any, task: Any, args: Any, kwargs: Any, expires_at: datetime | None, message: str) -> Request | None:
    valid = isinstance(id_, str) and id_.isprintable() and 0 < len(id_) <= LONGEST_ID and isinstance(task, str)
    valid = valid and isinstance(args, list | tuple) and isinstance(kwargs, dict)
    return Request(id_, task, args, kwargs, expires_at, message) if valid else None


def _without_expiry(message: dict[str, Any]) -> str:
    """The message without `expires` and `eta`: when it is sent again, Celery must run it at once."""
    headers = {**(message.get("headers") or {}), "expires": None, "eta": None}
    return json.dumps({**message, "headers": headers} if message.get("headers") else message)


class RequestQueue:
    """The Celery queue `queue` in all priorities and, if `shared`, our messages in Celery's default queue.

    `worker_queue` is the queue that Celery reads in this worker. Methods raise `StreamError` while the broker does not
    answer.
    """

    def __init__(self, client: "redis.Redis", queue: str, worker_queue: str, shared: bool = False) -> None:
        self._redis = client
        self._queue = queue
        self._taken = f"{queue}:taken"
        self._worker_queue = worker_queue
        self._shared = shared
        scripts = importlib.resources.files("worker.stream") / "lua"
        self._forward = client.register_script((scripts / "forward.lua").read_text(encoding="utf-8"))
        self._pick = client.register_script((scripts / "pick.lua").read_text(encoding="utf-8"))

    def take(self, block_seconds: float) -> list[bytes]:
        """Return all taken messages that no worker has forwarded or dropped, the oldest first. Waits up to
        `block_seconds` for one."""
        with converted():
            for priority in Channel.priority_steps[1:]:
                self._redis.lmove(f"{self._queue}{Channel.sep}{priority}", self._taken, "RIGHT", "LEFT")
            if self._shared:
                self._pick(keys=[DEFAULT_QUEUE, self._taken], args=[SCAN_LIMIT, TRAIN, ADAPT, CANCEL])
            if not self._redis.llen(self._taken):
                # Never 0, which would wait without a limit.
                self._redis.blmove(self._queue, self._taken, max(0.01, block_seconds), "RIGHT", "LEFT")  # type: ignore[arg-type]
            found: Any = self._redis.lrange(self._taken, 0, -1)
            return list(reversed(found))

    def drop(self, raw: bytes) -> None:
        """Delete a taken message."""
        with converted():
            self._redis.lrem(self._taken, 0, raw)  # type: ignore[arg-type]

    def forward(self, raw: bytes) -> None:
        """Pass a taken message to Celery, unless another worker already has."""
        with converted():
            self._forward(keys=[self._taken, self._worker_queue], args=[raw])

    def send_again(self, message: str) -> None:
        """Pass a stored message to Celery again, with a new delivery tag."""
        envelope = json.loads(message)
        envelope["properties"]["delivery_tag"] = str(uuid.uuid4())
        with converted():
            self._redis.lpush(self._worker_queue, json.dumps(envelope))
