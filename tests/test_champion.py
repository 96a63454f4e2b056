"""One model takes over from another: beside it while there is room, after it where there is none, never for nothing."""

import itertools
import json
import logging
import shutil
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from db import registry
from db.models import ModelVersion, ScoringWindow
from tests.bench import CPU, Bench, wire
from tests.conftest import LABELS, PATIENCE_SECONDS, wait_until
from tests.world import World, on_sqlite
from training.artifact import SPEC, WEIGHTS, Artifact, load_artifact
from training.sealed import SUMS, seal
from worker import scorer
from worker.lineup import loading_takes
from worker.pause import Pause
from worker.pipeline import WINDOWS_UNDER_WAY, Pipeline
from worker.scorer import Champion, Model, load_model
from worker.window import Window


def test_new_champion_is_loaded_beside_the_old_one_and_takes_over_between_windows(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions = [bench.promote()]
    published = itertools.count()
    meanwhile, enough = itertools.count(), threading.Event()

    def loads_for_long(version: ModelVersion, *given: Any) -> Model:
        if version.id != versions[0]:
            assert enough.wait(PATIENCE_SECONDS)
        return load_model(version, *given)

    monkeypatch.setattr(scorer, "load_model", loads_for_long)

    class GoesOnUntilTheNewOneScores(Pipeline):
        def store(self, window: Window) -> int:
            scored = super().store(window)
            if len(versions) == 1:
                versions.append(bench.promote())
            if window.model.version_id == versions[0]:
                self.stream.publish([wire(next(published)) for _ in range(4)])
                if next(meanwhile) == 4 * WINDOWS_UNDER_WAY:
                    enough.set()
            return scored

    bench.stream.publish([wire(next(published)) for _ in range(4)])
    scored = bench.worker(kind=GoesOnUntilTheNewOneScores, window_tweets=4).drain()
    old, new = versions
    by = [version for _, version in sorted(bench.scored().items(), key=lambda item: int(item[0]))]
    assert scored == len(by) == next(published)  # not one was left out
    assert by == sorted(by)
    # While the new one was loaded more windows came through than were under way when it was promoted.
    assert by.count(old) > 4 * WINDOWS_UNDER_WAY
    assert by.count(new) > 0
    windows = bench.rows(ScoringWindow)
    for version in versions:  # no window mixed the two
        assert sum(row["tweets"] for row in windows if row["model_version_id"] == version) == by.count(version)


def test_a_champion_that_is_replaced_while_it_is_loaded_never_scores(lite: Bench) -> None:
    first = lite.promote()
    champion = Champion(lite.database, CPU)
    assert champion.current().version_id == first
    lite.promote()
    assert champion.current().version_id == first  # the second is being loaded
    third = lite.promote()
    seen = set()
    wait_until(lambda: seen.add(champion.current().version_id) or third in seen)
    assert seen == {first, third}


def test_champion_that_cannot_be_loaded_leaves_the_old_one_scoring_until_it_is_mended(
    lite: Bench, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old, folder, worker = lite.promote(), tmp_path / "later", lite.worker()
    with lite.database.begin() as session:
        version = ModelVersion(
            base_model="tiny", artifact_url=folder.as_uri(), sha256=lite.tiny.sha256, labels=LABELS,
            cleaner_version="1",
        )  # fmt: skip
        new = registry.add_version(session, version, [], [], []).id
    for id_ in ("before", "after", "and on"):
        lite.stream.publish([wire(id_)])
        assert worker.drain() == 1
        if id_ == "before":
            with lite.database.begin() as session:
                registry.assign(session, registry.CHAMPION, new)
            wait_until(lambda: worker.champion.current() and "cannot be loaded" in caplog.text)
    assert lite.scored() == {"before": old, "after": old, "and on": old}
    faults = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    assert len(faults) == 1
    assert f"model {new}, cannot be loaded, model {old} goes on scoring" in faults[0]
    shutil.copytree(lite.tiny.folder, folder)
    with lite.database.begin() as session:
        registry.assign(session, registry.CHAMPION, new)
    wait_until(lambda: worker.champion.current().version_id == new)
    lite.stream.publish([wire("mended")])
    worker.drain()
    assert lite.scored()["mended"] == new


def test_a_model_that_cannot_be_read_is_tried_again_with_growing_pauses_and_serves_once_it_is_mended(
    lite: Bench, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that answers EIO, which nothing of ours makes an error of its own."""
    monkeypatch.setattr(scorer, "FIRST_PAUSE_SECONDS", 0.5)
    monkeypatch.setattr(scorer, "LONGEST_PAUSE_SECONDS", 2.0)
    old, worker = lite.promote(), lite.worker()
    lite.stream.publish([wire("before")])
    assert worker.drain() == 1
    folder, sums = tmp_path / "model", tmp_path / "model" / SUMS
    shutil.copytree(lite.tiny.folder, folder)
    whole = sums.rename(tmp_path / SUMS)
    sums.symlink_to("/proc/self/mem")
    with pytest.raises(OSError, match="Input/output error"):
        sums.read_bytes()
    new = register(lite, folder)
    told = f"the champion, model {new}, cannot be loaded, model {old} goes on scoring; trying again in "

    def faults() -> list[str]:
        said = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
        return [line.removeprefix(told) for line in said]

    number = itertools.count()

    def windows_go_on_until(seen: int) -> bool:
        lite.stream.publish([wire(f"while {next(number)}")])
        return worker.drain() == 1 and len(faults()) >= seen

    wait_until(lambda: windows_go_on_until(4))
    kind = "(OSError: [Errno 5] Input/output error)"
    assert faults()[:4] == [f"{pause} s {kind}" for pause in (0, 1, 2, 2)]  # of 0.5, 1, 2 and 2 seconds
    assert set(lite.scored().values()) == {old}
    assert next(number) > 4, "there were windows without a try"
    sums.unlink()
    whole.rename(sums)
    wait_until(lambda: worker.champion.current().version_id == new)
    lite.stream.publish([wire("mended")])
    assert worker.drain() == 1
    assert lite.scored()["mended"] == new


@on_sqlite
def test_a_worker_whose_only_model_cannot_be_read_stays_well_and_scores_once_it_is_mended(world: World) -> None:
    sums = world.settings.models.folder / "tiny" / SUMS
    whole = sums.rename(sums.with_name("aside"))
    sums.symlink_to("/proc/self/mem")
    world.stream.publish([wire("waits")])
    with world.worker() as worker:
        wait_until(lambda: "cannot be loaded, tweets wait in the stream; trying again in 10 s" in worker.said())
        assert "cannot poll for work" not in worker.said()
        assert worker.alive
        sums.unlink()
        whole.rename(sums)
        world.drained()
    assert world.scored() == {"waits"}


def test_a_pause_doubles_up_to_a_bound_and_is_over_for_anything_else() -> None:
    pause = Pause()
    assert pause.over(None)
    assert pause.over(1)
    assert [pause.begin(1, 5, 300) for _ in range(8)] == [5, 10, 20, 40, 80, 160, 300, 300]
    assert not pause.over(1)
    assert pause.over(2)
    assert pause.begin(2, 5, 300) == 5


def register(lite: Bench, folder: Path, sha256: str | None = None) -> int:
    """A copy of the tiny model, or what `sha256` names, as the champion."""
    with lite.database.begin() as session:
        version = ModelVersion(
            base_model="tiny", artifact_url=folder.as_uri(), sha256=sha256 or lite.tiny.sha256, labels=LABELS,
            cleaner_version="1",
        )  # fmt: skip
        registry.add_version(session, version, [], [], [])
        registry.assign(session, registry.CHAMPION, version.id)
        return version.id


def unreadable(lite: Bench, folder: Path) -> int:
    """A version whose files are whole and of a format that is yet to come."""
    draft = shutil.copytree(lite.tiny.folder, folder.with_name("draft"))
    spec = json.loads((draft / SPEC).read_text(encoding="utf-8"))
    (draft / SPEC).write_text(json.dumps({**spec, "format_version": 1000}), encoding="utf-8")
    digest = seal(draft, folder)
    with lite.database.begin() as session:
        version = ModelVersion(
            base_model="tiny", artifact_url=folder.as_uri(), sha256=digest, labels=LABELS, cleaner_version="1"
        )
        return registry.add_version(session, version, [], [], []).id


def test_a_model_that_does_not_fit_beside_the_old_one_is_loaded_when_nobody_scores_with_that_any_more(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The device has no byte left: the windows under way are scored to their end first, and none of them twice."""
    versions, alive, seen = [bench.promote()], [], []

    def loads(folder: Path, sha256: str, verified: Callable[[int], None]) -> Artifact:
        loaded = load_artifact(folder, sha256, verified)
        alive.append([ref() is not None for ref in seen])  # by now room was made
        return loaded

    monkeypatch.setattr(scorer, "load_artifact", loads)

    class Slow(Pipeline):
        def forward(self, window: Window) -> None:
            if window.model.version_id not in [ref_id for ref_id, _ in known]:
                known.append((window.model.version_id, seen.append(weakref.ref(window.model))))
            if len(versions) == 1:
                versions.append(bench.promote())
            time.sleep(0.05)
            super().forward(window)

    known: list[Any] = []
    champion = Champion(bench.database, replace(CPU, free=lambda device: 0))
    worker = bench.worker(champion, kind=Slow, window_tweets=4)
    bench.stream.publish([wire(i) for i in range(80)])
    wait_until(lambda: worker.drain() >= 0 and len(bench.scored()) == 80)
    old, new = versions
    by = list(bench.scored().values())
    assert 0 < by.count(old) < 80
    assert by.count(old) + by.count(new) == 80
    assert alive == [[], [False]]
    assert f"model {old} makes room" in caplog.text
    assert sum(row["tweets"] for row in bench.rows(ScoringWindow)) == 80


def test_the_old_model_comes_back_when_the_one_it_made_room_for_cannot_be_loaded(
    lite: Bench, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old, new = lite.promote(), unreadable(lite, tmp_path / "model")
    worker = lite.worker(Champion(lite.database, replace(CPU, free=lambda device: 0)))
    lite.stream.publish([wire("before")])
    assert worker.drain() == 1
    with lite.database.begin() as session:
        registry.assign(session, registry.CHAMPION, new)
    told = f"the champion, model {new}, cannot be loaded, model {old} is loaded again"
    wait_until(lambda: worker.drain() >= 0 and told in caplog.text)
    lite.stream.publish([wire("after")])
    wait_until(lambda: worker.drain() >= 0 and "after" in lite.scored())
    assert lite.scored() == {"before": old, "after": old}
    third = lite.promote()
    wait_until(lambda: worker.drain() >= 0 and worker.champion.version_id == third)


def test_a_model_that_is_damaged_or_fits_beside_the_old_one_costs_no_tweet_a_wait(lite: Bench, tmp_path: Path) -> None:
    old, folder = lite.promote(), tmp_path / "model"
    new = unreadable(lite, folder)
    asked: list[int] = []
    weights = (folder / WEIGHTS).stat().st_size

    def free(device: torch.device) -> int:
        asked.append(1)
        return int(loading_takes(weights))

    champion = Champion(lite.database, replace(CPU, free=free))
    assert champion.current().version_id == old
    assert asked == [], "there is nothing to be compared with"
    for damage, looks in ((lambda: None, 1), ((folder / WEIGHTS).unlink, 1)):
        damage()
        with lite.database.begin() as session:
            registry.assign(session, registry.CHAMPION, new)
        assert champion.current().version_id == old
        assert champion.loading_since is not None
        wait_until(lambda: champion.current().version_id == old and champion.loading_since is None)
        assert len(asked) == looks
