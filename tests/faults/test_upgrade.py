"""The schema changes while workers of older and newer releases run: no tweet is lost or scored twice."""

import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path

import pytest
from sqlalchemy import text

from db import migrate
from db.compatibility import newest_revision
from db.errors import SchemaMismatch
from db.models import ScoringWindow, utc_now
from tests.conftest import PATIENCE_SECONDS, wait_until
from tests.support.actors import wait_for_log
from tests.support.bench import wire
from tests.support.commands import command
from tests.support.releases import CONTRACTS, EXPANDS, NEXT, next_release, with_mood
from tests.support.world import World, on_postgresql, on_sqlite
from worker.connections import open_guarded
from worker.process.health import check_health

# No worker claims records that are merely slow, so each tweet must pass exactly once.
PATIENT = {"min_idle_seconds": 60.0}
AT_ONCE = 10


@contextmanager
def publishing(world: World) -> Iterator[list[str]]:
    """Publish tweets as fast as they are scored during the block; yields the published ids."""
    sent: list[str] = []
    enough = threading.Event()

    def publish() -> None:
        numbers, stream = count(), world.stream
        while not enough.wait(0.1):
            if stream.length() < AT_ONCE:
                ids = [str(next(numbers)) for _ in range(AT_ONCE)]
                stream.publish([wire(id_, f"雨{id_}", lang="ja") for id_ in ids])
                sent.extend(ids)

    thread = threading.Thread(target=publish)
    thread.start()
    try:
        yield sent
    finally:
        enough.set()
        thread.join(PATIENCE_SECONDS)


def more_come(world: World, tweets: int = 100) -> None:
    wanted = world.predictions() + tweets
    wait_until(lambda: world.predictions() >= wanted)


def assert_each_once(world: World, sent: list[str]) -> None:
    assert world.scored() == set(sent)
    assert (world.predictions(), world.passes(), world.dead()) == (len(sent), len(sent), [])


def moods(world: World) -> dict[str, int]:
    with world.database.read() as session:
        found = session.execute(text("SELECT mood, count(*) FROM tweets GROUP BY 1")).all()
    return {str(mood): int(n) for mood, n in found}


@pytest.mark.slow
@on_postgresql
def test_an_upgrade_is_rolled_under_load_and_nothing_is_lost_or_twice(
    world: World, labelled_csv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    report: Callable[[str], None],
) -> None:  # fmt: skip
    new, given = next_release(tmp_path / "new", EXPANDS, with_mood), {**world.given, **PATIENT}
    job_id = world.submit(labelled_csv, epochs=1)
    with ExitStack() as stack:
        old = [stack.enter_context(world.worker(**PATIENT)) for _ in range(2)]
        with new.as_code(monkeypatch):
            scorer, trainer = (
                stack.enter_context(command(tmp_path / f"{role}.log", given, "worker", role))
                for role in ("score", "train")
            )
        with publishing(world) as sent:
            for worker in (scorer, trainer):
                worker.says(f"this release needs {NEXT} or newer; let its owner run `tweetscore db upgrade`")
            wait_until(lambda: "it waits: the database has schema" in check_health(world.settings, "training"))
            more_come(world)
            assert world.job(job_id).state == "queued"

            before = len(sent)
            new.upgrades(world.settings)
            during = len(sent) - before
            wait_until(lambda: {"unknown", "seen"} <= set(moods(world)))
            both_at = utc_now()

            def all_three_store() -> bool:
                windows = world.rows(ScoringWindow)
                return len({row["worker"] for row in windows if row["started_at"] > both_at}) == 3

            wait_until(all_three_store)
            for actor in old:
                actor.send(signal.SIGTERM)
            assert [actor.ended() for actor in old] == [0, 0]
            more_come(world)
        world.drained()
        world.ends(job_id, "succeeded")
        for worker in (scorer, trainer):
            worker.send(signal.SIGTERM)
        assert [worker.ended() for worker in (scorer, trainer)] == [0, 0]
    assert_each_once(world, sent)
    report(f"an upgrade rolled under load: {len(sent)} tweets, {during} of them while it migrated; {moods(world)}")


@pytest.mark.slow
@on_sqlite
def test_a_worker_stops_before_a_schema_it_cannot_work_with_and_goes_on_when_it_fits(
    world: World, labelled_csv: Path, tmp_path: Path
) -> None:
    """A migration removes a column that this release writes, and is then reverted."""
    newer = next_release(tmp_path / "newer", CONTRACTS)
    job_id = world.submit(labelled_csv, epochs=1000)
    with world.worker(**PATIENT) as worker, world.worker("train", **PATIENT) as trainer:
        with publishing(world) as sent:
            more_come(world)
            wait_until(lambda: world.epochs(job_id))
            newer.upgrades(world.settings)
            for one in (worker, trainer):
                wait_for_log(one, f"has schema {NEXT} for releases with migration {NEXT} or newer, ")
        scored = world.predictions()
        assert scored < len(sent)
        wait_until(lambda: "; upgrade tweetscore and start it again" in check_health(world.settings, "scoring"))
        wait_for_log(trainer, f"job {job_id}: left to its lease: the database has schema {NEXT}")
        trainer.send(signal.SIGTERM)
        assert trainer.ended() == 0, "a waiting worker ends on SIGTERM"
        assert (world.job(job_id).state, world.job(job_id).error) == ("running", None), "another worker can resume it"
        assert (worker.alive, world.predictions(), world.dead()) == (True, scored, [])

        newer.downgrades(world.settings)
        world.stream.publish([wire("later")])
        wait_until(lambda: "later" in world.scored())
    # The next worker claims the records that it held.
    world.recovers()
    assert_each_once(world, [*sent, "later"])


@on_postgresql
def test_a_migration_waits_for_a_workers_transaction_and_steps_back_for_others_meanwhile(
    world: World, tmp_path: Path
) -> None:
    newer, database = next_release(tmp_path / "newer", CONTRACTS), open_guarded(world.settings)

    def waits() -> bool:
        sql = "SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = 'schema_compatibility'::regclass"
        with world.database.read() as session:
            return bool(session.scalar(text(sql)))

    with ThreadPoolExecutor(1) as pool:
        with database.begin():
            upgraded = pool.submit(newer.upgrades, world.settings)
            wait_until(waits)
            wait_until(lambda: not waits())
            assert migrate.check(world.database) == newest_revision()
        upgraded.result(PATIENCE_SECONDS)
    with pytest.raises(SchemaMismatch), database.begin():
        pytest.fail("a transaction that must not write began")
    database.close()
