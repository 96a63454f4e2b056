"""All shards of the stream as one: the same interface as `Stream`, made of several of them.

Keys
    KEY               the stream of producers that know nothing of shards; always read
    KEY:0, KEY:1, ... the shards; a tweet's id decides which one it belongs to, see `worker.stream.shards`

Shard I belongs on server I modulo the number of servers. Workers read every shard that exists on any server, whatever
number they are set to, so the number and the servers can be changed while records wait. A record's id has the mark of
its shard at the end, `1700000000000-0@3`, but for the plain key on a single server. With the plain key alone, every
call is that of the one `Stream`.

A worker remembers which shards were empty, and up to which id. Before it reads, one command per server asks which of
them have news. So the others are read in turn, and an idle worker waits for all of them at once. One shard each second
is read without asking: that finds a lost group, erased records, and records of workers that ended.

With several servers, one that does not answer is left out until it is back.
"""

import socket
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any
from urllib.parse import urlsplit
from zlib import crc32

import msgspec

from worker.errors import StreamAway, StreamError, StreamFull
from worker.stream.first_wait import FirstWait
from worker.stream.server_status import Consumer, wait_for_room
from worker.stream.shard_server import Shard, ShardServer
from worker.stream.shards import shard_of
from worker.stream.stream import Depth, Record, Stream, Vanished

# How often one of the shards that are known to be empty is read again without news.
LOOK_SECONDS = 1.0


class _Id(msgspec.Struct):
    id: str | int


class ShardedStream:
    def __init__(
        self, urls: Sequence[str], key: str, group: str, shards: int = 1, consumer: str | None = None,
        keep_hours: float = 0, brief: bool = False,
    ) -> None:  # fmt: skip
        """`brief` clients time out soon and do not retry, for status checks."""
        self.key = key
        self.group = group
        self.consumer = consumer or f"{socket.gethostname()}-{uuid.uuid4().hex[:12]}"
        self.unread: int | None = None  # as in `Stream`
        self._numbers = range(shards) if shards > 1 else range(0)
        self._servers = [
            ShardServer(
                url, key, group, self.consumer, self._numbers[place :: len(urls)],
                _server_tag(url) if len(urls) > 1 else "", keep_hours, brief,
            )
            for place, url in enumerate(urls)
        ]  # fmt: skip
        self._empty: dict[Shard, Any] = {}  # -> the last id that the stream had generated when it was read to its end
        self._turn = 0  # the shard to read first, and
        self._look, self._look_at = 0, -float("inf")  # the one to read without asking
        self._first_wait = FirstWait()
        self._acked: set[Shard] = set()

    def close(self) -> None:
        for server in self._servers:
            server.close()

    # --- publishing

    def publish(self, payloads: Sequence[bytes]) -> None:
        """Append records, in order within a shard. Raises `StreamFull` with the records that were not accepted.

        A record that is no tweet goes to the plain key.
        """
        if not self._numbers:
            return self._plain().stream.publish(payloads)
        parts: dict[int | None, list[bytes]] = {}
        for payload in payloads:
            parts.setdefault(self._number_of(payload), []).append(payload)
        full, rest = None, list[bytes]()
        for number, part in parts.items():
            try:
                self._placed(number).stream.publish(part)
            except StreamFull as error:
                full = error
                rest += error.rest
        if full is not None:
            raise StreamFull(str(full), rest) from full
        return None

    def _number_of(self, payload: bytes) -> int | None:
        try:
            return shard_of(str(msgspec.json.decode(payload, type=_Id).id).strip(), len(self._numbers))
        except (msgspec.MsgspecError, UnicodeError):
            return None

    def _placed(self, number: int | None) -> Shard:
        return self._servers[(number or 0) % len(self._servers)].shard(number)

    def _plain(self) -> Shard:
        return self._placed(None)

    def add(self, entries: Sequence[dict[bytes, bytes]]) -> None:
        """Append entries with all their fields to the plain key, in one transaction."""
        self._plain().stream.add(entries)

    def wait_for_room(self, high_water: int, on_wait: Callable[[int], None], max_seconds: float | None = None) -> None:
        """As `Stream.wait_for_room`, for the sum of all shards."""
        wait_for_room(self.length, high_water, on_wait, max_seconds)

    def length(self) -> int:
        return sum(shard.stream.length() for shard in self._all())

    # --- the shards

    def _all(self) -> list[Shard]:
        """Every shard. Raises `StreamAway` when a server does not answer."""
        return [shard for server in self._servers for shard in server.shards()]

    def _reachable(self) -> list[Shard]:
        """The shards of the servers that answer."""
        if len(self._servers) == 1:
            return self._servers[0].shards()
        found = []
        for server in self._servers:
            if server.answers():
                with self._spared(server):
                    found += server.shards()
        if not found:
            raise StreamAway("no server of the stream answers")
        return found

    @contextmanager
    def _spared(self, server: ShardServer) -> Iterator[None]:
        """Go on without a server that does not answer, while another one does."""
        try:
            yield
        except StreamAway as error:
            self._set_away(server, error)

    def _set_away(self, server: ShardServer, error: StreamAway) -> None:
        """Raises the error when no other server answers."""
        if len(self._servers) == 1:
            raise error
        server.set_away(error)
        for shard in list(self._empty):
            if shard.server is server:  # it may return without its records
                self._empty.pop(shard, None)
        if all(one.away for one in self._servers):
            raise error

    def _by_shard(self, ids: Sequence[str]) -> dict[Shard, list[str]]:
        """Ids without their marks, by shard; those of servers that are away last."""
        shards = {shard.mark: shard for server in self._servers for shard in server.known()}
        if ids and list(shards) == [""]:
            return {shards[""]: list(ids)}
        found: dict[Shard, list[str]] = {}
        for id_ in ids:
            plain, at, mark = id_.partition("@")
            found.setdefault(shards[at + mark], []).append(plain)
        return dict(sorted(found.items(), key=lambda item: item[0].server.away))

    # --- reading

    def ensure_group(self) -> None:
        self._each(self._reachable(), Stream.ensure_group)

    def read(self, count: int, block_ms: int | None) -> list[Record]:
        """Read up to `count` new records, from one shard after the other. When there are none, wait up to `block_ms`
        for the first."""
        shards = self._reachable()
        if len(shards) == 1:
            records = shards[0].marked(shards[0].stream.read(count, block_ms))
            self.unread = shards[0].stream.unread
            return records
        self._ask(shards)
        records = self._take(shards, count)
        if not records and block_ms is not None:
            self._wait(shards, block_ms)
            records = self._take(shards, count)
        unread = [shard.stream.unread for shard in shards if shard.stream.unread is not None]
        self.unread = sum(unread) if unread else None
        return records

    def _take(self, shards: list[Shard], count: int) -> list[Record]:
        records: list[Record] = []
        for number in self._in_turn(shards):
            shard = shards[number]
            if shard in self._empty or shard.server.away:  # since the call began
                continue
            with self._spared(shard.server):
                wanted = count - len(records)
                part, last_id = shard.stream.read_new(wanted)
                if len(part) < wanted and last_id is not None:
                    self._empty[shard] = last_id
                records += shard.marked(part)
            self._turn = number + 1
            if len(records) >= count:
                break
        return records

    def _in_turn(self, shards: list[Shard]) -> list[int]:
        """Numbers of all shards, from the one after the last that was read."""
        return [(self._turn + step) % len(shards) for step in range(len(shards))]

    def _ask(self, shards: list[Shard]) -> None:
        """Forget that a shard was empty when it has news, and one shard each second in any case."""
        if time.monotonic() >= self._look_at:
            self._look, self._look_at = self._look + 1, time.monotonic() + LOOK_SECONDS
            self._empty.pop(shards[self._look % len(shards)], None)
        for server, positions in self._positions(shards).items():
            with self._spared(server):
                self._forget(server.news(positions))

    def _wait(self, shards: list[Shard], block_ms: int) -> None:
        """Wait until one of the empty shards has news, at most `block_ms`."""
        positions = self._positions(shards)
        if any(shard not in self._empty for shard in shards if not shard.server.away):
            return  # read it first
        parts = [(server, part) for server, wanted in positions.items() for part in server.parts(wanted)]
        if len(parts) == 1:
            self._forget(parts[0][0].wait(parts[0][1], block_ms))
            return
        for server, found in self._first_wait.wait(positions, block_ms):
            if isinstance(found, StreamAway):
                self._set_away(server, found)
            elif isinstance(found, StreamError):
                raise found
            else:
                self._forget(found)

    def _positions(self, shards: list[Shard]) -> dict[ShardServer, dict[Shard, Any]]:
        positions: dict[ShardServer, dict[Shard, Any]] = {}
        for shard in shards:
            if (last_id := self._empty.get(shard)) is not None:
                positions.setdefault(shard.server, {})[shard] = last_id
        return positions

    def _forget(self, shards: list[Shard]) -> None:
        for shard in shards:
            self._empty.pop(shard, None)

    def claim_idle(self, min_idle_ms: int, count: int) -> list[Record]:
        """As `Stream.claim_idle`, from one shard after the other."""
        shards, records = self._reachable(), list[Record]()
        for number in self._in_turn(shards):
            shard = shards[number]
            if shard.server.away:
                continue
            with self._spared(shard.server):
                records += shard.marked(shard.stream.claim_idle(min_idle_ms, count - len(records)))
            if len(records) >= count:
                self._turn = number + 1
                break
        return records

    def has_work(self) -> bool:
        """As `Stream.has_work`, for the shards that are not known to be empty."""
        shards = self._reachable()
        if len(shards) == 1:
            return shards[0].stream.has_work()
        self._ask(shards)
        for shard in shards:
            if shard in self._empty or shard.server.away:  # since the call began
                continue
            with self._spared(shard.server):
                _, last_id = shard.stream.read_new(0)
                if shard.stream.has_work():
                    return True
                if last_id is not None:
                    self._empty[shard] = last_id
        return False

    def wait_for_record(self, block_ms: int) -> None:
        """Wait until a record is added, at most `block_ms`. Does not read it."""
        shards = self._reachable()
        if len(shards) == 1:
            shards[0].stream.wait_for_record(block_ms)
        else:
            self._wait(shards, block_ms)

    # --- pending records

    def renew(self, ids: Sequence[str]) -> int:
        return sum(self._for_all(ids, lambda shard, own: shard.stream.renew(own)))

    def count_isolated(self, id_: str, by: int = 1) -> int:
        ((shard, (own,)),) = self._by_shard([id_]).items()
        return shard.stream.count_isolated(own, by)

    def ack(self, ids: Sequence[str]) -> None:
        def ack(shard: Shard, own: list[str]) -> None:
            shard.stream.ack(own)
            self._acked.add(shard)

        self._for_all(ids, ack)

    def _for_all(self, ids: Sequence[str], action: Callable[[Shard, list[str]], Any]) -> list[Any]:
        """Call an action for the ids of each shard. Raises the last error when all shards had their turn."""
        results, failed = [], None
        for shard, own in self._by_shard(ids).items():
            try:
                results.append(action(shard, own))
            except StreamError as error:
                failed = error
        if failed is not None:
            raise failed
        return results

    def trim(self) -> int:
        """Remove the records that every group has acknowledged, from shards with records that this consumer has
        acknowledged; returns how many."""
        acked, self._acked = self._acked, set()
        return sum(shard.stream.trim() for shard in acked)

    def rewind(self, since: datetime) -> datetime | None:
        return min((at for shard in self._all() if (at := shard.stream.rewind(since)) is not None), default=None)

    def leave(self) -> None:
        self._each(self._reachable(), Stream.leave)

    def sweep(self, idle_ms: int) -> int:
        return sum(self._each(self._reachable(), lambda stream: stream.sweep(idle_ms)))

    def _each(self, shards: list[Shard], action: Callable[[Stream], Any]) -> list[Any]:
        results = []
        for shard in shards:
            if not shard.server.away:
                with self._spared(shard.server):
                    results.append(action(shard.stream))
        return results

    # --- deletion

    def scan(self, count: int) -> Iterator[list[Record]]:
        for shard in self._all():
            for records in shard.stream.scan(count):
                yield shard.marked(records)

    def remove(self, ids: Sequence[str]) -> None:
        self._for_all(ids, lambda shard, own: shard.stream.remove(own))

    def pending_ids(self) -> set[str]:
        return {id_ + shard.mark for shard in self._all() for id_ in shard.stream.pending_ids()}

    def rewrite_log(self) -> None:
        """Rewrite the append-only files of all servers; see `Stream.rewrite_log`."""
        for server in self._servers:
            server.shard(None).stream.rewrite_log()

    # --- status

    def detect_vanished(self) -> None:
        for shard in self._all():
            shard.stream.detect_vanished()

    def depth(self) -> Depth:
        """The sums of all shards; the lag is None when that of one is unknown."""
        depths = [shard.stream.depth() for shard in self._all()]
        lags = [depth.lag for depth in depths if depth.lag is not None]
        return Depth(
            sum(depth.length for depth in depths),
            sum(lags) if len(lags) == len(depths) else None,
            sum(depth.pending for depth in depths),
        )

    def vanished(self) -> Vanished:
        found = [shard.stream.vanished() for shard in self._all()]
        return Vanished(sum(one.records for one in found), max(one.at for one in found))

    def oldest(self) -> datetime | None:
        return min((at for shard in self._all() if (at := shard.stream.oldest()) is not None), default=None)

    def consumers(self) -> list[Consumer]:
        """Those with most records first; `idle_seconds` is the time since the last command in any shard."""
        found: dict[str, Consumer] = {}
        for one in (consumer for shard in self._all() for consumer in shard.stream.consumers()):
            same = found.get(one.name, Consumer(one.name, 0, one.idle_seconds))
            found[one.name] = Consumer(one.name, same.pending + one.pending, min(same.idle_seconds, one.idle_seconds))
        return sorted(found.values(), key=lambda one: (-one.pending, one.idle_seconds))


# What publishes, scores and maintains works with either.
TweetStream = Stream | ShardedStream


def _server_tag(url: str) -> str:
    """Names a server in the marks of its shards: the same for every worker, and without its password."""
    parts = urlsplit(url)
    place = f"{parts.netloc.rpartition('@')[2]}{parts.path}"
    return f"{crc32(place.encode()):08x}"
