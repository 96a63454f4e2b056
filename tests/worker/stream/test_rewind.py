"""Records that are kept after they were acknowledged, and a group that reads them again."""

import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest
import redis

from worker.stream import embedded_valkey
from worker.stream.redis_client import connect
from worker.stream.stream import Depth, Stream

HOUR_MS = 3_600_000


@pytest.fixture
def kept(raw: "redis.Redis", stream: Stream) -> Stream:
    """The test's stream, whose records are kept for an hour."""
    return Stream(raw, stream.key, stream.group, keep_hours=1)


def publish(stream: Stream, ages_ms: list[int]) -> list[str]:
    """Records that were added so long ago, the oldest first; returns their ids."""
    stream.ensure_group()
    now = int(time.time() * 1000)
    return [stream._redis.xadd(stream.key, {"tweet": b"{}"}, id=f"{now - age}-1").decode() for age in ages_ms]


def score_all(stream: Stream) -> list[str]:
    """Read and acknowledge everything; returns the ids in order."""
    found: list[str] = []
    while records := stream.read(100, None):
        found += [record.id for record in records]
    stream.ack(found)
    return found


def test_acknowledged_records_stay_for_the_time_that_was_set(kept: Stream) -> None:
    publish(kept, [3 * HOUR_MS, 2 * HOUR_MS, HOUR_MS // 2, 0])
    score_all(kept)
    assert kept.trim() == 2
    assert kept.depth() == Depth(length=2, lag=0, pending=0)
    assert kept.depth().idle
    assert kept.trim() == 0


def test_records_that_are_needed_stay_however_old_they_are(kept: Stream) -> None:
    publish(kept, [3 * HOUR_MS, 2 * HOUR_MS])
    (first,) = kept.read(1, None)
    assert kept.trim() == 0
    kept.ack([first.id])
    assert kept.trim() == 1


def test_kept_records_do_not_make_publishers_wait(kept: Stream) -> None:
    publish(kept, [50, 40, 30])
    score_all(kept)
    assert kept.depth().length == 3
    assert kept.length() == 0
    kept.wait_for_room(1, lambda length: pytest.fail(f"waits for {length} records"))


@pytest.fixture(scope="module")
def own_client(tmp_path_factory: pytest.TempPathFactory) -> Iterator["redis.Redis"]:
    """A client of a server that nobody else uses: its memory is limited."""
    with embedded_valkey.owned(tmp_path_factory.mktemp("own")) as running, connect(running.url) as client:
        yield client


def test_kept_records_give_way_when_memory_is_short_and_records_to_score_do_not(own_client: "redis.Redis") -> None:
    kept = Stream(own_client, "tweets", "scorers", keep_hours=1)
    kept.ensure_group()
    now = int(time.time() * 1000)
    for i in range(2_000):
        own_client.xadd(kept.key, {"tweet": b"x" * 2_000}, id=f"{now - 100_000 + 50 * i}-1")
    score_all(kept)
    kept.publish([b"y"])
    assert kept.trim() == 0
    own_client.config_set("maxmemory", int(own_client.info("memory")["used_memory"]))
    try:
        removed = [kept.trim() for _ in range(12)]
        used = own_client.info("memory")["used_memory"] / own_client.info("memory")["maxmemory"]
    finally:
        own_client.config_set("maxmemory", 0)
    assert 0 < removed[0] < 500  # a part, the oldest ones
    assert removed[-1] == 0
    assert used < 0.81
    assert 1_000 < kept.depth().length < 2_000
    assert [record.payload for record in kept.read(10, None)] == [b"y"]


def test_a_rewound_group_reads_the_records_since_then_once_more(kept: Stream) -> None:
    ids = publish(kept, [30_000, 20_000, 10_000, 0])
    assert score_all(kept) == ids
    since = datetime.now(UTC) - timedelta(seconds=25)
    first = kept.rewind(since)
    assert first is not None
    assert abs((first - since).total_seconds() - 5) < 2
    assert not kept.depth().idle
    assert score_all(kept) == ids[1:]
    assert kept.depth() == Depth(length=4, lag=0, pending=0)
    assert kept.vanished().records == 0


def test_a_group_is_never_moved_forward(kept: Stream) -> None:
    ids = publish(kept, [30_000, 20_000, 10_000])
    assert kept.rewind(datetime.now(UTC) - timedelta(seconds=15)) is not None
    assert score_all(kept) == ids


def test_nothing_is_rewound_where_the_stream_holds_nothing_since_then(kept: Stream) -> None:
    assert kept.rewind(datetime.now(UTC)) is None
    publish(kept, [30_000])
    score_all(kept)
    assert kept.rewind(datetime.now(UTC) - timedelta(seconds=15)) is None
    assert kept.depth().idle


def test_a_record_that_a_consumer_holds_is_settled_although_another_reads_it_again(
    kept: Stream, raw: "redis.Redis"
) -> None:
    ids = publish(kept, [30_000, 20_000])
    other = Stream(raw, kept.key, kept.group, keep_hours=1)
    held = [record.id for record in other.read(10, None)]
    assert held == ids
    kept.rewind(datetime.fromtimestamp(0, UTC))
    assert score_all(kept) == ids
    other.ack(held)
    assert other.depth() == Depth(length=2, lag=0, pending=0)


def test_a_lost_group_reads_everything_anyway(kept: Stream, raw: "redis.Redis") -> None:
    ids = publish(kept, [30_000, 0])
    score_all(kept)
    raw.xgroup_destroy(kept.key, kept.group)
    assert kept.rewind(datetime.fromtimestamp(0, UTC)) is not None
    assert score_all(kept) == ids
