"""The stream of tweets and its protocol. It handles bytes and does not parse tweets; it uses neither SQL nor models.

Keys
    KEY             a stream; one record is one tweet: field `tweet`, a JSON object with `v`, `id` and `text`
    KEY:suspects    a hash, record id -> how often it was scored alone; deleted when the record is acknowledged
    KEY:books       a hash of counters per group, to detect records that are erased unread; see lua/read.lua
    KEY:erased      a hash of records that were erased from the stream while a consumer holds them; see lua/claim.lua

Any client may XADD to KEY, but without MAXLEN or MINID, which erase records that are not scored yet. Scoring workers
read the stream through one consumer group: a record stays pending with its consumer until its prediction is committed.
When the consumer has not renewed it for `min_idle`, another consumer claims it.

On a Redis Cluster the names of the hashes begin with {KEY}, so that they are in the slot of KEY.
"""

import importlib.resources
import logging
import socket
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import msgspec
import redis

from worker.errors import StreamFull
from worker.stream.redis_client import FULL, converted, is_cluster, nodes, out_of_memory
from worker.stream.server_status import Consumer, list_consumers, rewrite_log, wait_for_room

log = logging.getLogger(__name__)

SCRIPTS = ("claim", "count", "group", "read", "remove", "renew", "rewind", "sweep", "trim")
FIELD = b"tweet"
# The end of the year 9999, the last one a Python datetime can hold.
LAST_MS = 253_402_300_799_000
WIRE_VERSION = 1
# A record with more deliveries is a suspect: two windows that contained it failed or ended their worker.
TRUSTED_DELIVERIES = 2
# A suspect that failed this often when scored alone is moved to `dead_letters`.
MAX_ISOLATED_ATTEMPTS = 3
PUBLISH_CHUNK = 250
CLAIM_CHUNK = 1_000
# Shorter than the client's socket timeout.
LONGEST_BLOCK_MS = 5_000


class Record(msgspec.Struct, frozen=True):
    """One delivery of a stream entry.

    `payload` is its field `tweet`, None when it has none; `fields` holds all fields.
    """

    id: str
    payload: bytes | None
    deliveries: int
    fields: dict[bytes, bytes] = {}

    @property
    def received_at(self) -> datetime:
        """When the server appended the record, from its id.

        Clients can choose record ids, so the timestamp is clamped.
        """
        return datetime.fromtimestamp(min(int(self.id.partition("-")[0]), LAST_MS) / 1000, UTC)

    @property
    def suspect(self) -> bool:
        return self.deliveries > TRUSTED_DELIVERIES


@dataclass(frozen=True)
class Depth:
    """Records in the stream (`length`), not read yet (`lag`, None when the server does not report it), and read but not
    acknowledged (`pending`)."""

    length: int
    lag: int | None
    pending: int

    @property
    def idle(self) -> bool:
        return self.lag == 0 and self.pending == 0


@dataclass(frozen=True)
class Vanished:
    """How many records were erased before they were scored, and when that was last detected (Unix seconds, 0:
    never)."""

    records: int
    at: int


class Stream:
    def __init__(
        self, client: "redis.Redis", key: str, group: str, consumer: str | None = None, keep_hours: float = 0
    ) -> None:
        self._redis = client
        self._keep_ms = round(3_600_000 * keep_hours)  # of acknowledged records, for `rewind`
        self.unread: int | None = None  # records that were left for all consumers after the last `read`, if known
        self.key = key
        self._hashes = f"{{{key}}}" if is_cluster(client) and "{" not in key else key  # prefix of their names
        self.group = group
        self.consumer = consumer or f"{socket.gethostname()}-{uuid.uuid4().hex[:12]}"
        folder = importlib.resources.files("worker.stream") / "lua"
        self._scripts = {
            name: client.register_script((folder / f"{name}.lua").read_text(encoding="utf-8")) for name in SCRIPTS
        }

    def _run(self, script: str, *arguments: Any) -> Any:
        return self._scripts[script](keys=[self.key, f"{self._hashes}:books", f"{self._hashes}:erased"], args=arguments)

    # --- publishing

    def publish(self, payloads: Sequence[bytes]) -> None:
        """Append records in order, in pipelined chunks. Raises `StreamFull` with the records that were not accepted."""
        for start in range(0, len(payloads), PUBLISH_CHUNK):
            chunk = payloads[start : start + PUBLISH_CHUNK]
            with converted():
                pipe = self._redis.pipeline(transaction=False)
                for payload in chunk:
                    pipe.xadd(self.key, {FIELD: payload})
                replies = pipe.execute(raise_on_error=False)
                refused = [payload for payload, reply in zip(chunk, replies, strict=True) if out_of_memory(reply)]
                for reply in replies:
                    if isinstance(reply, Exception) and not out_of_memory(reply):
                        raise reply
            if refused:
                raise StreamFull(FULL, [*refused, *payloads[start + PUBLISH_CHUNK :]])

    def add(self, entries: Sequence[dict[bytes, bytes]]) -> None:
        """Append entries with all their fields in one transaction."""
        with converted():
            pipe = self._redis.pipeline(transaction=True)
            for fields in entries:
                pipe.xadd(self.key, dict(fields.items()))
            pipe.execute()

    def wait_for_room(self, high_water: int, on_wait: Callable[[int], None], max_seconds: float | None = None) -> None:
        """See `server_status.wait_for_room`."""
        wait_for_room(self.length, high_water, on_wait, max_seconds)

    def length(self) -> int:
        """How many records wait or are pending; all of the stream when the server does not know."""
        depth = self.depth()
        return depth.length if depth.lag is None else depth.lag + depth.pending

    # --- reading

    def ensure_group(self) -> None:
        with converted():
            self._run("group", self.group)

    def read(self, count: int, block_ms: int | None) -> list[Record]:
        """Read up to `count` new records. When there are none, wait up to `block_ms` for the first.

        A missing group (FLUSHALL, a new server) is created again at 0, so that no record in the stream is skipped.
        """
        with converted():
            records, last_id = self.read_new(count)
            if not records and last_id is not None and block_ms is not None:
                self._redis.xread({self.key: last_id}, count=1, block=block_ms)
                records, _ = self.read_new(count)
        return records

    def detect_vanished(self) -> None:
        """Detect records that were erased before they were read.

        `read` does this too; use this while nothing is read.
        """
        self.read_new(0)

    def read_new(self, count: int) -> tuple[list[Record], Any]:
        """Return new records and the stream's last generated id; None for the id when the group had to be created."""
        with converted():
            try:
                entries, last_id, vanished, lag = self._run("read", self.group, self.consumer, count)
            except redis.ResponseError as error:
                if "NOGROUP" not in str(error):
                    raise
                self.ensure_group()
                return [], None
        self.unread = None if lag is None else max(0, lag - len(entries))
        self._warn_vanished(vanished, "before they were read")
        return [_record(id_, fields, 1) for id_, fields in entries], last_id

    def claim_idle(self, min_idle_ms: int, count: int) -> list[Record]:
        """Claim up to `count` records that their consumers have not renewed for `min_idle_ms`."""
        records: list[Record] = []
        start = "-"
        with converted():
            while len(records) < count:
                limit = min(count - len(records), CLAIM_CHUNK)
                try:
                    entries, last_id, vanished = self._run(
                        "claim", self.group, self.consumer, min_idle_ms, limit, start
                    )
                except redis.ResponseError as error:
                    if "NOGROUP" not in str(error):
                        raise
                    self.ensure_group()
                    return []
                self._warn_vanished(vanished, "while a worker that has ended held them")
                records += [_record(*entry) for entry in entries]
                if not last_id:
                    break
                start = f"({_text(last_id)}"
        return records

    def _warn_vanished(self, vanished: int, when: str) -> None:
        if vanished:
            log.warning("%d records of %r were erased %s; call XADD without MAXLEN and MINID", vanished, self.key, when)

    def wait_for_record(self, block_ms: int) -> None:
        """Wait until a record is added, at most `block_ms`. Does not read it."""
        with converted():
            self._redis.xread({self.key: "$"}, count=1, block=min(block_ms, LONGEST_BLOCK_MS))

    def has_work(self) -> bool:
        """Whether records wait or are pending. Does what `read` does for a stream while nothing is read: creates the
        group, detects records that were erased, and trims."""
        self.ensure_group()
        self.detect_vanished()
        depth = self.depth()
        if depth.idle and depth.length:
            self.trim()  # the worker that scored these ended before it trimmed, or another group was behind
        return not depth.idle

    # --- pending records

    def renew(self, ids: Sequence[str]) -> int:
        """Reset the idle time of this consumer's records. Returns how many of them it still holds."""
        with converted():
            # In parts, since the server answers nobody else during a script.
            parts = [ids[start : start + CLAIM_CHUNK] for start in range(0, len(ids), CLAIM_CHUNK)]
            return sum(int(self._run("renew", self.group, self.consumer, *part)) for part in parts)

    def count_isolated(self, id_: str, by: int = 1) -> int:
        """Count an attempt to score a suspect alone, before it begins; returns the attempts so far.

        `by=-1` reverts one.
        """
        with converted():
            return int(self._scripts["count"](keys=[f"{self._hashes}:suspects"], args=[id_, by]))

    def ack(self, ids: Sequence[str]) -> None:
        with converted():
            if ids:
                pipe = self._redis.pipeline(transaction=False)
                pipe.xack(self.key, self.group, *ids)
                pipe.hdel(f"{self._hashes}:suspects", *ids)
                pipe.hdel(f"{self._hashes}:erased", *(f"{id_} {self.group}" for id_ in ids))
                pipe.execute()

    def trim(self) -> int:
        """Remove the records that every group has acknowledged and that need not be kept; returns how many."""
        with converted():
            return int(self._run("trim", self._keep_ms))

    def rewind(self, since: datetime) -> datetime | None:
        """Let the group read the records that were received at `since` or later once more. Returns when the first of
        them was received; None without any."""
        self.ensure_group()
        with converted():
            first = self._run("rewind", self.group, max(0, int(since.timestamp() * 1000)))
        return Record(_text(first), None, 0).received_at if first else None

    def leave(self) -> None:
        """Remove this consumer from the group unless it still holds records, which another consumer must claim."""
        with converted():
            self._run("sweep", self.group, 0, self.consumer)

    def sweep(self, idle_ms: int) -> int:
        """Remove consumers that hold no records and have been idle for `idle_ms`; returns how many.

        A live consumer registers again on its next read.
        """
        with converted():
            return int(self._run("sweep", self.group, idle_ms))

    # --- deletion

    def scan(self, count: int) -> Iterator[list[Record]]:
        """Iterate over all records of the stream, including pending ones, in lists of up to `count`."""
        start = "-"
        while True:
            with converted():
                entries: Any = self._redis.xrange(self.key, min=start, count=count)
            if not entries:
                return
            yield [Record(_text(id_), fields.get(FIELD), 0, fields) for id_, fields in entries]
            start = f"({_text(entries[-1][0])}"

    def remove(self, ids: Sequence[str]) -> None:
        """Delete records. A consumer that already holds one still scores it; no other consumer can claim it."""
        with converted():
            for start in range(0, len(ids), CLAIM_CHUNK):
                self._run("remove", *ids[start : start + CLAIM_CHUNK])

    def pending_ids(self) -> set[str]:
        """The ids of all pending records, including deleted ones."""
        found: set[str] = set()
        start = "-"
        with converted():
            while True:
                try:
                    rows: Any = self._redis.xpending_range(self.key, self.group, start, "+", CLAIM_CHUNK)
                except redis.ResponseError as error:
                    if "NOGROUP" not in str(error):
                        raise
                    return set()
                if not rows:
                    return found
                found |= {_text(row["message_id"]) for row in rows}
                start = f"({_text(rows[-1]['message_id'])}"

    def rewrite_log(self) -> None:
        """Rewrite the append-only file of the server, or of each server of a cluster, without the removed records.

        Raises `StreamError` when that is not allowed or fails: the removed records are then still in the file.
        """
        for node in nodes(self._redis):
            rewrite_log(node)

    # --- status

    def depth(self) -> Depth:
        with converted():
            try:
                groups = self._redis.xinfo_groups(self.key)
            except redis.ResponseError as error:
                if "no such key" not in str(error):
                    raise
                return Depth(0, 0, 0)
            length = int(self._redis.xlen(self.key))
        for group in groups:
            if _text(group["name"]) == self.group:
                # Redis 7.0 keeps counting records that were erased unread, so cap the lag at the length.
                lag = None if group["lag"] is None else min(int(group["lag"]), length)
                return Depth(length, lag, int(group["pending"]))
        return Depth(length, length, 0)

    def vanished(self) -> Vanished:
        with converted():
            names = [f"vanished {self.group}", f"vanished_at {self.group}"]
            records, at = self._redis.hmget(f"{self._hashes}:books", names)
        return Vanished(int(records or 0), int(at or 0))

    def consumers(self) -> list[Consumer]:
        return list_consumers(self._redis, self.key, self.group)

    def oldest(self) -> datetime | None:
        """When the oldest record without an acknowledgement was received; None when there is none."""
        with converted():
            try:
                groups = {_text(group["name"]): group for group in self._redis.xinfo_groups(self.key)}
                if self.group not in groups:
                    waiting = self._redis.xrange(self.key, count=1)
                elif groups[self.group]["pending"]:
                    waiting = [(self._redis.xpending(self.key, self.group)["min"], {})]
                else:
                    unread = f"({_text(groups[self.group]['last-delivered-id'])}"
                    waiting = self._redis.xrange(self.key, unread, count=1)
            except redis.ResponseError as error:
                if "no such key" not in str(error):
                    raise
                return None
        return Record(_text(waiting[0][0]), None, 0).received_at if waiting and waiting[0][0] else None


def _record(id_: bytes, fields: Sequence[bytes], deliveries: int) -> Record:
    """Build a record from the script's flat list of field names and values."""
    named = {fields[0]: fields[1]} if len(fields) == 2 else dict(zip(fields[::2], fields[1::2], strict=True))
    return Record(_text(id_), named.get(FIELD), deliveries, named)


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value
