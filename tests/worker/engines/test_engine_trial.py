"""A model serves at once; a trial in the background, one a machine, finds a faster engine, which takes over."""

import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from db import registry
from db.models import ModelVersion, ScoringWindow
from tests.conftest import LABELS, wait_until
from tests.support.artifacts import artifact_of
from tests.support.bench import CPU, Bench, wire
from tests.support.commands import worker
from tests.support.world import World, on_sqlite
from training.config import make_config
from training.model.artifact import Artifact, load_artifact
from training.model.base_model import BaseModelFolder
from training.model.classifier import build_model
from training.store.paths import file_sha256
from training.store.sealed_folder import SUMS
from worker.engine_names import FLOAT32_TORCH
from worker.engines import engine_trial
from worker.engines.engine_choice import CHOICE, saved_choices
from worker.engines.engine_selection import REQUESTED, choice_folders, load_engine, trial_memory
from worker.engines.engine_trial import TrialRequest
from worker.scoring.champion import Champion
from worker.scoring.scoring_model import Serving, load_model, open_model

BETTER = "openvino-float32"
TORCH = torch.device("cpu")
# Workers that get a SIGTERM, each a little later in its trial than the one before.
MOMENTS, LATEST_SECONDS = 20, 6.0


@pytest.fixture(scope="module")
def verified(tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A tiny model with the validation rows that engines are compared on."""
    model = build_model(
        BaseModelFolder("tiny", tiny_encoder), len(LABELS), make_config("fast", base_model=str(tiny_encoder))
    )
    return artifact_of(model.eval(), tmp_path_factory.mktemp("verified") / "tiny")


@pytest.fixture
def place(verified: Artifact, tmp_path: Path) -> Path:
    """The model without any trial of engines."""
    folder = tmp_path / "home" / "models" / "verified"
    folder.mkdir(parents=True)
    for path in verified.folder.iterdir():
        (folder / path.name).hardlink_to(path)
    return folder


@pytest.fixture
def serves(tmp_path: Path) -> Serving:
    return replace(CPU, engine=BETTER, engines_folder=tmp_path / "home" / "engines")


def register(bench: Bench | World, folder: Path) -> ModelVersion:
    with bench.database.begin() as session:
        version = ModelVersion(
            base_model="tiny", artifact_url=folder.as_uri(), sha256=file_sha256(folder / SUMS), labels=LABELS,
            cleaner_version="1",
        )  # fmt: skip
        registry.add_version(session, version, [], [], [])
        registry.assign(session, registry.CHAMPION, version.id)
        return version


def trials(of: int | None = None) -> list[psutil.Process]:
    """Children of a process, this one by default, that run a trial of engines."""
    return [child for child in psutil.Process(of).children() if engine_trial.START in _command(child)]


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


def request(folder: Path, folders: list[Path], sha256: str | None = None) -> TrialRequest:
    return TrialRequest(str(folder), sha256 or file_sha256(folder / SUMS), "cpu", BETTER, list(map(str, folders)))


@pytest.fixture
def champions(lite: Bench, serves: Serving) -> Iterator[Callable[[], Champion]]:
    made: list[Champion] = []

    def make(**other: Any) -> Champion:
        made.append(Champion(lite.database, replace(serves, **other)))
        return made[-1]

    yield make
    for champion in made:
        champion.close()
    assert trials() == []


@pytest.mark.slow
def test_a_new_model_serves_on_plain_torch_at_once_and_its_better_engine_takes_over_between_windows(
    lite: Bench, place: Path, champions: Callable[..., Champion]
) -> None:
    version = register(lite, place)
    champion = champions()
    route = lite.worker(champion, window_tweets=4)
    lite.stream.publish([wire(f"first {i}") for i in range(8)])
    assert route.drain() == 8
    plain = champion.current()
    assert plain is not None
    assert (plain.engine.name, plain.token_budget, champion.loading_since) == (FLOAT32_TORCH, 1024, None)
    assert saved_choices(place, place) == [], "the first window did not wait for a trial"

    wait_until(lambda: champion.current() is not plain)
    better = champion.current()
    assert better is not None
    assert (better.engine.name, champion.engine, better.version_id) == (BETTER, BETTER, version.id)
    assert better.token_budget == saved_choices(place, place)[0].token_budget
    texts = ["今日は嬉しい", "雨が降って悲しい"]
    for one, other in zip(plain.score(texts), better.score(texts), strict=True):
        assert one["label"] == other["label"]
        assert one["probability"] == pytest.approx(other["probability"], abs=1e-4)
    lite.stream.publish([wire(f"then {i}") for i in range(8)])
    assert route.drain() == 8
    assert set(lite.scored().values()) == {version.id}
    assert sum(row["tweets"] for row in lite.rows(ScoringWindow)) == 16

    again = champions().current()
    assert again is not None
    assert again.engine.name == BETTER, "the saved engine serves from the first window on"


@pytest.mark.slow
def test_one_process_of_a_machine_tries_and_the_others_take_over_what_it_kept(
    lite: Bench, place: Path, champions: Callable[..., Champion], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    register(lite, place)
    four = [champions() for _ in range(4)]
    most = 0

    def all_better() -> bool:
        nonlocal most
        most = max(most, len(trials()))
        for champion in four:
            assert champion.current() is not None, "the model serves during the trial"
        return all(champion.engine == BETTER for champion in four)

    wait_until(all_better)
    assert most == 1
    assert caplog.text.count("trying engines in the background") == 1


@pytest.mark.slow
@on_sqlite
def test_a_worker_told_to_end_in_mid_trial_ends_at_once_and_one_that_is_killed_leaves_the_trial_to_another(
    world: World, place: Path
) -> None:
    register(world, place)
    given = {"engine": BETTER}
    with world.worker(**given) as first, world.worker(**given) as second:
        wait_until(lambda: trials(first.pid) or trials(second.pid))
        trier, other = (first, second) if trials(first.pid) else (second, first)
        [child] = trials(trier.pid)
        world.stream.publish([wire("beside it")])
        world.drained()
        trier.kill()
        child.wait(60)
        wait_until(lambda: trials(other.pid))
        [child] = trials(other.pid)
        other.send(signal.SIGTERM)
        assert other.ended() == 0
        assert not child.is_running()
    assert world.scored() == {"beside it"}


@pytest.mark.storm
@on_sqlite
def test_a_worker_told_to_end_at_any_moment_of_a_trial_ends_in_order(
    world: World, place: Path, report: Callable[[str], None]
) -> None:
    register(world, place)
    amid = 0
    for number in range(MOMENTS):
        with worker(world.given, "score", engine=BETTER) as scorer:
            scorer.says("trying engines in the background")
            wait_until(lambda: trials(scorer.process.pid))
            [child] = trials(scorer.process.pid)
            try:
                child.wait(LATEST_SECONDS * (number + 0.1) / MOMENTS)
            except psutil.TimeoutExpired:
                amid += 1
            scorer.send(signal.SIGTERM)
            assert scorer.ended() == 0, scorer.said()[-2000:]
            assert not child.is_running()
            assert "Traceback" not in scorer.said()
        for kept in place.parent.glob("verified.engines/*"):
            (kept / CHOICE).unlink(missing_ok=True)
    report(f"{MOMENTS} workers got a SIGTERM, {amid} of them during a trial")


def test_engines_wait_for_memory_and_that_is_said_once(
    lite: Bench, place: Path, champions: Callable[..., Champion], caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(engine_trial, "MEMORY_SECONDS", 0.02)
    caplog.set_level("INFO")
    register(lite, place)
    weights = (place / "model.safetensors").stat().st_size
    asked, room = [], [int(trial_memory(weights)) - 1]

    def free(device: torch.device) -> int:
        asked.append(device)
        return room[0]

    champion = champions(free_bytes=free)
    assert champion.current() is not None
    wait_until(lambda: len(asked) > 5)
    assert (champion.engine, trials()) == (FLOAT32_TORCH, [])
    assert caplog.text.count("while memory is short") == 1
    room[0] += 1
    wait_until(lambda: "trying engines in the background" in caplog.text)


def test_a_trial_that_fails_is_said_and_the_model_goes_on(
    lite: Bench, place: Path, serves: Serving, caplog: pytest.LogCaptureFixture
) -> None:
    model = load_model(register(lite, place), serves)
    assert model.start_trial is not None
    given = list(model.start_trial.args)  # type: ignore[attr-defined]
    given[2] = request(place, [place.with_name("kept")], sha256="0" * 64)
    trial = engine_trial.EngineTrial(*given)
    wait_until(lambda: "keeps its engine until it is loaded again" in caplog.text)
    assert "TrialFailed: the trial of engines failed: BadArtifact: " in caplog.text
    assert "is not the artifact that was registered" in caplog.text
    assert trial.result() is None
    assert model.score(["嬉しい"])[0]["label"] in LABELS


def test_where_the_store_cannot_be_written_the_choice_is_kept_in_the_home(place: Path, tmp_path: Path) -> None:
    place.with_name(f"{place.name}.engines").write_text("no folder")
    home, sha256 = tmp_path / "home" / "engines", file_sha256(place / SUMS)
    folders = choice_folders(place, sha256, TORCH, BETTER, home)
    engine_trial.run_trial(request(place, folders))
    engine, choice, final = load_engine(load_artifact(place, sha256), TORCH, BETTER, folders)
    assert (engine.name, choice.engine, final) == (BETTER, BETTER, True)
    assert saved_choices(place, home) == [choice]


def test_plain_torch_by_name_is_served_without_any_trial(lite: Bench, place: Path, serves: Serving) -> None:
    model = load_model(register(lite, place), replace(serves, engine=FLOAT32_TORCH))
    assert model.start_trial is None
    assert (model.engine.name, model.choice.reason) == (FLOAT32_TORCH, REQUESTED)
    assert [choice.engine for choice in saved_choices(place, place)] == [FLOAT32_TORCH], "`models show` names it"


def test_a_short_command_tries_nothing_out_and_a_long_one_gets_the_better_engine(
    lite: Bench, place: Path, serves: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = register(lite, place)
    with open_model(version, serves) as opened:
        assert opened.current().engine.name == FLOAT32_TORCH
        assert trials() == []
    monkeypatch.setattr("worker.scoring.scoring_model.TRIAL_AFTER_SECONDS", 0.0)
    with open_model(version, serves) as opened:
        wait_until(trials)
    assert trials() == [], "it ended with the command"
