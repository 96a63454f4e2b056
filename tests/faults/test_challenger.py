"""A challenger that fails in any way: the champion's rows are all there and no record stays pending."""

import logging
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import redis
from sqlalchemy import delete

import db.session
from db import migrate, registry
from db.models import ModelVersion, Prediction, Tweet
from db.session import open_database
from tests.conftest import LABELS, PATIENCE_SECONDS, wait_until
from tests.support.actors import wait_for_log
from tests.support.bench import DRAINED, Bench, wire
from tests.support.outages import breakable
from tests.support.rows import assign
from tests.support.shadows import counts, scored_by, shadowed, two_models
from tests.support.world import World, on_sqlite
from training import failpoint
from worker.scoring import champion as champion_module
from worker.scoring import shadow as shadow_module
from worker.stream.stream import Stream


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(shadow_module, "CHECK_SECONDS", 0.0)
    monkeypatch.setattr(shadow_module, "FIRST_PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(champion_module, "FIRST_PAUSE_SECONDS", 0.1)
    yield
    failpoint.arm("")


def errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]


def test_a_challenger_with_a_broken_artifact_leaves_the_champion_scoring_and_scores_once_it_is_mended(
    bench: Bench, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    champion, folder = bench.promote(), tmp_path / "broken"
    shutil.copytree(bench.tiny.folder, folder)
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with bench.database.begin() as session:
        version = ModelVersion(
            base_model="tiny", artifact_url=folder.as_uri(), sha256=bench.tiny.sha256, labels=LABELS,
            cleaner_version="1",
        )  # fmt: skip
        challenger = registry.add_version(session, version, [], [], []).id
    assign(bench.database, challenger, "challenger")
    with shadowed(bench) as worker:
        with counts("dropped", 30, reason="failed"):
            bench.stream.publish([wire(i) for i in range(30)])
            assert worker.drain() == 30
        assert scored_by(bench, champion) == {str(i) for i in range(30)}
        assert bench.stream.depth() == DRAINED
        assert f"the challenger, model {challenger}, cannot be loaded, only the champion scores" in errors(caplog)[0]
        weights.write_bytes(whole)

        def scores(number: Iterator[int] = iter(range(100, 100_000))) -> bool:  # noqa: B008 - one iterator
            bench.stream.publish([wire(next(number))])
            return worker.drain() == 1 and bool(scored_by(bench, challenger))

        wait_until(scores)


def test_a_challenger_that_raises_is_logged_once_and_its_tweets_are_counted(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    versions = two_models(bench)
    with shadowed(bench) as worker:
        failpoint.arm("shadowing=fail")
        with counts("dropped", 12, reason="failed"):
            for window in range(3):
                bench.stream.publish([wire(f"{window} {i}") for i in range(4)])
                assert worker.drain() == 4
        failpoint.arm("")
        said = errors(caplog)
        assert len(said) == 1
        assert f"the challenger, model {versions.challenger}, fails (FailpointReached)" in said[0]
        with counts("tweets", 1):
            bench.stream.publish([wire("after")])
            assert worker.drain() == 1
    assert len(scored_by(bench, versions.champion)) == 13
    assert scored_by(bench, versions.challenger) == {"after"}
    assert bench.stream.depth() == DRAINED


def test_a_tweet_that_is_deleted_before_the_challenger_stores_gets_no_row(bench: Bench) -> None:
    versions = two_models(bench)

    def deleted_meanwhile() -> int:
        with bench.database.begin() as session:
            session.execute(delete(Tweet).where(Tweet.tweet_id == "1"))
        return 0

    with shadowed(bench, backlog=deleted_meanwhile) as worker, counts("tweets", 2):
        bench.stream.publish([wire(i) for i in range(3)])
        assert worker.drain() == 3
    assert scored_by(bench, versions.challenger) == scored_by(bench, versions.champion) == {"0", "2"}
    assert bench.stream.depth() == DRAINED


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_a_database_that_is_away_while_the_challenger_stores_costs_only_its_rows(
    kind: str, tmp_path: Path, stream: Stream, raw: "redis.Redis", tiny_artifact: Any, promote: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(db.session, "BUSY_TIMEOUT_MS", 50)  # instead of half a minute
    with ExitStack() as stack:
        url, away = breakable(kind, tmp_path, stack)
        database, others = open_database(url), open_database(url)
        for opened in (database, others):
            stack.callback(opened.close)
        migrate.upgrade(database)
        bench = Bench(database, stream, raw, tiny_artifact, promote)
        versions = two_models(bench)
        begun, go = threading.Event(), threading.Event()

        def waits() -> int:
            begun.set()
            assert go.wait(PATIENCE_SECONDS)
            return 0

        with shadowed(bench, backlog=waits, database=others) as worker:
            with counts("dropped", 3, reason="failed"):
                bench.stream.publish([wire(i) for i in range(3)])
                assert worker.drain() == 3
                assert begun.wait(PATIENCE_SECONDS)
                with away():
                    go.set()
                    wait_until(lambda: worker.after_commit.__self__._failing)  # type: ignore[attr-defined]
            assert bench.stream.depth() == DRAINED
            assert scored_by(bench, versions.champion) == {"0", "1", "2"}
            with counts("tweets", 1):
                bench.stream.publish([wire("after")])
                assert worker.drain() == 1
        assert scored_by(bench, versions.challenger) == {"after"}


@on_sqlite
def test_a_worker_that_is_told_to_end_does_not_wait_for_its_challenger(world: World) -> None:
    with world.database.begin() as session:
        champion = registry.get(session, world.champion)
        twin = ModelVersion(
            base_model="tiny", artifact_url=champion.artifact_url, sha256=champion.sha256, labels=LABELS,
            cleaner_version="1",
        )  # fmt: skip
        challenger = registry.add_version(session, twin, [], [], []).id
    assign(world.database, challenger, "challenger")
    world.stream.publish([wire(i) for i in range(40)])
    with world.worker(failpoints="shadowing=pause:600", shadow_share=1.0) as worker:
        world.drained()
        wait_for_log(worker, "failpoint shadowing: pause")
        worker.send(signal.SIGTERM)
        assert worker.ended() == 0
    assert [row["model_version_id"] for row in world.rows(Prediction)] == 40 * [world.champion]
