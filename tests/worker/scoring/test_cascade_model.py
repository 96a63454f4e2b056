"""A cascade on the route of a tweet: who decides, what is stored and counted, faults, swaps, engines."""

import shutil
from dataclasses import replace
from math import isnan, nan
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from prometheus_client import REGISTRY

from db import registry
from db.models import PROBABILITY_DECIMALS, ModelVersion, Prediction, ScoringWindow
from tests.conftest import wait_until
from tests.support.bench import CPU, Bench, Holding, draining, wire
from tests.support.cascades import Pair, make_pair, tweets
from tests.support.rows import assign
from tests.support.shadows import counts, shadowed
from training.errors import BadArtifact
from training.loop.logits import logits_of
from training.model.artifact import load_artifact, make_reference, save_artifact
from worker.maintenance.export import export
from worker.scoring.backfill import rescore
from worker.scoring.cascade_model import CascadeModel
from worker.scoring.pipeline import Pipeline
from worker.scoring.scores import Model, Scores
from worker.scoring.scoring_model import ScoringModel, UpgradableModel, load_model
from worker.scoring.window import Window
from worker.settings import Settings

COUNT = 60


@pytest.fixture
def pair(bench: Bench, settings: Settings, tiny_encoder: Path) -> Pair:
    return make_pair(settings, bench.database, tiny_encoder)


@pytest.fixture
def lite_pair(lite: Bench, settings: Settings, tiny_encoder: Path) -> Pair:
    return make_pair(settings, lite.database, tiny_encoder)


def version_of(pair: Pair, version_id: int) -> ModelVersion:
    with pair.database.read() as session:
        return registry.get(session, version_id)


def value(name: str) -> float:
    return REGISTRY.get_sample_value(f"tweetscore_{name}") or 0.0


def test_the_model_that_decides_gives_the_label_and_is_named(bench: Bench, pair: Pair) -> None:
    made = pair.cascade()
    cascade = made.version.id
    assign(bench.database, cascade)
    texts = tweets(COUNT)
    passed_before = value("passed_on_total")
    bench.stream.publish([wire(i, text) for i, text in enumerate(texts)] + [wire("again", texts[0])])
    assert bench.worker().drain() == COUNT + 1
    alone = {id_: pair.model(id_).score(texts) for id_ in (pair.student, pair.teacher)}
    rows = {row["tweet_id"]: row for row in bench.rows(Prediction)}
    hard = [i for i in range(COUNT) if max(alone[pair.student][i]["probabilities"].values()) < made.spec.threshold]
    assert 5 < len(hard) < COUNT - 5
    for i in range(COUNT):
        decider = pair.teacher if i in hard else pair.student
        row, expected = rows[str(i)], alone[decider][i]
        assert (row["model_version_id"], row["decided_by"], row["label"]) == (cascade, decider, expected["label"])
        assert row["probabilities"][row["label"]] == max(row["probabilities"].values())
        assert row["probability"] == round(row["probabilities"][row["label"]], PROBABILITY_DECIMALS)
        assert sum(row["probabilities"].values()) == pytest.approx(1)
        part = made.spec.teacher if i in hard else made.spec.student
        powers = np.array([expected["probabilities"][label] for label in made.version.labels])
        powers **= 2.0 / part.temperature  # 2: the temperature of the models alone
        found = [row["probabilities"][label] for label in made.version.labels]
        assert found == pytest.approx((powers / powers.sum()).tolist(), abs=1e-4)
    same = {key: rows["again"][key] for key in ("label", "probabilities", "decided_by")}
    assert same == {key: rows["0"][key] for key in same}
    passed = len(hard) + (0 in hard)
    assert sum(row["passed_on"] for row in bench.rows(ScoringWindow)) == passed
    assert value("passed_on_total") - passed_before == passed
    assert value("planned_share") == made.spec.planned_share


def test_a_cascade_takes_over_and_hands_back_without_losing_a_tweet(bench: Bench, pair: Pair) -> None:
    cascade = pair.cascade().version.id
    order, published = [pair.teacher, cascade, pair.student], [0]

    def more() -> None:
        bench.stream.publish([wire(published[0] + i, text) for i, text in enumerate(tweets(4))])
        published[0] += 4

    seen: list[int] = []

    class GoesOnUntilAllHaveScored(Pipeline):
        def store(self, window: Window) -> int:
            scored = super().store(window)
            if window.model.version_id not in seen:
                seen.append(window.model.version_id)
                if len(seen) < len(order):
                    assign(bench.database, order[len(seen)])
            if len(seen) < len(order):
                more()
            return scored

    assign(bench.database, order[0])
    more()
    worker = bench.worker(kind=GoesOnUntilAllHaveScored, window_tweets=4)
    with draining(worker):
        pass
    assert seen == order
    rows = bench.rows(Prediction)
    assert len(rows) == published[0]
    by = {version: [row["decided_by"] for row in rows if row["model_version_id"] == version] for version in order}
    assert {*by[pair.teacher], *by[pair.student]} == {None}
    assert set(by[cascade]) <= {pair.student, pair.teacher}
    windows = bench.rows(ScoringWindow)
    assert {row["model_version_id"] for row in windows if row["passed_on"] is not None} == {cascade}
    assert isnan(value("planned_share") or nan)


def test_rescore_shadow_and_export_treat_a_cascade_as_any_version(lite: Bench, lite_pair: Pair, tmp_path: Path) -> None:
    pair, texts = lite_pair, tweets(COUNT)
    first, second = pair.cascade().version.id, pair.cascade(keep=0.8).version.id
    assign(lite.database, pair.teacher)
    assign(lite.database, first, "challenger")
    with shadowed(lite) as worker, counts("tweets", COUNT):
        lite.stream.publish([wire(i, text) for i, text in enumerate(texts)])
        worker.drain()
    assert rescore(lite.database, pair.settings, second, None, lambda: None) == COUNT
    rows = lite.rows(Prediction)
    for cascade in (first, second):
        decided = [row["decided_by"] for row in rows if row["model_version_id"] == cascade]
        assert (len(decided), set(decided)) == (COUNT, {pair.student, pair.teacher})
    place = tmp_path / "out.jsonl"
    assert export(lite.database, str(place), "jsonl", model=second) == COUNT
    exported = place.read_text(encoding="utf-8")
    assert exported.count(f'"decided_by": {pair.teacher}') == decided.count(pair.teacher) > 0


class Broken(ScoringModel):
    def forward(self, rows: Any) -> Scores:
        raise RuntimeError("the device is broken")


class Fragile(ScoringModel):
    """Fails on one text among those that are passed on."""

    poison: str

    def forward(self, rows: Any) -> Scores:
        if self.tokenise([self.poison])[0] in list(rows):
            raise RuntimeError("the device says no")
        return super().forward(rows)


def with_teacher(pair: Pair, kind: type[ScoringModel]) -> CascadeModel:
    """A cascade whose teacher is of another kind."""
    model = load_model(pair.cascade().version, CPU)
    assert isinstance(model, CascadeModel)
    model.teacher.__class__ = kind
    return model


def test_a_broken_teacher_buries_nobody_and_a_text_that_breaks_it_is_buried_alone(lite: Bench, lite_pair: Pair) -> None:
    texts = tweets(COUNT)
    broken = with_teacher(lite_pair, Broken)
    lite.stream.publish([wire(i, text) for i, text in enumerate(texts)])
    worker = lite.worker(Holding(lite.database, broken), min_idle_seconds=0.02)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="the device is broken"):
        worker.drain()
    assert (lite.dead(), lite.scored()) == ([], {})

    sure = lite_pair.model(lite_pair.student).score(texts)
    fragile = with_teacher(lite_pair, Fragile)
    poison = min(range(COUNT), key=lambda i: sure[i]["probability"])
    Fragile.poison = texts[poison]
    again = lite.worker(Holding(lite.database, fragile), min_idle_seconds=0.02)  # type: ignore[arg-type]
    wait_until(lambda: again.drain() >= 0 and len(lite.scored()) == COUNT - 1)
    [letter] = lite.dead()
    assert letter["reason"].startswith("scoring it alone failed (RuntimeError)")
    assert str(poison) not in lite.scored()


def test_a_cascade_is_loaded_only_with_the_very_models_that_it_was_made_of(lite_pair: Pair) -> None:
    version = lite_pair.cascade().version
    models = lite_pair.settings.home / "models"
    shutil.rmtree(models / "teacher")
    shutil.copytree(models / "student", models / "teacher")
    with pytest.raises(BadArtifact, match="teacher is not the artifact that was registered"):
        load_model(version, CPU)


def test_both_models_change_to_the_engines_that_their_trials_find(
    lite_pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = lite_pair
    with_reference(pair)
    version = pair.cascade().version
    model = load_model(version, replace(CPU, engine="openvino-float32"))
    texts = tweets(COUNT)
    before = model.score(texts)
    upgradable = UpgradableModel(model)
    try:
        wait_until(lambda: engines(upgradable.current()) == ["openvino-float32"] * 2)
    finally:
        upgradable.close()
    after = upgradable.current().score(texts)
    assert [row["label"] for row in after] == [row["label"] for row in before]
    assert engines(load_model(version, replace(CPU, engine="openvino-float32"))) == ["openvino-float32"] * 2


def engines(model: Model) -> list[str]:
    return [part.engine.name for part in model.parts]


def with_reference(pair: Pair) -> None:
    """Save both models again with validation rows, which a trial needs."""
    for version_id, name in ((pair.student, "student"), (pair.teacher, "teacher")):
        folder = pair.settings.home / "models" / name
        artifact, model = load_artifact(folder), pair.model(version_id)
        rows = model.tokenise(tweets(100))
        logits = logits_of(artifact.model, rows, artifact.tokenizer.pad_token_id, torch.device("cpu"))
        shutil.rmtree(folder)
        reference = make_reference(rows, logits)
        sha256 = save_artifact(folder, artifact.model, artifact.tokenizer, artifact.spec, reference)
        with pair.database.begin() as session:
            registry.get(session, version_id).sha256 = sha256
