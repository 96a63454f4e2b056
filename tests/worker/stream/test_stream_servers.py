"""The stream on several servers, on a cluster and behind Sentinels."""

import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.conftest import wait_until
from tests.support.bench import DRAINED, wire
from tests.support.stream_servers import StreamServer, cluster, sentinels, stream_servers
from worker.errors import StreamAway, StreamError
from worker.stream import shard_server
from worker.stream.redis_client import check_url, connect
from worker.stream.sharded_stream import ShardedStream
from worker.stream.shards import shard_of
from worker.stream.stream import Depth, Record

TWEETS = [wire(i) for i in range(200)]


@pytest.fixture
def two(tmp_path: Path) -> Iterator[list[StreamServer]]:
    with stream_servers(tmp_path, 2) as servers:
        yield servers


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Try servers that are away at every call."""
    monkeypatch.setattr(shard_server, "FIRST_AWAY_SECONDS", 1e-6)
    monkeypatch.setattr(shard_server, "LONGEST_AWAY_SECONDS", 1e-6)


def on(servers: list[StreamServer], shards: int = 4) -> ShardedStream:
    return ShardedStream([server.url for server in servers], "tweets", "scorers", shards)


def read_until(stream: ShardedStream, count: int) -> list[Record]:
    found: list[Record] = []

    def enough() -> bool:
        found.extend(stream.read(100, 100))
        return len(found) >= count

    wait_until(enough)
    return found


def done(stream: ShardedStream, records: list[Record]) -> None:
    stream.ack([record.id for record in records])
    stream.trim()


# --- several servers


def test_shards_are_dealt_to_the_servers_and_the_plain_key_is_read_on_each(two: list[StreamServer]) -> None:
    stream = on(two)
    stream.publish(TWEETS)
    for server in two:
        server.client().xadd("tweets", {"tweet": wire(server.port)}, id="1-1")
    assert [sorted(server.client().keys()) for server in two] == [
        [b"tweets", b"tweets:0", b"tweets:2"], [b"tweets", b"tweets:1", b"tweets:3"]
    ]  # fmt: skip
    records = read_until(stream, 202)
    assert len({record.id for record in records}) == 202, "equal ids on two servers are told apart"
    assert Counter(record.payload for record in records) == Counter([*TWEETS, *(wire(s.port) for s in two)])
    assert stream.depth() == Depth(202, 0, 202)
    assert stream.renew([record.id for record in records]) == 202
    done(stream, records)
    assert stream.depth() == DRAINED


def test_an_idle_reader_of_two_servers_gets_a_record_of_either_at_once(two: list[StreamServer]) -> None:
    stream = on(two)
    for _ in range(3):
        assert stream.read(10, 50) == []
    for number in range(6):
        began = time.monotonic()
        two[number % 2].client().xadd(f"tweets:{number % 4}", {"tweet": str(number)})
        (record,) = read_until(stream, 1)
        assert record.payload == str(number).encode()
        assert time.monotonic() - began < 4


def test_the_others_are_served_while_a_server_is_away_and_its_records_when_it_is_back(
    two: list[StreamServer], soon: None
) -> None:
    stream = on(two)
    stream.publish(TWEETS)
    stream.ensure_group()
    two[1].kill()
    here = [wire(i) for i in range(200) if shard_of(str(i), 4) % 2 == 0]
    records = read_until(stream, len(here))
    assert Counter(record.payload for record in records) == Counter(here)
    assert stream.claim_idle(60_000, 10) == []
    assert not any(stream.has_work() for _ in range(1))
    done(stream, records)
    with pytest.raises(StreamAway):
        stream.depth()
    two[1].start()
    records = read_until(stream, 200 - len(here))
    done(stream, records)
    assert stream.depth() == DRAINED


def test_what_is_acknowledged_on_one_server_stays_so_when_the_other_is_away(two: list[StreamServer]) -> None:
    stream = on(two)
    stream.publish(TWEETS)
    records = read_until(stream, 200)
    two[0].kill()
    with pytest.raises(StreamAway):
        stream.ack([record.id for record in records])
    assert two[1].client().xpending("tweets:1", "scorers")["pending"] == 0
    two[0].start()
    second = on(two)
    again = second.claim_idle(0, 1000)
    assert {shard_of(str(record.payload, "utf-8").split('"id": ')[1].split(",")[0], 4) % 2 for record in again} == {0}
    done(second, again)
    wait_until(lambda: second.depth().pending == 0)


def test_with_every_server_away_the_error_reaches_the_caller(two: list[StreamServer], soon: None) -> None:
    stream = on(two)
    stream.ensure_group()
    for server in two:
        server.kill()
    for _ in range(2):
        with pytest.raises(StreamAway):
            stream.read(10, 10)
    two[0].start()
    stream.read(10, 10)


def test_a_server_that_is_added_and_one_that_is_taken_away_lose_nothing(two: list[StreamServer]) -> None:
    """Scorers get the longer list first and the shorter one last."""
    on(two[:1]).publish(TWEETS)
    scorer = on(two)
    done(scorer, read_until(scorer, 200))
    on(two).publish(TWEETS)
    on(two[:1]).publish(TWEETS)
    done(scorer, read_until(scorer, 400))
    assert scorer.depth() == DRAINED


# --- a cluster


@pytest.fixture(scope="module", params=["valkey", "redis"])
def program(request: pytest.FixtureRequest) -> str | None:
    if request.param == "valkey":
        return None
    if shutil.which("redis-server") is None:
        pytest.skip("redis-server (Debian) is missing")
    return "redis-server"


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory, program: str | None) -> Iterator[list[StreamServer]]:
    with cluster(tmp_path_factory.mktemp("cluster"), program=program) as found:
        yield found


@pytest.fixture
def cluster_url(nodes: list[StreamServer]) -> str:
    for node in nodes:
        node.client().flushall()
    return f"redis+cluster://{nodes[0].address},{nodes[1].address}"


def test_every_step_of_the_protocol_runs_on_a_cluster(cluster_url: str, nodes: list[StreamServer]) -> None:
    stream, second = (ShardedStream([cluster_url], "tweets", "scorers", 6) for _ in range(2))
    stream.publish([*TWEETS, b"no tweet"])
    assert sum(bool(node.client().dbsize()) for node in nodes) == 3, "every node holds shards"
    assert stream.length() == 201
    stream.wait_for_room(1_000, lambda length: None)
    records = read_until(stream, 201)
    assert Counter(record.payload for record in records) == Counter([*TWEETS, b"no tweet"])
    ids = [record.id for record in records]
    assert stream.renew(ids) == 201
    stream.ack(ids[:100])
    claimed = second.claim_idle(0, 1_000)
    assert {record.id for record in claimed} == set(ids[100:])
    assert (second.count_isolated(ids[200]), second.count_isolated(ids[200])) == (1, 2)
    assert second.pending_ids() == set(ids[100:])
    second.remove(ids[150:])
    second.ack(ids[100:])
    assert (stream.trim() + second.trim() > 0, second.depth()) == (True, DRAINED)
    assert stream.vanished().records == 0
    assert second.oldest() is None
    second.sweep(0)
    stream.leave()
    assert stream.consumers() == []
    stream.add([{b"tweet": b"again"}, {b"tweet": b"and again"}])
    assert sum(len(part) for part in stream.scan(10)) == 2
    stream.rewrite_log()


def test_a_stream_that_was_there_before_shards_is_read_on_a_cluster(
    cluster_url: str, nodes: list[StreamServer]
) -> None:
    producer = connect(cluster_url)
    for i in range(10):
        producer.xadd("tweets", {"tweet": wire(i)})
    producer.xadd("tweets:5", {"tweet": wire("in a shard")})
    stream = ShardedStream([cluster_url], "tweets", "scorers")
    records = read_until(stream, 11)
    done(stream, records)
    assert stream.depth() == DRAINED


def test_an_idle_reader_of_a_cluster_gets_a_record_of_any_shard_at_once(cluster_url: str) -> None:
    stream, producer = ShardedStream([cluster_url], "tweets", "scorers", 4), connect(cluster_url)
    for _ in range(8):
        assert stream.read(10, 50) == []
    for key in ("tweets", "tweets:0", "tweets:3", "tweets:2", "tweets:1"):
        began = time.monotonic()
        producer.xadd(key, {"tweet": key})
        (record,) = read_until(stream, 1)
        assert record.payload == key.encode()
        assert time.monotonic() - began < 4


@pytest.mark.slow
def test_a_replica_of_the_cluster_takes_over_and_the_stream_goes_on(tmp_path: Path, program: str | None) -> None:
    with cluster(tmp_path, replicas=3, program=program) as nodes:
        url = f"redis+cluster://{','.join(node.address for node in nodes)}"
        stream = ShardedStream([url], "tweets", "scorers", 8)
        stream.publish(TWEETS)
        for number in range(3):
            nodes[number].client().execute_command("WAIT", 1, 5_000)
        first = read_until(stream, 100)
        nodes[0].kill()
        found, more = {record.payload for record in first}, {wire(f"more {i}") for i in range(50)}

        def survives(call: Callable[[], object]) -> bool:
            try:
                call()
            except StreamError:
                return False
            return True

        wait_until(lambda: survives(lambda: stream.publish(sorted(more))))

        def all_read() -> bool:
            survives(lambda: found.update(record.payload for record in stream.claim_idle(0, 1_000)))
            survives(lambda: found.update(record.payload for record in stream.read(100, 10)))
            return found == {*TWEETS, *more}

        wait_until(all_read)
        wait_until(lambda: survives(lambda: stream.ack(sorted(stream.pending_ids()))))
        assert stream.depth().idle


@pytest.mark.slow
def test_an_idle_reader_survives_the_end_and_the_return_of_a_whole_cluster(tmp_path: Path, program: str | None) -> None:
    with cluster(tmp_path, program=program) as nodes:
        stream = ShardedStream([f"redis+cluster://{','.join(n.address for n in nodes)}"], "tweets", "scorers", 4)
        for _ in range(3):
            assert stream.read(10, 50) == []
        for node in nodes:
            node.kill()
        with pytest.raises(StreamAway):
            all(stream.read(10, 100) == [] for _ in range(100))
        for node in nodes:
            node.start()

        def published() -> bool:
            try:
                stream.publish(TWEETS[:20])
            except StreamError:
                return False
            return True

        wait_until(published)
        found: set[bytes | None] = set()

        def all_read() -> bool:
            with suppress(StreamError):
                found.update(record.payload for record in stream.read(100, 100))
            return found == set(TWEETS[:20])

        wait_until(all_read)


# --- Sentinels


@pytest.mark.slow
def test_the_replica_that_sentinels_name_takes_over_and_the_stream_goes_on(tmp_path: Path, program: str | None) -> None:
    with sentinels(tmp_path, program) as (url, (primary, replica)):
        stream = ShardedStream([url], "tweets", "scorers", 2)
        stream.publish(TWEETS)
        records = read_until(stream, 200)
        done(stream, records[:100])
        primary.client().execute_command("WAIT", 1, 5_000)
        primary.kill()

        def goes_on() -> bool:
            try:
                stream.publish([wire("after")])
            except StreamError:
                return False
            return True

        wait_until(goes_on)
        assert replica.client().info("replication")["role"] == "master"
        claimed = stream.claim_idle(0, 1_000)
        assert {record.id for record in claimed} == {record.id for record in records[100:]}
        done(stream, [*claimed, *read_until(stream, 1)])
        assert stream.depth() == DRAINED


# --- URLs


@pytest.mark.parametrize(
    "url",
    [
        "redis+sentinel://host:1",
        "redis+sentinel://host:x/name",
        "redis+cluster://",
        "redis+cluster://a:1,:2",
        "http://a",
    ],
)
def test_urls_that_name_no_server_are_refused_with_the_forms_that_do(url: str) -> None:
    with pytest.raises(StreamError, match=r"write it as .*redis\+cluster://host:6379"):
        check_url(url)


@pytest.mark.parametrize(
    "url", ["redis+sentinel://u:p@a:1,b/name/2?socket_timeout=3", "rediss+cluster://u@[::1]:7000,b?ssl_cert_reqs=none"]
)
def test_urls_of_sentinels_and_clusters_are_checked_without_connecting(url: str) -> None:
    check_url(url)


def test_a_cluster_that_does_not_answer_is_away(tmp_path: Path) -> None:
    stream = ShardedStream(["redis+cluster://127.0.0.1:1"], "tweets", "scorers", 2)
    with pytest.raises(StreamAway):
        stream.read(1, None)
