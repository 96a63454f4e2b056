"""The shards on one server: which there are, which of them have news, and whether the server answers.

A server is whatever one URL names: a Redis or Valkey, the primary behind Sentinels, or a Redis Cluster.
"""

import logging
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import msgspec
import redis

from worker.errors import StreamAway, StreamDenied
from worker.stream.redis_client import connect, connect_briefly, converted, is_cluster
from worker.stream.shards import MAX_SHARDS, shard_key
from worker.stream.stream import LONGEST_BLOCK_MS, Record, Stream

log = logging.getLogger(__name__)

# How often a server is asked for shards that are new to this process.
DISCOVER_SECONDS = 5.0
# Pauses before a server that does not answer is tried again, while others answer: they double up to the longest.
FIRST_AWAY_SECONDS = 1.0
LONGEST_AWAY_SECONDS = 30.0


@dataclass(frozen=True, eq=False)
class Shard:
    """One stream. `mark` is appended to the ids of its records: equal ids of different shards then differ."""

    server: "ShardServer"
    stream: Stream
    mark: str

    def marked(self, records: list[Record]) -> list[Record]:
        if not self.mark:
            return records
        return [msgspec.structs.replace(record, id=record.id + self.mark) for record in records]


class ShardServer:
    """`placed` are the numbers of the shards that belong on this server; those with a key are found besides.

    `tag` makes marks differ between servers; it is empty when there is only one.
    """

    def __init__(
        self, url: str, key: str, group: str, consumer: str, placed: Iterable[int] = (), tag: str = "",
        keep_hours: float = 0, brief: bool = False,
    ) -> None:  # fmt: skip
        self._url, self._key, self._group, self._consumer = url, key, group, consumer
        self._placed, self._tag, self._keep_hours, self._brief = tuple(placed), tag, keep_hours, brief
        self._client: redis.Redis | None = None
        self._shards: dict[int | None, Shard] = {}  # None: the stream with the plain key
        self._changing = threading.Lock()
        self._discover_at = -float("inf")
        self._pause = 0.0
        self._try_at = 0.0

    @property
    def client(self) -> "redis.Redis":
        """Raises `StreamAway` when a cluster does not answer; other clients connect when they are used."""
        if self._client is None:
            if self._brief:
                self._client = connect_briefly(self._url)
            else:
                self._client = connect(self._url, patient=not self._tag)
        return self._client

    def close(self) -> None:
        if self._client is not None:
            self._client.close()

    # --- the shards

    def shard(self, number: int | None) -> Shard:
        """The stream with the plain key (None), or a numbered shard."""
        if number not in self._shards:
            key = self._key if number is None else shard_key(self._key, number)
            stream = Stream(self.client, key, self._group, self._consumer, self._keep_hours)
            mark = f"{'' if number is None else number}{self._tag and '.'}{self._tag}"
            self._shards[number] = Shard(self, stream, f"@{mark}" if mark else "")
        return self._shards[number]

    def shards(self) -> list[Shard]:
        """The plain stream, the shards that belong here, and those whose keys exist. Looks for new ones at times."""
        with self._changing:
            if time.monotonic() >= self._discover_at:
                found = {number: self.shard(number) for number in (None, *self._placed, *self._discovered())}
                self._shards = {**self._shards, **found}
                self._discover_at = time.monotonic() + DISCOVER_SECONDS
            return list(self._shards.values())

    def known(self) -> list[Shard]:
        """The shards that this process has used or found, without asking the server."""
        return list(self._shards.values())

    def _discovered(self) -> list[int]:
        """Numbers of shards that are not known yet and have a stream on this server.

        Producers may use more shards than this process is set to, and another number was set before.
        """
        unknown = [number for number in range(MAX_SHARDS) if number not in self._shards]
        keys = [shard_key(self._key, number) for number in unknown]
        try:
            with converted():
                if not is_cluster(self.client) and not self.client.exists(*keys):
                    return []
                pipe = self.client.pipeline(transaction=False)
                for key in keys:
                    pipe.type(key)
                return [number for number, kind in zip(unknown, pipe.execute(), strict=True) if kind == b"stream"]
        except StreamDenied:  # a producer that may only XADD
            return []

    # --- news

    def news(self, positions: dict[Shard, Any]) -> list[Shard]:
        """Which shards have records after the ids given, without waiting."""
        with converted():
            if not is_cluster(self.client):
                return self._named(positions, self._xread(positions, None))
            pipe: Any = self.client.pipeline(transaction=False)
            for shard, last_id in positions.items():
                pipe.xread({shard.stream.key: last_id}, count=1)
            return [shard for shard, reply in zip(positions, pipe.execute(), strict=True) if reply]

    def parts(self, positions: dict[Shard, Any]) -> list[dict[Shard, Any]]:
        """What one blocking command can wait for: all shards of a server. In a cluster it is one shard, because the
        keys of a command must share a slot."""
        return [{shard: last_id} for shard, last_id in positions.items()] if is_cluster(self.client) else [positions]

    def wait(self, positions: dict[Shard, Any], block_ms: int) -> list[Shard]:
        """Wait until one of the shards has a record after the ids given. Returns those that have."""
        with converted():
            return self._named(positions, self._xread(positions, min(block_ms, LONGEST_BLOCK_MS)))

    def _xread(self, positions: dict[Shard, Any], block_ms: int | None) -> Any:
        return self.client.xread({s.stream.key: last_id for s, last_id in positions.items()}, count=1, block=block_ms)

    @staticmethod
    def _named(positions: Iterable[Shard], reply: Any) -> list[Shard]:
        names = {bytes(name) for name in reply} if isinstance(reply, dict) else {bytes(name) for name, _ in reply or ()}
        return [shard for shard in positions if shard.stream.key.encode() in names]

    # --- a server that does not answer, beside others that do

    @property
    def away(self) -> bool:
        return self._pause > 0

    def answers(self) -> bool:
        """False while the server is away; asks it at growing intervals whether it is back."""
        if not self.away:
            return True
        if time.monotonic() < self._try_at:
            return False
        try:
            with converted(), connect_briefly(self._url) as client:
                client.ping()
        except StreamAway as error:
            self.set_away(error)
            return False
        self._pause = 0.0
        log.info("the stream's server of shards %s answers again", self._names())
        return True

    def set_away(self, error: StreamAway) -> None:
        if not self.away:
            log.warning("the stream's server of shards %s is away, the others are served: %s", self._names(), error)
        self._pause = min(LONGEST_AWAY_SECONDS, max(FIRST_AWAY_SECONDS, 2 * self._pause))
        self._try_at = time.monotonic() + self._pause

    def _names(self) -> str:
        return ", ".join(shard.mark for shard in self._shards.values()) or "none"
