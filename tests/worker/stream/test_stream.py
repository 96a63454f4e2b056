"""The stream's protocol against a real server: publishing, reading, claiming, renewing, acknowledging, trimming."""

import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import redis
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from tests.conftest import wait_until
from worker.errors import StreamError, StreamFull
from worker.stream import embedded_valkey
from worker.stream.redis_client import connect
from worker.stream.stream import Depth, Record, Stream


@pytest.fixture(scope="module")
def own_client(tmp_path_factory: pytest.TempPathFactory) -> Iterator["redis.Redis"]:
    """A client of a server that nobody else uses, for what would disturb the others."""
    with embedded_valkey.owned(tmp_path_factory.mktemp("own")) as running, connect(running.url) as client:
        yield client


@pytest.fixture
def own(own_client: "redis.Redis") -> Iterator[Stream]:
    own_client.config_set("maxmemory", 0)
    own_client.flushall()
    yield Stream(own_client, "tweets", "scorers")
    own_client.config_set("maxmemory", 0)


@pytest.fixture
def second(raw: "redis.Redis", stream: Stream) -> Stream:
    """Another consumer of the same group."""
    return Stream(raw, stream.key, stream.group)


def publish(stream: Stream, count: int) -> None:
    stream.publish([b'{"v":1,"id":"%d","text":"\xe9\x9b\xa8"}' % i for i in range(count)])


def publish_and_read(stream: Stream, count: int) -> list[Record]:
    stream.ensure_group()
    publish(stream, count)
    return stream.read(count, None)


def ids(records: list[Record]) -> list[str]:
    return [record.id for record in records]


def in_background(client: "redis.Redis", blocking: Callable[[], object]) -> threading.Thread:
    """A thread that has run `blocking` and now waits at the server."""
    thread = threading.Thread(target=blocking)
    thread.start()
    wait_until(lambda: client.info("clients")["blocked_clients"])
    return thread


def pending(raw: "redis.Redis", stream: Stream) -> dict[str, tuple[str, int]]:
    """Record id -> who holds it, how often it was delivered."""
    rows = raw.xpending_range(stream.key, stream.group, "-", "+", 100_000)
    return {row["message_id"].decode(): (row["consumer"].decode(), row["times_delivered"]) for row in rows}


# --- publishing and reading


def test_records_are_read_in_the_order_they_were_published(stream: Stream) -> None:
    stream.ensure_group()
    payloads = [str(i).encode() for i in range(2_500)]
    stream.publish(payloads)
    records = stream.read(2_000, None) + stream.read(2_000, None)
    assert [record.payload for record in records] == payloads
    assert {record.deliveries for record in records} == {1}
    assert stream.depth() == Depth(length=2_500, lag=0, pending=2_500)


def test_blocked_reader_gets_a_record_as_soon_as_anybody_adds_one(stream: Stream, raw: "redis.Redis") -> None:
    stream.ensure_group()
    got: list[Record] = []
    reader = in_background(raw, lambda: got.extend(stream.read(10, 10_000)))
    began = time.monotonic()
    raw.xadd(stream.key, {"tweet": "from any client", "other": "ignored"})
    reader.join()
    assert time.monotonic() - began < 9
    assert [record.payload for record in got] == [b"from any client"]


def test_waiting_for_news_ends_with_a_record_and_takes_nothing(stream: Stream, raw: "redis.Redis") -> None:
    stream.ensure_group()
    waiter = in_background(raw, lambda: stream.wait_for_record(10_000))
    began = time.monotonic()
    publish(stream, 1)
    waiter.join()
    assert time.monotonic() - began < 9
    assert stream.depth() == Depth(length=1, lag=1, pending=0)


@pytest.mark.parametrize("loss", ["flushall", "key deleted", "group destroyed"])
def test_group_that_is_gone_is_made_again_and_skips_nothing(own: Stream, own_client: "redis.Redis", loss: str) -> None:
    held = publish_and_read(own, 3)
    if loss == "flushall":
        own_client.flushall()
    elif loss == "key deleted":
        own_client.delete(own.key)
    else:
        own_client.xgroup_destroy(own.key, own.group)
    own.publish([b"later"])
    assert own.read(10, None) == []
    found = own.read(10, None)
    kept = [record.payload for record in held] if loss == "group destroyed" else []
    assert [record.payload for record in found] == [*kept, b"later"]


def test_reader_survives_the_loss_of_its_key_while_it_waits(own: Stream, own_client: "redis.Redis") -> None:
    own.ensure_group()
    got: list[list[Record]] = []
    reader = in_background(own_client, lambda: got.append(own.read(10, 1_000)))
    own_client.delete(own.key)
    reader.join()
    assert got == [[]]
    publish(own, 1)
    assert len(own.read(10, None)) == 1


def test_claiming_from_a_lost_group_makes_it_again(own: Stream, own_client: "redis.Redis") -> None:
    publish_and_read(own, 1)
    own_client.flushall()
    assert own.claim_idle(0, 10) == []
    assert [group["name"] for group in own_client.xinfo_groups(own.key)] == [b"scorers"]


# --- claiming and renewing


def test_claiming_counts_deliveries_and_suspects_from_the_third(stream: Stream, second: Stream) -> None:
    read = publish_and_read(stream, 2)
    once = second.claim_idle(0, 10)
    twice = stream.claim_idle(0, 10)
    assert ids(read) == ids(once) == ids(twice)
    assert [record.payload for record in twice] == [record.payload for record in read]
    assert [[record.deliveries for record in delivery] for delivery in (read, once, twice)] == [[1, 1], [2, 2], [3, 3]]
    assert [[record.suspect for record in delivery] for delivery in (read, once, twice)] == [
        [False, False], [False, False], [True, True]
    ]  # fmt: skip


def test_claim_takes_as_many_as_asked_for_and_leaves_the_rest(
    stream: Stream, second: Stream, raw: "redis.Redis"
) -> None:
    held = publish_and_read(stream, 2_500)
    claimed = second.claim_idle(0, 2_200)
    assert ids(claimed) == ids(held)[:2_200]
    assert {record.deliveries for record in claimed} == {2}
    assert {id_ for id_, (who, _) in pending(raw, stream).items() if who == stream.consumer} == set(ids(held)[2_200:])


def test_late_renewal_never_steals_back(stream: Stream, second: Stream, raw: "redis.Redis") -> None:
    held = publish_and_read(stream, 3)
    taken = ids(second.claim_idle(0, 2))
    assert stream.renew(ids(held)) == 1
    assert second.renew(taken) == 2
    kept = held[2].id
    assert pending(raw, stream) == {**dict.fromkeys(taken, (second.consumer, 2)), kept: (stream.consumer, 1)}


def test_renewal_holds_thousands_of_records_without_counting_a_delivery(stream: Stream, raw: "redis.Redis") -> None:
    held = publish_and_read(stream, 9_000)
    assert stream.renew(ids(held)) == 9_000
    assert set(pending(raw, stream).values()) == {(stream.consumer, 1)}
    stream.ack(ids(held)[:8_990])
    assert stream.renew(ids(held)) == 10


def test_renewed_record_is_not_claimed_and_a_silent_one_is(stream: Stream, second: Stream, raw: "redis.Redis") -> None:
    renewed, silent = publish_and_read(stream, 2)
    min_idle_ms = 300

    def idle_ms(record: Record) -> int:
        row = raw.xpending_range(stream.key, stream.group, record.id, record.id, 1)[0]
        return int(row["time_since_delivered"])

    wait_until(lambda: stream.renew([renewed.id]) and idle_ms(silent) > min_idle_ms)
    assert ids(second.claim_idle(min_idle_ms, 10)) == [silent.id]
    assert pending(raw, stream) == {renewed.id: (stream.consumer, 1), silent.id: (second.consumer, 2)}


def test_isolated_attempts_are_counted_until_the_record_is_acknowledged(
    stream: Stream, second: Stream, raw: "redis.Redis"
) -> None:
    first, _ = publish_and_read(stream, 2)
    assert [stream.count_isolated(first.id), second.count_isolated(first.id)] == [1, 2]
    assert raw.hgetall(f"{stream.key}:suspects") == {first.id.encode(): b"2"}
    stream.ack([first.id])
    assert raw.hgetall(f"{stream.key}:suspects") == {}
    assert stream.depth().pending == 1


# --- trimming


def test_without_any_group_nothing_is_trimmed(stream: Stream) -> None:
    assert stream.trim() == 0
    publish(stream, 3)
    assert stream.trim() == 0
    assert stream.length() == 3


@hypothesis_settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(
    st.integers(0, 12),
    st.lists(st.tuples(st.integers(0, 12), st.sets(st.integers(0, 11))), min_size=1, max_size=3),
)
def test_trim_keeps_what_any_group_needs_and_removes_all_before_it(
    raw: "redis.Redis", published: int, groups: list[tuple[int, set[int]]]
) -> None:
    """Each group has read so many records and acknowledged some of them."""
    key = f"trim-{uuid.uuid4().hex}"
    streams = [Stream(raw, key, f"group-{i}") for i in range(len(groups))]
    needed: set[str] = set()
    for stream in streams:
        stream.ensure_group()
    publish(streams[0], published)
    everything = [id_.decode() for id_, _ in raw.xrange(key)]
    for stream, (read, acked) in zip(streams, groups, strict=True):
        held = ids(stream.read(read, None)) if read else []
        stream.ack([id_ for i, id_ in enumerate(held) if i in acked])
        needed |= {id_ for i, id_ in enumerate(everything) if i >= len(held) or i not in acked}
    first = min((everything.index(id_) for id_ in needed), default=len(everything))
    assert streams[0].trim() == first
    assert [id_.decode() for id_, _ in raw.xrange(key)] == everything[first:]
    assert streams[-1].trim() == 0


def test_trimming_leaves_pending_records_readable(stream: Stream, second: Stream) -> None:
    held = publish_and_read(stream, 50)
    stream.ack(ids(held)[:10] + ids(held)[11:])
    assert stream.trim() == 10
    assert second.claim_idle(0, 100) == [msgspec.structs.replace(held[10], deliveries=2)]
    second.ack([held[10].id])
    assert second.trim() == 40
    assert stream.depth() == Depth(length=0, lag=0, pending=0)


# --- groups, depth, leaving


def test_depth_follows_a_record_from_publishing_to_trimming(stream: Stream) -> None:
    assert stream.depth() == Depth(0, 0, 0)
    publish(stream, 3)
    assert stream.depth() == Depth(length=3, lag=3, pending=0), "no group has read anything"
    stream.ensure_group()
    assert stream.depth() == Depth(length=3, lag=3, pending=0)
    held = stream.read(2, None)
    assert stream.depth() == Depth(length=3, lag=1, pending=2)
    stream.ack(ids(held))
    stream.trim()
    assert stream.depth() == Depth(length=1, lag=1, pending=0)
    assert not stream.depth().idle
    stream.ack(ids(stream.read(2, None)))
    assert stream.depth().idle


def test_unknown_lag_is_not_taken_for_idle(stream: Stream, raw: "redis.Redis") -> None:
    stream.ensure_group()
    publish(stream, 4)
    stream.ack(ids(stream.read(1, None)))
    raw.xdel(stream.key, raw.xrange(stream.key)[2][0])
    assert stream.depth() == Depth(length=3, lag=None, pending=0)
    assert not stream.depth().idle


def test_leaving_keeps_a_consumer_that_still_holds_records(stream: Stream, second: Stream, raw: "redis.Redis") -> None:
    held = publish_and_read(stream, 2)
    stream.ack([held[0].id])
    stream.leave()
    assert [row["name"].decode() for row in raw.xinfo_consumers(stream.key, stream.group)] == [stream.consumer]
    assert ids(second.claim_idle(0, 10)) == [held[1].id]
    stream.leave()
    assert [row["name"].decode() for row in raw.xinfo_consumers(stream.key, stream.group)] == [second.consumer]


def test_only_consumers_that_hold_nothing_and_are_silent_are_swept(
    stream: Stream, second: Stream, raw: "redis.Redis"
) -> None:
    held = publish_and_read(stream, 2)
    assert second.read(10, None) == []

    def names() -> set[str]:
        return {row["name"].decode() for row in raw.xinfo_consumers(stream.key, stream.group)}

    assert stream.sweep(60_000) == 0, "nobody has been silent for a minute"
    assert names() == {stream.consumer, second.consumer}
    assert stream.sweep(0) == 1
    assert names() == {stream.consumer}, "what it holds would be lost with it"
    stream.ack([record.id for record in held])
    assert stream.sweep(0) == 1
    assert second.read(10, None) == [], "a swept consumer is made again by its next read"
    assert names() == {second.consumer}
    raw.delete(stream.key)
    assert stream.sweep(0) == 0


# --- a stream that is full, a server that is not there


def test_publisher_waits_at_high_water_until_there_is_room(stream: Stream) -> None:
    held = publish_and_read(stream, 5)
    told: list[int] = []

    def drain_one(length: int) -> None:
        told.append(length)
        stream.ack([held[len(told) - 1].id])
        stream.trim()

    stream.wait_for_room(3, drain_one)
    assert told == [5, 4]
    assert stream.length() == 3


def test_publisher_gives_up_with_a_sentence_when_asked_to(stream: Stream) -> None:
    publish(stream, 5)
    with pytest.raises(StreamFull, match=r"over 3 records .* start scoring workers"):
        stream.wait_for_room(3, lambda _: None, max_seconds=0.1)
    assert stream.length() == 5


def test_reading_acknowledging_and_trimming_go_on_when_memory_is_full(own: Stream, own_client: "redis.Redis") -> None:
    own.ensure_group()
    own_client.config_set("maxmemory", own_client.info("memory")["used_memory"] + 1_000_000)
    with pytest.raises(StreamFull, match="maxmemory"):
        own.publish([b"x" * 1_000] * 100_000)
    published = own.length()
    assert 0 < published < 100_000
    drained = 0
    while records := own.read(500, None):
        assert own.renew(ids(records)) == len(records)
        own.ack(ids(records))
        drained += own.trim()
    assert drained == published
    assert own.depth().idle
    own.publish([b"room again"])
    assert own.length() == 1


def test_worker_can_start_and_isolate_suspects_when_memory_is_full(own: Stream, own_client: "redis.Redis") -> None:
    """Otherwise nobody would drain the stream, and its memory would stay full."""
    suspect = publish_and_read(own, 1)[0]
    own_client.config_set("maxmemory", 1)
    own.ensure_group()
    assert own.count_isolated(suspect.id) == 1


@pytest.mark.parametrize("fault", ["nobody listens", "the key is no stream"])
def test_faults_of_the_server_become_one_error_of_ours(
    tmp_path: Path, stream: Stream, raw: "redis.Redis", fault: str
) -> None:
    if fault == "nobody listens":
        stream = Stream(connect(f"unix://{tmp_path / 'absent.sock'}"), "tweets", "scorers")
    else:
        raw.set(stream.key, "a string")
    with pytest.raises(StreamError, match="does not answer as it should") as caught:
        stream.publish([b"{}"])
    assert isinstance(caught.value.__cause__, redis.RedisError)
