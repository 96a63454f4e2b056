"""A stream of several shards under faults: their number changes under load, and all that surrounds scoring."""

import random
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from db.models import Prediction, ScoringWindow
from tests.conftest import wait_until
from tests.support.actors import Actor, wait_for_log
from tests.support.bench import wire
from tests.support.scraped import looked
from tests.support.stream_servers import StreamServer, cluster, sentinels, stream_servers
from tests.support.world import World, on_postgresql, on_sqlite, on_two_shards
from worker.app import make_app
from worker.connections import open_stream
from worker.errors import StreamError
from worker.intake.publish import send
from worker.maintenance.dead_letters import retry
from worker.maintenance.deletion import TweetFilter, delete_tweets
from worker.process.metrics_endpoint import WorkerCollector
from worker.settings import load_settings
from worker.stream.redis_client import CLIENT_TIMEOUT_SECONDS
from worker.stream.shards import shard_of

Run = Callable[..., subprocess.CompletedProcess[str]]


def environment(world: World) -> dict[str, str]:
    return {
        "DATABASE_URL": str(world.given["database_url"]), "REDIS_URL": world.url,
        "TWEETSCORE_STREAM_KEY": world.settings.stream_key, "TWEETSCORE_HOME": str(world.given["home"]),
        "TWEETSCORE_STREAM_SHARDS": str(world.settings.stream_shards),
        "TWEETSCORE_STREAM_URLS": " ".join(world.settings.stream_urls),
    }  # fmt: skip


class Load(threading.Thread):
    """A producer that publishes tweets with the number of shards that it is set to, a tenth of them twice."""

    def __init__(self, world: World) -> None:
        super().__init__(daemon=True)
        self._world, self._chance, self._ending = world, random.Random(20), threading.Event()
        self.shards, self.published = 1, 0

    def run(self) -> None:
        while not self._ending.wait(0.02):
            settings = load_settings(**{**self._world.given, "stream_shards": self.shards})
            tweets = [wire(self.published + i, f"雨が{i}回降る") for i in range(20)]
            again = [wire(self._chance.randint(0, self.published)) for _ in range(2)] if self.published else []
            send(open_stream(settings, self._world.url), [*tweets, *again], settings, lambda _: None)
            self.published += len(tweets)

    def more(self, tweets: int) -> None:
        """Wait until so many more tweets are published."""
        goal = self.published + tweets
        wait_until(lambda: self.published >= goal or not self.is_alive())
        assert self.is_alive()

    def ends(self) -> None:
        self._ending.set()
        self.join()


@pytest.mark.slow
@on_sqlite
def test_from_one_shard_to_four_and_back_under_load_nothing_is_lost_or_scored_twice(world: World) -> None:
    """Producers and scorers change at different times, and each scorer is killed once."""

    def scorer(shards: int) -> Actor:
        return Actor("score", {**world.given, "stream_shards": shards})

    load, scorers = Load(world), [scorer(1), scorer(1)]
    load.start()
    try:
        load.more(200)
        for shards in (4, 1):
            scorers[0].kill()
            scorers[0] = scorer(shards)
            load.shards = shards
            load.more(200)
            scorers[1].kill()
            scorers[1] = scorer(shards)
            load.more(200)
        used = [key.decode() for key in world.raw.keys(f"{world.settings.stream_key}:[0-9]")]
        load.ends()
        world.drained()
        for one in scorers:
            one.send(signal.SIGTERM)
            assert one.ended() == 0
    finally:
        load.ends()
        for one in scorers:
            one.kill()
    assert sorted(used) == [f"{world.settings.stream_key}:{number}" for number in range(4)]
    assert [world.raw.xlen(key) for key in used] == [0, 0, 0, 0]
    rows = Counter(row["tweet_id"] for row in world.rows(Prediction))
    assert rows == dict.fromkeys(map(str, range(load.published)), 1)
    assert world.dead() == []


@on_sqlite
def test_shards_that_nobody_is_set_to_any_more_are_drained(world: World) -> None:
    settings = load_settings(**{**world.given, "stream_shards": 4})
    stream = open_stream(settings, world.url)
    stream.publish([wire(i) for i in range(40)])
    world.killed_at("forwarded=kill", stream_shards=4)
    assert stream.depth().pending > 0
    with world.worker(stream_shards=1):
        world.drained()
    assert world.scored() == {str(i) for i in range(40)}


@on_two_shards
@on_postgresql
def test_equal_record_ids_of_two_shards_become_two_dead_letters_that_are_retried(world: World) -> None:
    key = world.settings.stream_key
    for place in ("", ":0", ":1"):
        world.raw.xadd(f"{key}{place}", {"tweet": f"no tweet in {place}"}, id="1700000000000-0")
    world.recovers()
    letters = {letter["record_id"]: letter["payload"] for letter in world.dead()}
    assert letters == {
        "1700000000000-0": b"no tweet in ", "1700000000000-0@0": b"no tweet in :0",
        "1700000000000-0@1": b"no tweet in :1",
    }  # fmt: skip
    assert retry(world.database, world.stream, make_app(world.settings), ["1700000000000-0@1"]) == 1
    assert len(world.dead()) == 2
    assert world.stream.length() == 1
    assert retry(world.database, world.stream, make_app(world.settings), None) == 2
    world.recovers()
    assert sorted(letter["payload"] for letter in world.dead()) == sorted(letters.values())


@on_two_shards
@on_sqlite
def test_deletion_finds_waiting_tweets_in_every_shard(world: World) -> None:
    assert {shard_of(str(i), 2) for i in range(6)} == {0, 1}
    world.stream.publish([wire(i, author_id="gone" if i < 6 else "stays") for i in range(20)])
    world.stream.ensure_group()
    deleted = delete_tweets(world.database, world.stream, TweetFilter(authors=("gone",)))
    assert deleted.records == 6
    world.recovers()
    assert world.scored() == {str(i) for i in range(6, 20)}


@on_two_shards
@on_sqlite
def test_metrics_commands_and_health_tell_the_sums_of_all_shards(world: World, tweetscore: Run) -> None:
    assert {shard_of(str(i), 2) for i in range(9)} == {0, 1}
    world.stream.publish([*(wire(i) for i in range(9)), b"no tweet"])
    world.stream.ensure_group()
    world.stream.read(4, None)
    metrics = looked(WorkerCollector("scoring", lambda: "idle", lambda: None, world.stream, world.database))
    found = {name: metrics[f"stream_{name}", ""] for name in ("length", "pending", "lag")}
    assert found == {"length": 10, "pending": 4, "lag": 6}
    assert metrics["oldest_unscored_seconds", ""] > 0
    given = environment(world)
    assert "6 not read, 4 being scored" in tweetscore("top", "--once", **given).stdout
    assert "10 records in the stream" in tweetscore("health", "broker", **given).stdout
    world.raw.xtrim(f"{world.settings.stream_key}:1", maxlen=0, approximate=False)
    world.stream.detect_vanished()
    metrics = looked(WorkerCollector("scoring", lambda: "idle", lambda: None, world.stream, world.database))
    assert metrics["records_vanished_total", ""] == world.stream.vanished().records > 0


@on_two_shards
@on_sqlite
def test_an_idle_worker_scores_a_bare_xadd_to_any_shard_and_leaves_every_group_when_it_stops(world: World) -> None:
    key = world.settings.stream_key
    with world.worker() as worker:
        for number, place in enumerate(("", ":0", ":1", ":0", "")):
            world.raw.xadd(f"{key}{place}", {"tweet": wire(number)})
            wait_until(lambda number=number: str(number) in world.scored())
            world.drained()
        worker.send(signal.SIGTERM)
        assert worker.ended() == 0
    assert world.stream.consumers() == []


@on_two_shards
@on_sqlite
def test_a_long_backlog_in_shards_is_scored_in_large_windows(world: World) -> None:
    world.stream.publish([wire(i, "雨") for i in range(10_000)])
    with world.worker(window_tweets=16_384):
        world.drained()
    assert world.predictions() == 10_000
    assert max(row["tweets"] for row in world.rows(ScoringWindow)) > 512


# --- several servers, a cluster, Sentinels; the broker is another server


def elsewhere(world: World, *urls: str, shards: int) -> World:
    """The same world with its stream on other servers."""
    return replace(world, given={**world.given, "stream_urls": urls, "stream_shards": shards})


def scored_here(
    world: World, ids: range, away: Callable[[], object], back: Callable[[], object], server: StreamServer
) -> float:
    """Publish tweets to the shard 0 of a server while the other is away, and to both later; returns the seconds until
    the first were scored."""
    with world.worker() as worker:
        world.stream.publish([wire(f"before {i}") for i in ids])
        world.drained()
        away()
        began = time.monotonic()
        here = [i for i in ids if shard_of(str(i), 2) == 0]
        for i in here:
            server.client().xadd(f"{world.settings.stream_key}:0", {"tweet": wire(i)})
        wait_until(lambda: world.predictions() == len(ids) + len(here))
        took = time.monotonic() - began
        wait_for_log(worker, "is away")
        back()
        world.stream.publish([wire(i) for i in ids])
        world.drained()
    assert world.scored() == {*(f"before {i}" for i in ids), *map(str, ids)}
    assert world.predictions() == 2 * len(ids)
    assert world.dead() == []
    return took


@pytest.mark.slow
@on_sqlite
def test_a_worker_serves_the_other_server_while_one_is_killed(world: World, tmp_path: Path, tweetscore: Run) -> None:
    with stream_servers(tmp_path / "servers", 2) as servers:
        both = elsewhere(world, *(server.url for server in servers), shards=2)

        def back() -> None:
            found = tweetscore("health", "broker", **environment(both))
            assert (found.returncode, servers[1].address in found.stderr) == (1, True)
            servers[1].start()

        assert scored_here(both, range(40), servers[1].kill, back, servers[0]) < 30
        assert "0 records in the stream" in tweetscore("health", "broker", **environment(both)).stdout


@pytest.mark.slow
@on_postgresql
def test_a_worker_serves_the_other_server_while_one_does_not_answer(world: World, tmp_path: Path) -> None:
    with stream_servers(tmp_path / "servers", 2) as servers:
        both = elsewhere(world, *(server.url for server in servers), shards=2)
        took = scored_here(both, range(40), servers[1].freeze, servers[1].thaw, servers[0])
    assert took < 4 * CLIENT_TIMEOUT_SECONDS


@on_sqlite
def test_a_worker_scores_the_shards_of_a_cluster(world: World, tmp_path: Path, tweetscore: Run) -> None:
    with cluster(tmp_path / "cluster") as nodes:
        world = elsewhere(world, f"redis+cluster://{nodes[0].address}", shards=4)
        world.stream.publish([*(wire(i) for i in range(40)), b"no tweet"])
        world.killed_at("committed=kill")
        with world.worker() as worker:
            world.drained()
            world.stream.publish([wire(i) for i in range(40, 80)])
            world.drained()
            assert "0 records in the stream" in tweetscore("health", "broker", **environment(world)).stdout
            worker.send(signal.SIGTERM)
            assert worker.ended() == 0
        world.stream.publish([wire("gone", author_id="gone")])
        assert delete_tweets(world.database, world.stream, TweetFilter(authors=("gone",))).records == 1
        world.recovers()
    assert world.scored() == {str(i) for i in range(80)}
    assert world.predictions() == 80
    assert [letter["payload"] for letter in world.dead()] == [b"no tweet"]


@pytest.mark.slow
@on_sqlite
def test_a_worker_goes_on_with_the_primary_that_sentinels_name(world: World, tmp_path: Path) -> None:
    with sentinels(tmp_path / "sentinels") as (url, (primary, _)):
        world = elsewhere(world, url, shards=2)
        with world.worker() as worker:
            world.stream.publish([wire(i) for i in range(40)])
            world.drained()
            primary.client().execute_command("WAIT", 1, 5_000)
            primary.kill()
            wait_until(lambda: published(world, range(40, 80)))
            world.drained()
            assert worker.alive
    assert world.scored() == {str(i) for i in range(80)}
    assert world.predictions() == 80


def published(world: World, ids: range) -> bool:
    try:
        world.stream.publish([wire(i) for i in ids])
    except StreamError:
        return False
    return True
