"""Faults on the route of a tweet: workers that die, sleep and repeat, malformed records, producers that repeat.

Each fault has one kind of database, the two kinds in turn.
"""

import shutil
import signal
import time

from db import registry
from db.models import DeadLetter, ModelVersion, Prediction, Tweet
from tests.conftest import LABELS, wait_until
from tests.support.actors import wait_for_log
from tests.support.bench import DRAINED, Bench, wire
from tests.support.world import World, on_postgresql, on_sqlite, with_shards
from worker.connections import model_store
from worker.stream.sharded_stream import ShardedStream
from worker.stream.stream import Depth, Record, Stream

POISON = "毒"


@with_shards
@on_postgresql
def test_02_records_of_a_worker_killed_between_read_and_commit_are_claimed_after_min_idle(world: World) -> None:
    world.stream.publish([*(wire(i) for i in range(20)), b"no tweet"])
    world.killed_at("forwarded=kill")
    assert world.predictions() == 0
    assert world.stream.depth().pending == 21
    began = time.monotonic()
    world.recovers()
    assert time.monotonic() - began > world.given["min_idle_seconds"] / 2, "a worker may still work on younger records"
    assert world.predictions() == 20
    assert world.scored() == {str(i) for i in range(20)}
    assert [letter["payload"] for letter in world.dead()] == [b"no tweet"]


@with_shards
@on_postgresql
def test_03_the_replay_after_a_kill_between_commit_and_ack_changes_nothing(world: World) -> None:
    world.stream.publish([*(wire(i) for i in range(20)), b"no tweet"])
    world.killed_at("committed=kill")
    before = sorted(map(repr, world.rows(Prediction) + world.rows(Tweet) + world.rows(DeadLetter)))
    assert (world.predictions(), len(world.dead())) == (20, 1)
    assert world.stream.depth() == Depth(length=21, lag=0, pending=21)
    world.recovers()
    assert sorted(map(repr, world.rows(Prediction) + world.rows(Tweet) + world.rows(DeadLetter))) == before
    assert world.passes() == 40, "they were scored again, and that changed no row"


@with_shards
@on_sqlite
def test_04_only_the_record_whose_scoring_kills_its_process_is_dead_lettered(world: World) -> None:
    world.stream.publish([wire(i, POISON if i == 7 else f"雨{i}") for i in range(20)])
    deaths = 0
    while world.stream.depth() != DRAINED:
        with world.worker(failpoints=f"tokenised=kill~{POISON}", min_idle_seconds=0.3) as worker:
            wait_until(lambda worker=worker: not worker.alive or world.stream.depth() == DRAINED)
            deaths += not worker.alive
        assert deaths <= 5
    assert deaths == 5, "twice with its window-mates, three times alone"
    (letter,) = world.dead()
    assert letter["payload"] == wire(7, POISON)
    assert "ended the worker 3 times" in letter["reason"]
    assert world.scored() == {str(i) for i in range(20) if i != 7}


@on_postgresql
def test_05_a_malformed_record_is_dead_lettered_with_a_reason_and_its_window_mates_are_scored(bench: Bench) -> None:
    """`test_tweet_record` tests every reason, `test_fuzz` random records."""
    bench.promote()
    malformed = {
        b"{": "not JSON", b"\xff\xfe": "not UTF-8", b'{"id": "1"}': "no text", wire("1", "a\0"): "NUL",
        wire("1", "あ" * 400_000): "400,000 characters", wire("1", v=2): "wire version '2'",
    }  # fmt: skip
    bench.raw.xadd(bench.stream.key, {"twet": "misspelled"})
    for i, payload in enumerate(malformed):
        bench.stream.publish([payload, wire(f"good-{i}")])
    assert bench.worker().drain() == len(malformed)
    assert set(bench.scored()) == {f"good-{i}" for i in range(len(malformed))}
    letters = {letter["payload"]: letter for letter in bench.dead()}
    assert set(letters) == {b"", *malformed}
    assert "no field 'tweet'" in letters[b""]["reason"]
    for payload, reason in malformed.items():
        assert reason in letters[payload]["reason"]
        assert "\n" not in letters[payload]["reason"]
        assert letters[payload]["attempts"] == 1
    assert bench.stream.depth() == DRAINED


@with_shards
@on_sqlite
def test_06_a_slow_but_live_worker_keeps_its_records(world: World) -> None:
    world.stream.publish([wire(i) for i in range(10)])
    with world.worker(failpoints="forwarded=pause:3@1") as slow:
        wait_for_log(slow, "failpoint forwarded")
        with world.worker() as thief:
            world.drained()
            assert "claimed" not in thief.said()
    assert world.passes() == 10


@with_shards
@on_postgresql
def test_07_a_worker_that_wakes_late_takes_nothing_back(world: World) -> None:
    world.stream.publish([wire(i) for i in range(10)])
    with world.worker(failpoints="forwarded=stop@1") as sleeper:
        wait_until(lambda: sleeper.stopped)
        old = world.stream
        (holder,) = [consumer.name for consumer in old.consumers() if consumer.pending]
        asleep = ShardedStream([world.url], old.key, old.group, world.settings.stream_shards, holder)
        held = sorted(asleep.pending_ids())
        with world.worker(failpoints="forwarded=pause:3@1") as heir:
            wait_for_log(heir, "claimed")
            wait_until(lambda: all(consumer.pending == 0 for consumer in old.consumers() if consumer.name == holder))
            sleeper.send(signal.SIGCONT)
            assert asleep.renew(held) == 0, "the records belong to another consumer now"
            assert all(consumer.pending == 0 for consumer in old.consumers() if consumer.name == holder)
            world.drained()
    assert world.predictions() == 10
    assert world.dead() == []


@with_shards
@on_sqlite
def test_08_a_producer_that_repeats_itself_gets_one_prediction(world: World) -> None:
    world.stream.publish([wire("same", "初めて"), wire("other")])
    world.recovers()
    world.stream.publish([wire("same", "二度目"), wire("same", "三度目")])
    world.recovers()
    assert sorted(row["tweet_id"] for row in world.rows(Prediction)) == ["other", "same"]
    assert {row["text"] for row in world.rows(Tweet) if row["tweet_id"] == "same"} == {"初めて"}


@with_shards
@on_postgresql
def test_15_after_flushall_the_group_is_made_again_and_new_tweets_are_scored(world: World) -> None:
    with world.worker():
        world.stream.publish([wire("before")])
        wait_until(lambda: world.scored() == {"before"})
        # The server is shared, so only this stream is deleted; its workers see the same as after FLUSHALL.
        world.raw.delete(*world.raw.keys(f"{world.stream.key}*"))
        world.raw.xadd(world.stream.key, {"tweet": wire("after")})
        world.stream.publish([wire("more"), wire("most")])
        wait_until(lambda: world.scored() == {"before", "after", "more", "most"})
        world.drained()


@on_sqlite
def test_16_trimming_loses_no_record_that_anybody_still_needs(world: World) -> None:
    stream = world.stream
    stream.ensure_group()
    stream.publish([wire(i) for i in range(40)])
    keeper = Stream(world.raw, stream.key, stream.group)
    held = keeper.read(5, None)
    other = Stream(world.raw, stream.key, "archivists")
    other.ensure_group()
    archived = other.read(20, None)
    with world.worker(min_idle_seconds=60):
        wait_until(lambda: world.predictions() == 35)
        wait_until(lambda: stream.depth().pending == 5)
    assert world.raw.xlen(stream.key) == 40, "the first records are pending with one group"
    keeper.ack([record.id for record in held])
    other.ack([record.id for record in archived])
    keeper.trim()
    assert world.raw.xlen(stream.key) == 20, "the other group has not read the rest"
    assert [record.payload for record in other.read(40, None)] == [wire(i) for i in range(20, 40)]


@on_postgresql
def test_29_a_champion_that_cannot_be_loaded_leaves_the_old_one_scoring_and_is_seen(
    world: World, tiny_artifact: Record
) -> None:
    broken = model_store(world.settings).folder / "job-77-1"
    shutil.copytree(tiny_artifact.folder, broken)
    with (broken / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\xff")
    with world.worker() as worker:
        world.stream.publish([wire("before")])
        wait_until(lambda: world.scored() == {"before"})
        with world.database.begin() as session:
            version = ModelVersion(
                base_model="tiny", artifact_url=broken.as_uri(), sha256=tiny_artifact.sha256, labels=LABELS,
                cleaner_version="1",
            )  # fmt: skip
            registry.add_version(session, version, [], [], [])
            registry.assign(session, registry.CHAMPION, version.id)
        world.stream.publish([wire("after")])
        wait_until(lambda: world.scored() == {"before", "after"})
        wait_for_log(worker, f"the champion, model {version.id}, cannot be loaded, model {world.champion} keeps")
        assert "sha256 differs" in worker.said()
    assert {row["model_version_id"] for row in world.rows(Prediction)} == {world.champion}


@with_shards
@on_sqlite
def test_30_out_of_memory_halves_the_budget_and_a_lone_culprit_is_buried(world: World) -> None:
    world.stream.publish([wire(i, f"雨が降る{i}") for i in range(20)])
    with world.worker(failpoints="device=full@1") as worker:
        world.drained()
        assert "no memory left for a batch this large; trying" in worker.said()
    assert world.predictions() == 20
    assert world.dead() == []

    world.stream.publish([wire("huge", POISON), *(wire(f"more {i}", f"雪が降る{i}") for i in range(5))])
    with world.worker(failpoints=f"forwarding=full~{POISON}"):
        world.drained()
    assert [letter["payload"] for letter in world.dead()] == [wire("huge", POISON)]
    assert "failed (MemoryError) 3 times" in world.dead()[0]["reason"]
    assert world.predictions() == 25


@with_shards
@on_sqlite
def test_31_dead_consumers_are_taken_off_the_list_only_when_they_hold_nothing(world: World) -> None:
    world.stream.publish([wire(i) for i in range(12)])
    for _ in range(3):
        world.killed_at("read=kill", min_idle_seconds=0.1)
    stream = world.stream
    assert len(stream.consumers()) == 3
    stream.sweep(0)
    assert 1 <= len(stream.consumers()) < 3
    assert stream.depth().pending == 12, "a consumer with pending records stays on the list"
    with world.worker(min_idle_seconds=0.1):
        world.drained()
        assert world.predictions() == 12

        def only_the_living_is_listed() -> bool:
            world.stream.publish([wire("later")])  # a worker removes consumers while it has work
            return len(stream.consumers()) == 1

        wait_until(only_the_living_is_listed, every=0.2)
