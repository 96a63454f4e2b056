"""Several shards as one stream, against real servers: placing, fair reading, waiting, finding shards, sums."""

import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
import redis
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from tests.conftest import wait_until
from tests.support.bench import DRAINED, wire
from worker.errors import StreamFull
from worker.stream import embedded_valkey, shard_server, sharded_stream
from worker.stream.redis_client import connect
from worker.stream.sharded_stream import ShardedStream
from worker.stream.shards import shard_of
from worker.stream.stream import Depth, Record, Stream


@pytest.fixture
def key() -> str:
    return f"tweets-{uuid.uuid4().hex}"


@pytest.fixture
def open_with(server: embedded_valkey.Server, key: str) -> Callable[..., ShardedStream]:
    """A consumer of the test's stream that is set to so many shards."""

    def opened(shards: int, **given: Any) -> ShardedStream:
        return ShardedStream([server.url], key, "scorers", shards, **given)

    return opened


@pytest.fixture
def four(open_with: Callable[..., ShardedStream]) -> ShardedStream:
    return open_with(4)


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look for new shards, and into empty ones, at every call."""
    monkeypatch.setattr(shard_server, "DISCOVER_SECONDS", 0.0)
    monkeypatch.setattr(sharded_stream, "LOOK_SECONDS", 0.0)


def read_all(stream: ShardedStream, count: int = 100) -> list[Record]:
    """Read until all shards are empty."""
    stream.ensure_group()
    found: list[Record] = []
    while stream.depth().lag:
        found += stream.read(count, None)
    return found


def drained(stream: ShardedStream) -> list[Record]:
    records = read_all(stream)
    stream.ack([record.id for record in records])
    stream.trim()
    return records


def payloads(records: list[Record]) -> Counter[bytes | None]:
    return Counter(record.payload for record in records)


# --- the rule


@pytest.mark.parametrize(
    ("tweet_id", "crc32"), [("1", 0x83DCEFB7), ("1595123456789012345", 0xFAB09A2C), ("つぶやき", 0xAE7586AF)]
)
def test_the_shard_is_the_crc_32_of_the_ids_bytes_modulo_their_number(tweet_id: str, crc32: int) -> None:
    assert [shard_of(tweet_id, shards) for shards in (1, 2, 4, 64)] == [crc32 % shards for shards in (1, 2, 4, 64)]


def test_tweets_lie_in_the_shards_of_their_ids_and_what_is_no_tweet_under_the_plain_key(
    four: ShardedStream, raw: "redis.Redis", key: str
) -> None:
    four.publish([wire("a"), wire(17), wire("17"), b"no tweet", b'{"text":"no id"}', wire(" 17 ")])
    found = {number: [fields[b"tweet"] for _, fields in raw.xrange(f"{key}:{number}")] for number in range(4)}
    assert found[shard_of("17", 4)] == [wire(17), wire("17"), wire(" 17 ")]
    assert found[shard_of("a", 4)] == [wire("a")]
    assert [fields[b"tweet"] for _, fields in raw.xrange(key)] == [b"no tweet", b'{"text":"no id"}']


def test_one_shard_is_the_plain_key_and_its_record_ids_are_those_of_the_server(
    open_with: Callable[..., ShardedStream], raw: "redis.Redis", key: str
) -> None:
    one = open_with(1)
    one.publish([wire(1), wire(2)])
    one.ensure_group()
    assert [record.id for record in one.read(10, None)] == [id_.decode() for id_, _ in raw.xrange(key)]
    assert raw.keys(f"{key}:[0-9]*") == []


def commands(client: "redis.Redis", work: Callable[[], object]) -> Counter[str]:
    """How many commands of each kind the server executes for `work`, those of scripts too."""
    client.config_resetstat()
    work()
    own = {"config|resetstat", "info", "client|setinfo", "ping", "hello", "script|load"}
    found = client.info("commandstats")
    named = {name.removeprefix("cmdstat_"): int(stats["calls"]) for name, stats in found.items()}
    return Counter({name: calls for name, calls in named.items() if name not in own})


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, "redis.Redis"]]:
    """A server that only this file uses, with its URL."""
    with embedded_valkey.owned(tmp_path_factory.mktemp("own")) as running, connect(running.url) as client:
        yield running.url, client


def test_one_shard_costs_no_command_more_than_the_one_stream_did(own: tuple[str, "redis.Redis"]) -> None:
    url, client = own
    client.flushall()

    def cycle(stream: Stream | ShardedStream) -> None:
        stream.ensure_group()
        for number in range(10):
            stream.publish([wire(f"{number}-{i}") for i in range(3)])
            stream.has_work()
            stream.claim_idle(60_000, 100)
            held = [record.id for record in stream.read(100, 10)]
            stream.renew(held)
            stream.ack(held)
            stream.trim()
            stream.depth()

    cycle(Stream(client, "a", "scorers"))  # loads the scripts
    plain, sharded = Stream(client, "b", "scorers"), ShardedStream([url], "c", "scorers")
    before, after = commands(client, lambda: cycle(plain)), commands(client, lambda: cycle(sharded))
    assert after - before == Counter(exists=1), "it asks every few seconds whether there are shards"


# --- reading


def test_every_record_is_read_once_whatever_its_shard(four: ShardedStream, raw: "redis.Redis", key: str) -> None:
    published = [wire(i) for i in range(1_000)]
    four.publish(published)
    raw.xadd(key, {"tweet": wire("plain")})
    four.ensure_group()
    records = read_all(four, 64)
    assert payloads(records) == Counter([*published, wire("plain")])
    assert len({record.id for record in records}) == 1_001
    assert four.depth() == Depth(1_001, 0, 1_001)
    four.ack([record.id for record in records])
    assert (four.trim(), four.depth()) == (1_001, DRAINED)


def test_a_window_takes_records_of_several_shards_up_to_its_size(four: ShardedStream) -> None:
    four.publish([wire(i) for i in range(40)])
    four.ensure_group()
    assert len(four.read(30, None)) == 30
    assert len(four.read(30, None)) == 10
    assert four.unread == 0


def test_a_shard_with_a_long_backlog_does_not_starve_the_others(
    four: ShardedStream, raw: "redis.Redis", key: str
) -> None:
    four.ensure_group()
    pipe = raw.pipeline(transaction=False)
    for i in range(20_000):
        pipe.xadd(f"{key}:2", {"tweet": wire(i)})
    pipe.execute()
    for _ in range(10):
        assert len(four.read(50, None)) == 50
    for place in ("", ":0", ":1", ":3"):
        raw.xadd(f"{key}{place}", {"tweet": wire("rare")})
    read = [record for _ in range(5) for record in four.read(50, None)]
    assert payloads(read)[wire("rare")] == 4, "each shard has its turn"


def test_shards_with_backlogs_are_read_in_turn(four: ShardedStream) -> None:
    four.publish([wire(i) for i in range(4_000)])
    four.ensure_group()
    turns = [{record.id.partition("@")[2] for record in four.read(50, None)} for _ in range(16)]
    assert Counter(mark for turn in turns for mark in turn) == dict.fromkeys("0123", 4)


def test_claiming_has_turns_too(four: ShardedStream, open_with: Callable[..., ShardedStream]) -> None:
    four.publish([wire(i) for i in range(400)])
    four.ensure_group()
    read_all(four)
    second = open_with(4)
    claimed = [record for _ in range(8) for record in second.claim_idle(0, 50)]
    assert len({record.id.partition("@")[2] for record in claimed}) > 1


def test_equal_record_ids_of_different_shards_are_told_apart(four: ShardedStream, raw: "redis.Redis", key: str) -> None:
    for place in ("", ":0", ":3"):
        raw.xadd(f"{key}{place}", {"tweet": wire(place)}, id="5-1")
    four.ensure_group()
    records = {record.payload: record for record in read_all(four)}
    assert {record.id for record in records.values()} == {"5-1", "5-1@0", "5-1@3"}
    assert {record.received_at.timestamp() for record in records.values()} == {0.005}
    assert [four.count_isolated("5-1@0"), four.count_isolated("5-1@0"), four.count_isolated("5-1")] == [1, 2, 1]
    four.ack(["5-1@0"])
    assert four.pending_ids() == {"5-1", "5-1@3"}
    assert four.renew(["5-1", "5-1@0", "5-1@3"]) == 2
    assert (four.trim(), four.count_isolated("5-1@0"), four.count_isolated("5-1")) == (1, 1, 2)
    assert raw.hgetall(f"{key}:3:suspects") == {}


# --- waiting


def test_an_idle_reader_gets_a_record_of_any_shard_at_once(four: ShardedStream, raw: "redis.Redis", key: str) -> None:
    four.ensure_group()
    assert four.read(10, None) == [], "which finds the ends of the streams"
    for place in ("", ":0", ":1", ":2", ":3"):
        got: list[Record] = []
        reader = threading.Thread(target=lambda got=got: got.extend(four.read(10, 10_000)))
        reader.start()
        wait_until(lambda: raw.info("clients")["blocked_clients"])
        began = time.monotonic()
        raw.xadd(f"{key}{place}", {"tweet": place})
        reader.join()
        assert time.monotonic() - began < 9
        assert [record.payload for record in got] == [place.encode()]


def test_an_idle_worker_asks_the_server_no_more_often_with_more_shards(own: tuple[str, "redis.Redis"]) -> None:
    url, client = own

    def idle_commands(shards: int) -> Counter[str]:
        client.flushall()
        stream = ShardedStream([url], "tweets", "scorers", shards)
        for _ in range(3):
            stream.has_work()  # every group exists and every shard is known to be empty
        worst = commands(client, lambda: [_poll(stream) for _ in range(15)])
        return Counter({name: calls for name, calls in worst.items() if name != "xreadgroup"})

    def _poll(stream: ShardedStream) -> None:
        assert not stream.has_work()
        stream.wait_for_record(1)

    few, many = sum(idle_commands(2).values()), sum(idle_commands(32).values())
    assert few >= 30
    assert many <= few + 30, "at most one shard a second is looked into"


def test_work_is_seen_in_a_shard_that_is_new_full_or_held_by_a_worker_that_ended(
    four: ShardedStream, open_with: Callable[..., ShardedStream], raw: "redis.Redis", key: str, at_once: None
) -> None:
    watching = open_with(1)
    assert not any(watching.has_work() for _ in range(5))
    raw.xadd(f"{key}:1", {"tweet": wire(1)})
    wait_until(watching.has_work)
    (held,) = read_all(four)
    for _ in range(5):
        assert watching.read(10, None) == [], "it reads all shards to their ends"
    wait_until(watching.has_work)
    four.ack([held.id])
    wait_until(lambda: not any(watching.has_work() for _ in range(5)))
    assert raw.xlen(f"{key}:1") == 0, "it was trimmed"


# --- the number of shards changes


def test_records_of_shards_beyond_the_number_are_found_and_read(
    open_with: Callable[..., ShardedStream], raw: "redis.Redis", key: str, at_once: None
) -> None:
    open_with(4).publish([wire(i) for i in range(100)])
    raw.xadd(f"{key}:63", {"tweet": wire("a producer with more shards")})
    raw.set(f"{key}:50", "a key that is no stream")
    one = open_with(1)
    assert len(drained(one)) == 101
    open_with(16).publish([wire(f"later {i}") for i in range(200)])
    assert len(drained(one)) == 200
    assert one.depth() == DRAINED


def test_a_worker_set_to_fewer_shards_reads_what_it_finds_while_it_works(
    open_with: Callable[..., ShardedStream], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, four = open_with(1), open_with(4)
    one.ensure_group()
    assert one.read(10, None) == []
    four.publish([wire(i) for i in range(20)])
    monkeypatch.setattr(time, "monotonic", lambda clock=time.monotonic: clock() + shard_server.DISCOVER_SECONDS)
    assert len(drained(one)) == 20


OPERATION = st.tuples(
    st.sampled_from(["publish", "read", "ack", "claim", "renew", "trim", "flush", "look"]),
    st.sampled_from([1, 2, 3, 5]),
    st.integers(1, 9),
)


@hypothesis_settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(OPERATION, max_size=30))
def test_whatever_the_number_of_shards_and_the_order_nothing_is_lost(
    server: embedded_valkey.Server, raw: "redis.Redis", operations: list[tuple[str, int, int]]
) -> None:
    key, published, done = f"tweets-{uuid.uuid4().hex}", 0, set[bytes | None]()
    workers = {shards: ShardedStream([server.url], key, "scorers", shards) for shards in (1, 2, 3, 5)}
    held: dict[int, dict[str, bytes | None]] = {shards: {} for shards in workers}
    for what, shards, count in operations:
        worker, own = workers[shards], held[shards]
        if what == "publish":
            worker.publish([wire(published + i) for i in range(count)])
            published += count
        elif what == "read":
            own.update({record.id: record.payload for record in worker.read(count, None)})
        elif what == "ack":
            ids = list(own)[:count]
            worker.ack(ids)
            done |= {own.pop(id_) for id_ in ids}
        elif what == "claim":
            own.update({record.id: record.payload for record in worker.claim_idle(0, count)})
        elif what == "renew":
            worker.renew(list(own))
        elif what == "flush":
            with suppress(redis.ResponseError):  # there is no such key yet
                raw.xgroup_destroy(f"{key}:{count % shards}", "scorers")
        elif what == "look":
            worker.has_work()
        else:
            worker.trim()
    last = ShardedStream([server.url], key, "scorers")
    last.ensure_group()
    while not last.depth().idle:
        records = last.read(100, None) + last.claim_idle(0, 100)
        last.ack([record.id for record in records])
        done |= {record.payload for record in records}
    assert done == {wire(i) for i in range(published)}


# --- faults of a server


def test_all_groups_that_are_gone_are_made_again(own: tuple[str, "redis.Redis"], at_once: None) -> None:
    url, client = own
    client.flushall()
    stream = ShardedStream([url], "tweets", "scorers", 3)
    stream.publish([wire(i) for i in range(30)])
    assert len(read_all(stream)) == 30
    client.flushall()
    stream.publish([wire(f"later {i}") for i in range(30)])
    found: list[Record] = []

    def reads_the_rest() -> bool:
        found.extend(stream.read(100, None))
        return len(found) == 30

    wait_until(reads_the_rest)
    assert payloads(found) == Counter(wire(f"later {i}") for i in range(30))


def test_a_full_server_returns_exactly_the_records_that_it_did_not_accept(own: tuple[str, "redis.Redis"]) -> None:
    url, client = own
    client.flushall()
    stream = ShardedStream([url], "tweets", "scorers", 3)
    sent = [wire(i, "雨" * 300) for i in range(20_000)]
    client.config_set("maxmemory", client.info("memory")["used_memory"] + 2_000_000)
    try:
        with pytest.raises(StreamFull, match="maxmemory") as caught:
            stream.publish(sent)
        accepted = payloads(read_all(stream, 1_000))
        assert 0 < len(accepted) < len(sent)
        assert accepted + Counter(caught.value.rest) == Counter(sent)
    finally:
        client.config_set("maxmemory", 0)


# --- sums


def test_publishers_wait_for_room_in_all_shards_together(four: ShardedStream) -> None:
    four.publish([wire(i) for i in range(20)])
    told: list[int] = []

    def drain_one(length: int) -> None:
        told.append(length)
        (record,) = four.read(1, None) or four.read(1, None)
        four.ack([record.id])
        four.trim()

    four.ensure_group()
    four.wait_for_room(17, drain_one)
    assert told == [20, 19, 18]


def test_status_is_that_of_all_shards_together(
    four: ShardedStream, open_with: Callable[..., ShardedStream], raw: "redis.Redis", key: str
) -> None:
    raw.xadd(f"{key}:1", {"tweet": wire(1)}, id="2000-0")
    raw.xadd(f"{key}:3", {"tweet": wire(3)}, id="1000-0")
    four.ensure_group()
    assert (four.depth(), four.oldest().timestamp()) == (Depth(2, 2, 0), 1.0)
    (held,) = four.read(1, None)
    (other,) = open_with(4, consumer="other").read(1, None)
    assert four.depth() == Depth(2, 0, 2)
    assert {one.name: one.pending for one in four.consumers()} == {four.consumer: 1, "other": 1}
    four.sweep(0)
    assert len(four.consumers()) == 2, "a consumer stays in the shard whose record it holds"
    assert {record.id for part in four.scan(10) for record in part} == {"2000-0@1", "1000-0@3"}
    four.remove([held.id])
    four.ack([held.id, other.id])
    four.leave()
    assert [one.name for one in four.consumers()] == ["other"]
    assert four.vanished().records == 0
    raw.xadd(f"{key}:2", {"tweet": "erased"})
    raw.xtrim(f"{key}:2", maxlen=0, approximate=False)
    four.detect_vanished()
    assert four.vanished().records == 1
