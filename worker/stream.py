"""The stream of tweets and its protocol. Knows bytes; knows no SQL, no model and no tweet's meaning.

Keys
    KEY             a stream; one record is one tweet: field `tweet`, a JSON object with `v`, `id` and `text`
    KEY:suspects    a hash, record id -> how often it was scored alone; an entry lives until its record is acknowledged
    KEY:books       a hash: what each group was given, so that what vanishes unread is noticed; see lua/read.lua
    KEY:erased      a hash of records that are gone from the stream and still in somebody's hands; see lua/claim.lua

Anyone may XADD to KEY, without MAXLEN or MINID, which erase what nobody has scored. Scoring workers read it through one
consumer group: a record stays pending with its reader until its prediction is committed, and passes to another reader
when the first has not renewed it for min-idle.
"""

import importlib.resources
import logging
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import redis

from worker.errors import StreamDenied, StreamError, StreamFull
from worker.redis_client import FULL, converted, out_of_memory

log = logging.getLogger(__name__)

SCRIPTS = ("claim", "count", "group", "read", "remove", "renew", "sweep", "trim")
FIELD = b"tweet"
# A Python date ends with the year 9999.
LAST_MS = 253_402_300_799_000
WIRE_VERSION = 1
# Above this many deliveries a record is a suspect: it was in a window that ended badly, twice.
TRUSTED_DELIVERIES = 2
# A suspect that ended badly this often when scored alone is the culprit.
MAX_ISOLATED_ATTEMPTS = 3
PUBLISH_CHUNK = 250
CLAIM_CHUNK = 1_000
FULL_WAIT_SECONDS = 0.5
# Less than a client waits for a silent server.
LONGEST_BLOCK_MS = 5_000
STILL_IN_LOG = "what was deleted is still in the append-only file"


@dataclass(frozen=True)
class Record:
    """One delivery of a stream entry. `payload` is the tweet field, None when the entry has none; `fields` are all."""

    id: str
    payload: bytes | None
    deliveries: int
    fields: dict[bytes, bytes] = field(default_factory=dict)

    @property
    def came_in(self) -> datetime:
        """When, by the server's clock: the first half of a record's id. Anybody may XADD an id of his own."""
        return datetime.fromtimestamp(min(int(self.id.partition("-")[0]), LAST_MS) / 1000, UTC)

    @property
    def suspect(self) -> bool:
        return self.deliveries > TRUSTED_DELIVERIES


@dataclass(frozen=True)
class Depth:
    """Records in the stream, not yet read (None: the server cannot tell), and read but not acknowledged."""

    length: int
    lag: int | None
    pending: int

    @property
    def idle(self) -> bool:
        return self.lag == 0 and self.pending == 0


@dataclass(frozen=True)
class Vanished:
    """Records that were erased before they were scored, and when that was last noticed (Unix seconds, 0: never)."""

    records: int
    at: int


class Stream:
    def __init__(self, client: "redis.Redis", key: str, group: str, consumer: str | None = None) -> None:
        self._redis = client
        self.key = key
        self.group = group
        self.consumer = consumer or f"{socket.gethostname()}-{uuid.uuid4().hex[:12]}"
        folder = importlib.resources.files("worker") / "lua"
        self._scripts = {
            name: client.register_script((folder / f"{name}.lua").read_text(encoding="utf-8")) for name in SCRIPTS
        }

    def _run(self, script: str, *arguments: Any) -> Any:
        return self._scripts[script](keys=[self.key, f"{self.key}:books", f"{self.key}:erased"], args=arguments)

    # --- publishing

    def publish(self, payloads: Sequence[bytes]) -> None:
        """Append records in order, in pipelined chunks. Raises `StreamFull`, which knows those that were not taken."""
        for start in range(0, len(payloads), PUBLISH_CHUNK):
            chunk = payloads[start : start + PUBLISH_CHUNK]
            with converted():
                pipe = self._redis.pipeline(transaction=False)
                for payload in chunk:
                    pipe.xadd(self.key, {FIELD: payload})
                answers = pipe.execute(raise_on_error=False)
                full = [payload for payload, answer in zip(chunk, answers, strict=True) if out_of_memory(answer)]
                for answer in answers:
                    if isinstance(answer, Exception) and not out_of_memory(answer):
                        raise answer
            if full:
                raise StreamFull(FULL, [*full, *payloads[start + PUBLISH_CHUNK :]])

    def add(self, entries: Sequence[dict[bytes, bytes]]) -> None:
        """Append entries with all their fields, each whole or not at all."""
        with converted():
            pipe = self._redis.pipeline(transaction=True)
            for fields in entries:
                pipe.xadd(self.key, dict(fields.items()))
            pipe.execute()

    def wait_for_room(self, high_water: int, waiting: Callable[[int], None], max_seconds: float | None = None) -> None:
        """Return when the stream holds at most `high_water` records; until then call `waiting` with its length.

        Who may only add, and not ask, adds: a full server still makes him wait.
        """
        started = time.monotonic()
        while (length := self._length_if_allowed()) > high_water:
            waiting(length)
            if max_seconds is not None and time.monotonic() - started > max_seconds:
                raise StreamFull(
                    f"the stream has held over {high_water:,} records for {max_seconds:.0f} s; start scoring workers"
                )
            time.sleep(FULL_WAIT_SECONDS)

    def _length_if_allowed(self) -> int:
        try:
            return self.length()
        except StreamDenied:
            return 0

    def length(self) -> int:
        with converted():
            return int(self._redis.xlen(self.key))

    # --- reading

    def ensure_group(self) -> None:
        with converted():
            self._run("group", self.group)

    def read(self, count: int, block_ms: int | None) -> list[Record]:
        """Up to `count` new records, at once when there are any; else wait up to `block_ms` for the first.

        A group that is gone (FLUSHALL, a new server) is made again at 0, so that nothing in the stream is skipped.
        """
        with converted():
            records, last_id = self._take(count)
            if not records and last_id is not None and block_ms is not None:
                self._redis.xread({self.key: last_id}, count=1, block=block_ms)
                records, _ = self._take(count)
        return records

    def look_for_vanished(self) -> None:
        """Notice what was erased before anybody read it, when nobody reads. Reading does it, too."""
        with converted():
            self._take(0)

    def _take(self, count: int) -> tuple[list[Record], Any]:
        """New records, and the last id that the stream gave out; None for it when the group had to be made."""
        try:
            entries, last_id, vanished = self._run("read", self.group, self.consumer, count)
        except redis.ResponseError as error:
            if "NOGROUP" not in str(error):
                raise
            self.ensure_group()
            return [], None
        self._warn(vanished, "before anybody read them")
        return [_record(id_, fields, 1) for id_, fields in entries], last_id

    def claim_idle(self, min_idle_ms: int, count: int) -> list[Record]:
        """Take over up to `count` records that their readers have not renewed for `min_idle_ms`."""
        records: list[Record] = []
        start = "-"
        with converted():
            while len(records) < count:
                most = min(count - len(records), CLAIM_CHUNK)
                try:
                    entries, last_id, vanished = self._run("claim", self.group, self.consumer, min_idle_ms, most, start)
                except redis.ResponseError as error:
                    if "NOGROUP" not in str(error):
                        raise
                    self.ensure_group()
                    return []
                self._warn(vanished, "while a worker that is gone held them")
                records += [_record(*entry) for entry in entries]
                if not last_id:
                    break
                start = f"({_text(last_id)}"
        return records

    def _warn(self, vanished: int, when: str) -> None:
        if vanished:
            log.warning("%d records of %r were erased %s; XADD without MAXLEN and MINID", vanished, self.key, when)

    def wait_for_news(self, block_ms: int) -> None:
        """Sleep until somebody adds a record, at most `block_ms`. Reads nothing and takes nothing."""
        with converted():
            self._redis.xread({self.key: "$"}, count=1, block=min(block_ms, LONGEST_BLOCK_MS))

    # --- holding and letting go

    def renew(self, ids: Sequence[str]) -> int:
        """Prove this consumer alive for the records it holds. Returns how many of them it still does."""
        with converted():
            return int(self._run("renew", self.group, self.consumer, *ids)) if ids else 0

    def count_isolated(self, id_: str, by: int = 1) -> int:
        """Note, before a suspect is scored alone, that it is; returns how often that is now. -1 takes one back."""
        with converted():
            return int(self._scripts["count"](keys=[f"{self.key}:suspects"], args=[id_, by]))

    def ack(self, ids: Sequence[str]) -> None:
        with converted():
            if ids:
                pipe = self._redis.pipeline(transaction=False)
                pipe.xack(self.key, self.group, *ids)
                pipe.hdel(f"{self.key}:suspects", *ids)
                pipe.hdel(f"{self.key}:erased", *(f"{id_} {self.group}" for id_ in ids))
                pipe.execute()

    def trim(self) -> int:
        """Remove what no group needs any more; returns how many records."""
        with converted():
            return int(self._run("trim"))

    def leave(self) -> None:
        """Take this consumer off the group's list, unless it still holds something somebody must claim."""
        with converted():
            self._run("sweep", self.group, 0, self.consumer)

    def sweep(self, idle_ms: int) -> int:
        """Take consumers off the list that hold nothing and have not asked for `idle_ms`; returns how many."""
        with converted():
            return int(self._run("sweep", self.group, idle_ms))

    # --- taking out for good

    def every(self, count: int) -> Iterator[list[Record]]:
        """All records of the stream, pending ones too, `count` at a time."""
        start = "-"
        while True:
            with converted():
                entries: Any = self._redis.xrange(self.key, min=start, count=count)
            if not entries:
                return
            yield [Record(_text(id_), fields.get(FIELD), 0, fields) for id_, fields in entries]
            start = f"({_text(entries[-1][0])}"

    def remove(self, ids: Sequence[str]) -> None:
        """Delete records, whoever holds them: their readers go on, and nobody takes them over."""
        with converted():
            for start in range(0, len(ids), CLAIM_CHUNK):
                self._run("remove", *ids[start : start + CLAIM_CHUNK])

    def held(self) -> set[str]:
        """The ids of all records that somebody holds, deleted ones too."""
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
        """Have the server write its append-only file anew, without what was removed, and wait for it.

        Raises `StreamError` when it may not or could not: what was removed is still in the file.
        """
        self._log_state()  # a rewrite that is under way may have begun before the removal
        try:
            with converted():
                self._redis.bgrewriteaof()
        except StreamDenied as error:
            raise StreamDenied(f"{error}; {STILL_IN_LOG} until an administrator runs BGREWRITEAOF") from error
        status = self._log_state()["aof_last_bgrewrite_status"]
        if status != "ok":
            raise StreamError(f"{STILL_IN_LOG}: its rewrite ended with {status!r}; look into the server's log")

    def _log_state(self) -> dict[str, Any]:
        """What the server tells of its append-only file, once no rewrite is under way."""
        while True:
            with converted():
                state: dict[str, Any] = self._redis.info("persistence")
            if not state["aof_rewrite_in_progress"] and not state.get("aof_rewrite_scheduled"):
                return state
            time.sleep(0.05)

    # --- looking

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
                # Redis 7.0 counts what was erased unread as unread for ever.
                lag = None if group["lag"] is None else min(int(group["lag"]), length)
                return Depth(length, lag, int(group["pending"]))
        return Depth(length, length, 0)

    def vanished(self) -> Vanished:
        with converted():
            names = [f"vanished {self.group}", f"vanished_at {self.group}"]
            records, at = self._redis.hmget(f"{self.key}:books", names)
        return Vanished(int(records or 0), int(at or 0))

    def oldest(self) -> datetime | None:
        """When the record came in that has waited longest for its acknowledgement; None when there is none."""
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
        return Record(_text(waiting[0][0]), None, 0).came_in if waiting and waiting[0][0] else None


def _record(id_: bytes, fields: Sequence[bytes], deliveries: int) -> Record:
    """From names and values in turns, as scripts give them."""
    named = dict(zip(fields[::2], fields[1::2], strict=True))
    return Record(_text(id_), named.get(FIELD), deliveries, named)


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value
