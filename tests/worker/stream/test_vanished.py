"""Records that a client erased before they were scored: counted once, and nothing else is. On Valkey and on Redis."""

import shutil
import subprocess
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from tests.conftest import wait_until
from tests.support.actors import wait_for_log
from tests.support.bench import Bench, wire
from tests.support.scraped import looked
from tests.support.servers import short_home
from tests.support.world import World, on_sqlite
from worker.process.metrics_endpoint import WorkerCollector
from worker.stream import embedded_valkey
from worker.stream.redis_client import connect
from worker.stream.stream import Stream


@pytest.fixture(scope="module")
def redis7() -> Iterator[str]:
    """The socket of a Redis as Debian has it."""
    if shutil.which("redis-server") is None:
        pytest.skip("redis-server (Debian) is missing")
    with tempfile.TemporaryDirectory(prefix="ts") as folder:
        socket = Path(folder) / "redis.sock"
        command = ["redis-server", "--port", "0", "--unixsocket", str(socket), "--save", "", "--dir", folder]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
            try:
                wait_until(socket.exists)
                yield f"unix://{socket}"
            finally:
                process.kill()


@pytest.fixture(params=["valkey", "redis"])
def client(request: pytest.FixtureRequest) -> Iterator["redis.Redis"]:
    which = request.param
    url = request.getfixturevalue("server").url if which == "valkey" else request.getfixturevalue("redis7")
    with connect(url) as found:
        yield found


@pytest.fixture
def key() -> str:
    return f"tweets-{uuid.uuid4().hex}"


@pytest.fixture
def first(client: "redis.Redis", key: str) -> Stream:
    """A worker that has its group."""
    stream = Stream(client, key, "scorers")
    stream.ensure_group()
    return stream


@pytest.fixture
def second(client: "redis.Redis", key: str) -> Stream:
    return Stream(client, key, "scorers")


def publish(stream: Stream, count: int) -> None:
    stream.publish([b"%d" % i for i in range(count)])


def ids(stream: Stream) -> set[str]:
    return {record.id for portion in stream.scan(1000) for record in portion}


def take(stream: Stream, count: int) -> list[str]:
    return [record.id for record in stream.read(count, None)]


ERASING: dict[str, Callable[["redis.Redis", str], Any]] = {
    "XADD MAXLEN 0": lambda client, key: client.xadd(key, {"a": "b"}, maxlen=0, approximate=False),
    "XADD MAXLEN 3": lambda client, key: client.xadd(key, {"a": "b"}, maxlen=3, approximate=False),
    "XADD MAXLEN ~ 3": lambda client, key: client.xadd(key, {"a": "b"}, maxlen=3),
    "XADD MINID": lambda client, key: client.xadd(key, {"a": "b"}, minid=client.xrevrange(key)[5][0]),
    "XTRIM MAXLEN 0": lambda client, key: client.xtrim(key, maxlen=0, approximate=False),
    "XDEL": lambda client, key: client.xdel(key, *[id_ for id_, _ in client.xrange(key)[-9:-3]]),
}


@pytest.mark.parametrize("given_before", [0, 7])
@pytest.mark.parametrize("command", ERASING)
def test_what_is_erased_unread_is_counted_exactly_and_once(
    first: Stream, client: "redis.Redis", key: str, command: str, given_before: int, caplog: pytest.LogCaptureFixture
) -> None:
    publish(first, 300)
    held = take(first, given_before) if given_before else []
    ERASING[command](client, key)
    added = int(client.xinfo_stream(key)["entries-added"])
    first.detect_vanished()
    read = take(first, 1000)
    publish(first, 2)
    more = take(first, 1000)
    first.ack(held + read + more)
    first.trim()
    assert first.depth().idle, "a worker would look for work that is gone, for ever"
    lost = added - len(held) - len(read)
    assert lost > 0
    for _ in range(2):
        first.detect_vanished()
        assert first.vanished().records == lost
    assert sum(f"{lost} records" in line and "before they were read" in line for line in caplog.messages) == 1
    now = int(client.time()[0])
    assert now - 60 < first.vanished().at <= now


def test_a_client_that_always_erases_is_noticed_though_there_is_never_anything_to_read(
    first: Stream, second: Stream, client: "redis.Redis", key: str
) -> None:
    def look(stream: Stream) -> None:
        for _ in range(50):
            stream.detect_vanished()
            assert stream.read(10, None) == []

    threads = [threading.Thread(target=look, args=[stream]) for stream in (first, second)]
    for thread in threads:
        thread.start()
    for _ in range(100):
        ERASING["XADD MAXLEN 0"](client, key)
    for thread in threads:
        thread.join()
    second.detect_vanished()
    assert first.vanished().records == second.vanished().records == 100


def test_what_is_erased_in_a_workers_hands_counts_when_the_worker_is_gone(
    first: Stream, second: Stream, client: "redis.Redis", key: str
) -> None:
    publish(first, 9)
    held = take(first, 9)
    client.xtrim(key, maxlen=0, approximate=False)
    assert second.claim_idle(60_000, 100) == []
    first.ack(held[:2])
    assert first.renew(held[2:5]) == 3
    second.claim_idle(60_000, 100)
    assert second.vanished().records == 0, "its holder has their texts and may score them yet"
    first.ack(held[2:4])
    assert [second.claim_idle(0, 100), second.vanished().records] == [[], 4], "those that nobody renewed"
    assert second.sweep(0)
    assert [second.claim_idle(0, 100), second.vanished().records] == [[], 5], "and the one whose renewer is gone"
    assert [first.claim_idle(0, 100), first.vanished().records] == [[], 5]
    assert client.exists(f"{key}:erased") == 0


def test_what_was_deleted_on_request_has_not_vanished(
    first: Stream, second: Stream, client: "redis.Redis", key: str
) -> None:
    other = Stream(client, key, "others")
    other.ensure_group()
    publish(first, 12)
    held = take(first, 6)
    first.ack(held[:2])
    first.remove([*held[1:5], *sorted(ids(first))[7:10]])
    first.renew(held[2:4])
    second.detect_vanished()
    first.ack(held[2:3])
    while second.claim_idle(0, 100) or take(second, 100) or take(other, 100):
        second.ack([record.id for record in second.claim_idle(0, 100)])
    for stream in (second, other):
        stream.ack(list(stream.pending_ids()))
        stream.claim_idle(0, 100)
        stream.detect_vanished()
        stream.trim()
        stream.detect_vanished()
        assert stream.vanished().records == 0
    assert client.exists(f"{key}:erased") == 0


def test_a_group_made_later_does_not_count_what_went_before_it(first: Stream, client: "redis.Redis", key: str) -> None:
    publish(first, 5)
    first.ack(take(first, 5))
    first.trim()
    later = Stream(client, key, "later")
    publish(first, 1)
    later.detect_vanished()
    assert len(take(later, 10)) == 1
    later.detect_vanished()
    assert later.vanished().records == 0
    client.delete(key)
    publish(first, 2)
    client.xtrim(key, maxlen=0, approximate=False)  # before anybody looked: nobody can tell it from what was scored
    first.detect_vanished()
    publish(first, 3)
    assert len(take(first, 10)) == 3
    first.detect_vanished()
    assert first.vanished().records == 0


def test_workers_of_an_earlier_release_beside_new_ones_cause_no_alarm(
    client: "redis.Redis", key: str, second: Stream
) -> None:
    client.xgroup_create(key, "scorers", "0", mkstream=True)
    publish(second, 30)
    old = [client.xreadgroup("scorers", "old", {key: ">"}, count=3)[0][1] for _ in range(2)]
    new = take(second, 5)
    old.append(client.xreadgroup("scorers", "old", {key: ">"}, count=4)[0][1])
    second.detect_vanished()
    new += take(second, 5)
    client.xack(key, "scorers", *[id_ for part in old for id_, _ in part])
    second.ack(new)
    second.trim()
    second.detect_vanished()
    assert second.vanished().records == 0
    ERASING["XTRIM MAXLEN 0"](client, key)
    second.detect_vanished()
    assert second.vanished().records == 10


OPERATION = st.tuples(
    st.sampled_from(["publish", "read", "ack", "renew", "trim", "claim", "remove", "erase", "look"]),
    st.integers(0, 1),
    st.integers(1, 6),
)


@hypothesis_settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(OPERATION, max_size=40))
def test_whatever_happens_in_whatever_order_the_count_is_that_of_the_erased(
    client: "redis.Redis", operations: list[tuple[str, int, int]]
) -> None:
    key = f"tweets-{uuid.uuid4().hex}"
    workers = [Stream(client, key, "scorers", f"worker {i}") for i in range(2)]
    workers[0].ensure_group()
    published: set[str] = set()
    read: set[str] = set()
    asked: set[str] = set()
    unread_asked: set[str] = set()
    held: list[set[str]] = [set(), set()]  # as the server has it
    renewed_gone: set[str] = set()
    lost = 0
    for what, who, count in operations:
        worker = workers[who]
        if what == "publish":
            publish(worker, count)
            published |= ids(worker)
        elif what == "read":
            taken = take(worker, count)
            read |= set(taken)
            held[who] |= set(taken)
        elif what == "ack":
            done = sorted(held[who] | renewed_gone)[:count]
            worker.ack(done)
            held = [one - set(done) for one in held]
            renewed_gone -= set(done)
        elif what == "renew":
            worker.renew(sorted(held[who]))
            renewed_gone |= {id_ for id_ in held[who] - ids(worker) if id_ not in asked}
            held[who] &= ids(worker)
        elif what == "trim":
            worker.trim()
        elif what == "claim":
            there, everything = ids(worker), held[0] | held[1]
            worker.claim_idle(0, 1000)
            lost += len(everything - there - asked)
            held = [set(), set()]
            held[who] = everything & there
        elif what == "remove":
            going = sorted(ids(worker))[-count:]
            worker.remove(going)
            asked |= set(going)
            unread_asked |= set(going) - read
        elif what == "erase":
            client.xtrim(key, maxlen=count, approximate=False)
        else:
            worker.detect_vanished()
    while taken := take(workers[0], 100):
        read |= set(taken)
    workers[0].ack(sorted(read))
    workers[0].trim()
    workers[0].detect_vanished()
    assert workers[0].vanished().records == lost + len(published - read - unread_asked)


# --- around it


def test_the_count_outlives_the_server_and_starts_anew_when_everything_is_flushed() -> None:
    with short_home() as home:
        with embedded_valkey.owned(home) as server, connect(server.url) as client:
            stream = Stream(client, "tweets", "scorers")
            stream.ensure_group()
            publish(stream, 10)
            take(stream, 4)
            client.xtrim("tweets", maxlen=0, approximate=False)
        with embedded_valkey.owned(home) as server, connect(server.url) as client:
            stream = Stream(client, "tweets", "scorers")
            for _ in range(2):
                stream.detect_vanished()
                assert stream.vanished().records == 6
            client.flushall()
            publish(stream, 3)
            stream.detect_vanished()
            assert (len(take(stream, 10)), stream.vanished().records) == (3, 0)


def test_prometheus_is_told_how_many_vanished_and_when(lite: Bench) -> None:
    lite.stream.ensure_group()
    looks = WorkerCollector("scoring", lambda: "idle", lambda: None, lite.stream, lite.database)
    found = looked(looks)
    assert (found["records_vanished_total", ""], found["records_vanished_at_seconds", ""]) == (0, 0)
    publish(lite.stream, 2)
    ERASING["XTRIM MAXLEN 0"](lite.raw, lite.stream.key)
    lite.stream.detect_vanished()
    found = looked(looks)
    assert found["records_vanished_total", ""] == 2
    assert found["records_vanished_at_seconds", ""] == lite.stream.vanished().at


@on_sqlite
def test_an_idle_worker_says_that_a_producer_erases_and_scores_what_is_left(world: World) -> None:
    with world.worker() as worker:
        world.stream.publish([wire("before")])
        world.drained()
        for _ in range(3):
            ERASING["XADD MAXLEN 0"](world.raw, world.stream.key)
        wait_until(lambda: world.stream.vanished().records == 3)
        wait_for_log(worker, "erased before they were read; call XADD without MAXLEN")
        world.stream.publish([wire("after")])
        wait_until(lambda: world.predictions() == 2)
    assert world.dead() == []
