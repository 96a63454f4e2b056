"""Broker and database are unavailable, locked, full or half-open for a while: nothing is lost, and work continues."""

import os
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import redis

from db import migrate
from db.session import open_database
from tests.conftest import PATIENCE_SECONDS, wait_until
from tests.support.actors import wait_for_log
from tests.support.bench import wire
from tests.support.outages import breakable
from tests.support.world import World, on_postgresql, on_sqlite, with_shards
from worker.intake.publish import send
from worker.stream import embedded_valkey
from worker.stream.redis_client import CLIENT_TIMEOUT_SECONDS, connect


def publish_quietly(world: World, ids: range) -> None:
    world.stream.publish([wire(i, f"雨{i}") for i in ids])


def fill(client: redis.Redis) -> None:
    """Fill the server completely: it may have been full of the publisher's own buffers, which are free again."""
    while True:
        client.rpush("filler", "x" * 1_000)


@pytest.mark.slow
@with_shards
@on_sqlite
def test_17_at_maxmemory_publishers_wait_and_say_so_while_reading_acking_and_trimming_go_on(own: World) -> None:
    said: list[str] = []
    payloads = [wire(i, "長い雨" * 200) for i in range(4_000)]
    with embedded_valkey.owned(own.settings.home, memory_mb=4), connect(own.url) as client:
        own.stream.ensure_group()
        publisher = threading.Thread(target=send, args=(own.stream, payloads, own.settings, said.append))
        publisher.start()
        wait_until(lambda: any("maxmemory" in line for line in said))
        with pytest.raises(redis.OutOfMemoryError):
            fill(client)
        assert publisher.is_alive()
        with own.worker():
            publisher.join(PATIENCE_SECONDS)
            assert not publisher.is_alive()
            own.drained()
            assert client.info("memory")["used_memory"] < 8 * 2**20
    assert own.scored() == {str(i) for i in range(4_000)}
    assert own.dead() == []


@with_shards
@on_postgresql
def test_18_work_goes_on_within_a_minute_of_the_return_of_a_broker_that_was_away(own: World) -> None:
    home = own.settings.home
    with ExitStack() as stack:
        with embedded_valkey.owned(home):
            worker = stack.enter_context(own.worker())
            publish_quietly(own, range(20))
            wait_until(lambda: own.predictions() == 20)
        wait_for_log(worker, "cannot poll for work, trying again")
        assert worker.alive
        stack.enter_context(embedded_valkey.owned(home))
        back = time.monotonic()
        publish_quietly(own, range(20, 40))
        wait_until(lambda: own.predictions() == 40)
        assert time.monotonic() - back < 60
        own.drained()
        worker.kill()


@pytest.mark.slow
@with_shards
@on_sqlite
def test_19_work_goes_on_within_a_minute_after_a_half_open_broker(own: World) -> None:
    """A server that keeps its connections and does not answer, for longer than a client waits."""
    with embedded_valkey.owned(own.settings.home), own.worker() as worker:
        publish_quietly(own, range(20))
        wait_until(lambda: own.predictions() == 20)
        own.drained()
        server = int(own.raw.info("server")["process_id"])
        os.kill(server, signal.SIGSTOP)
        try:
            until = time.monotonic() + 1.3 * CLIENT_TIMEOUT_SECONDS
            wait_until(lambda: time.monotonic() > until)
            assert worker.alive
        finally:
            os.kill(server, signal.SIGCONT)
        back = time.monotonic()
        publish_quietly(own, range(20, 40))
        wait_until(lambda: own.predictions() == 40)
        assert time.monotonic() - back < 60
        own.drained()


# --- the database


@pytest.fixture(params=["sqlite", "postgresql"])
def outage(
    request: pytest.FixtureRequest, tmp_path: Path, quick: dict[str, Any], server: embedded_valkey.Server,
    promote: Callable[..., int],
) -> Iterator[tuple[World, Callable[[], Any]]]:  # fmt: skip
    """A world and a way to make its database unavailable for a block: locked, or its server stopped."""
    quick |= {"redis_url": server.url, "stream_key": f"tweets-{uuid.uuid4().hex}"}
    with ExitStack() as stack:
        url, away = breakable(request.param, tmp_path, stack)
        database = open_database(url)
        stack.callback(database.close)
        migrate.upgrade(database)
        yield (
            World({**quick, "database_url": url}, database, server.url, promote(database, quick["home"] / "models")),
            away,
        )


@pytest.mark.slow
def test_20_while_the_database_is_away_nothing_is_acknowledged_and_afterwards_all_is_drained(
    outage: tuple[World, Callable[[], Any]],
) -> None:
    world, away = outage
    # The watchdog must not take waiting for a hang. One attempt on a locked SQLite file takes 30 s.
    with world.worker(stall_seconds=8 if world.database.engine.dialect.name == "postgresql" else 60) as worker:
        world.stream.publish([wire("before")])
        wait_until(lambda: world.predictions() == 1)
        world.drained()
        with away():
            world.stream.publish([wire(i) for i in range(20)])
            until = time.monotonic() + 10
            later = iter(range(20, 10_000))

            def ten_seconds_passed() -> bool:
                world.stream.publish([wire(next(later))])  # so that the backlog grows
                return time.monotonic() > until

            wait_until(ten_seconds_passed, every=0.2)
            published = 20 + next(later) - 20
            depth = world.stream.depth()
            assert depth.pending + (depth.lag or 0) == published, "nothing was acknowledged"
            assert worker.alive
        wait_until(lambda: world.predictions() == published + 1)
        world.drained()
    assert world.dead() == []
    assert world.passes() == published + 1


@pytest.mark.parametrize(
    "outage",
    [pytest.param("sqlite", marks=pytest.mark.storm), pytest.param("postgresql", marks=pytest.mark.slow)],
    indirect=True,
    ids=str,
)
@pytest.mark.usefixtures("clean_queue")
def test_a_request_to_train_that_comes_while_the_database_is_away_is_a_job_when_it_is_back(
    outage: tuple[World, Callable[[], Any]],
) -> None:
    """Each attempt on a locked SQLite waits 30 s, so the outage must last longer."""
    world, away = outage

    def failed(request_id: str) -> bool:
        return (job := world.asked(request_id)) is not None and job.state == "failed"

    with world.worker("train") as trainer:
        before = world.ask("/etc/passwd")
        wait_until(lambda: failed(before))
        with away():
            asked = world.ask("/etc/passwd")
            wait_until(lambda: "training requests wait" in trainer.said())
            until = time.monotonic() + (15 if world.database.engine.dialect.name == "sqlite" else 1)
            wait_until(lambda: time.monotonic() > until)
            assert trainer.alive
        wait_until(lambda: failed(asked))
        assert "outside the folders" in world.asked(asked).error


@pytest.mark.slow
@pytest.mark.parametrize("outage", ["postgresql"], indirect=True)  # a locked SQLite file can be read
def test_a_worker_that_starts_while_the_database_is_away_waits_for_it(
    outage: tuple[World, Callable[[], Any]],
) -> None:
    world, away = outage
    world.stream.publish([wire(i) for i in range(20)])
    with ExitStack() as stack:
        with away():
            worker = stack.enter_context(world.worker(stall_seconds=60))
            wait_for_log(worker, "waiting, and taking no work: the database")
            assert world.stream.depth().pending + (world.stream.depth().lag or 0) == 20, "nothing was acknowledged"
            assert worker.alive
        world.drained()
    assert world.predictions() == world.passes() == 20
