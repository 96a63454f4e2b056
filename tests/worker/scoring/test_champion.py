"""A new champion is loaded beside the old one, which scores until the new one is ready."""

import itertools
import logging
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from db import registry
from db.models import ModelVersion, ScoringWindow
from tests.conftest import LABELS, PATIENCE_SECONDS, wait_until
from tests.support.bench import CPU, Bench, wire
from tests.support.world import World, on_sqlite
from training.store.sealed_folder import SUMS
from worker.connections import model_store
from worker.scoring import champion as champion_module
from worker.scoring.backoff import Pause
from worker.scoring.champion import Champion
from worker.scoring.overlap import WINDOWS_IN_FLIGHT
from worker.scoring.pipeline import Pipeline
from worker.scoring.scoring_model import ScoringModel, Serving, load_model
from worker.scoring.window import Window


def test_new_champion_is_loaded_beside_the_old_one_and_takes_over_between_windows(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions = [bench.promote()]
    published = itertools.count()
    meanwhile, enough = itertools.count(), threading.Event()

    def loads_for_long(version: ModelVersion, *given: Any) -> ScoringModel:
        if version.id != versions[0]:
            assert enough.wait(PATIENCE_SECONDS)
        return load_model(version, *given)

    monkeypatch.setattr(champion_module, "load_model", loads_for_long)

    class GoesOnUntilTheNewOneScores(Pipeline):
        def store(self, window: Window) -> int:
            scored = super().store(window)
            if len(versions) == 1:
                versions.append(bench.promote())
            if window.model.version_id == versions[0]:
                self.stream.publish([wire(next(published)) for _ in range(4)])
                if next(meanwhile) == 4 * WINDOWS_IN_FLIGHT:
                    enough.set()
            return scored

    bench.stream.publish([wire(next(published)) for _ in range(4)])
    scored = bench.worker(kind=GoesOnUntilTheNewOneScores, window_tweets=4).drain()
    old, new = versions
    by = [version for _, version in sorted(bench.scored().items(), key=lambda item: int(item[0]))]
    assert scored == len(by) == next(published)  # every tweet
    assert by == sorted(by)
    # More windows were scored during the load than were in flight at the promotion.
    assert by.count(old) > 4 * WINDOWS_IN_FLIGHT
    assert by.count(new) > 0
    windows = bench.rows(ScoringWindow)
    for version in versions:  # no window was scored by both
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
    assert f"model {new}, cannot be loaded, model {old} keeps scoring" in faults[0]
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
    """A disk that answers EIO: an OSError that no module converts."""
    monkeypatch.setattr(champion_module, "FIRST_PAUSE_SECONDS", 0.25)
    monkeypatch.setattr(champion_module, "LONGEST_PAUSE_SECONDS", 1.0)
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
    told = f"the champion, model {new}, cannot be loaded, model {old} keeps scoring; trying again in "

    def faults() -> list[str]:
        said = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
        return [line.removeprefix(told) for line in said]

    number = itertools.count()

    def windows_go_on_until(seen: int) -> bool:
        lite.stream.publish([wire(f"while {next(number)}")])
        return worker.drain() == 1 and len(faults()) >= seen

    wait_until(lambda: windows_go_on_until(4))
    kind = "(OSError: [Errno 5] Input/output error)"
    assert faults()[:4] == [f"{pause} s {kind}" for pause in (0, 0, 1, 1)]  # of 0.25, 0.5, 1 and 1 seconds
    assert set(lite.scored().values()) == {old}
    assert next(number) > 4, "windows were scored between the attempts"
    sums.unlink()
    whole.rename(sums)
    wait_until(lambda: worker.champion.current().version_id == new)
    lite.stream.publish([wire("mended")])
    assert worker.drain() == 1
    assert lite.scored()["mended"] == new


@pytest.mark.slow
@on_sqlite
def test_a_worker_whose_only_model_cannot_be_read_stays_well_and_scores_once_it_is_mended(world: World) -> None:
    sums = model_store(world.settings).folder / "tiny" / SUMS
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
    """Register the model in `folder` and make it the champion; `sha256` defaults to the tiny model's."""
    with lite.database.begin() as session:
        version = ModelVersion(
            base_model="tiny", artifact_url=folder.as_uri(), sha256=sha256 or lite.tiny.sha256, labels=LABELS,
            cleaner_version="1",
        )  # fmt: skip
        registry.add_version(session, version, [], [], [])
        registry.assign(session, registry.CHAMPION, version.id)
        return version.id


@pytest.mark.parametrize("error", [MemoryError("no memory"), torch.OutOfMemoryError("CUDA out of memory")])
def test_a_model_that_does_not_fit_beside_the_old_one_leaves_it_scoring_and_is_tried_again(
    lite: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    monkeypatch.setattr(champion_module, "FIRST_PAUSE_SECONDS", 0.1)
    old, worker = lite.promote(), lite.worker()
    lite.stream.publish([wire("before")])
    assert worker.drain() == 1
    full = itertools.chain([True, True], itertools.repeat(False))

    def loads(version: ModelVersion, serving: Serving) -> ScoringModel:
        if next(full):
            raise error
        return load_model(version, serving)

    monkeypatch.setattr(champion_module, "load_model", loads)
    new = lite.promote()
    wait_until(lambda: worker.champion.current() and caplog.text.count("cannot be loaded") == 1)
    lite.stream.publish([wire("meanwhile")])
    assert worker.drain() == 1
    wait_until(lambda: worker.champion.current().version_id == new)
    lite.stream.publish([wire("after")])
    assert worker.drain() == 1
    assert lite.scored() == {"before": old, "meanwhile": old, "after": new}
    assert caplog.text.count(f"model {new}, cannot be loaded, model {old} keeps scoring") == 2
