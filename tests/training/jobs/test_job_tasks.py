"""Jobs with ordinal and continuous targets, from the queue to what is stored about a scored tweet."""

import io
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from sqlalchemy import select
from transformers import pipeline

from db import jobs, registry
from db.models import ConfusionCell, ModelVersion, Prediction, TestPrediction
from db.session import Database
from tests.support.bench import Bench, wire
from tests.support.training_jobs import NEVER, count, job_of, submit
from tests.support.world import on_postgresql
from training.jobs.context import TrainingContext
from training.jobs.run import run_next_job
from training.model.artifact import load_artifact
from training.reporting.model_card import CARD
from worker.cli import output
from worker.cli.training import job_output
from worker.scoring.scoring_model import Serving, load_model

NAMED = {"m": "mid", "h": "high", "xx": "low"}  # not the order in which JSONB stores the keys


@pytest.fixture
def levels_csv(tmp_path: Path) -> Path:
    path = tmp_path / "levels.csv"
    rows = [f"{list(NAMED)[i % 3]},{'とても' * (i % 3)}嬉しい日{i}\n" for i in range(60)]
    path.write_text("label,text\n" + "".join(rows), encoding="utf-8")
    return path


@pytest.fixture
def numbers_csv(tmp_path: Path) -> Path:
    path = tmp_path / "numbers.csv"
    rows = [f"{10 + i % 7 / 2},{'とても' * (i % 7)}嬉しい日{i}\n" for i in range(60)]
    path.write_text("label,text\n" + "".join(rows), encoding="utf-8")
    return path


def trained(database: Database, context: TrainingContext, job_id: int) -> ModelVersion:
    run_next_job(database, context, "here", NEVER)
    assert (job_of(database, job_id).state, job_of(database, job_id).error) == ("succeeded", None)
    with database.read() as session:
        version = registry.of_job(session, job_id)
        assert version is not None
        session.expunge(version)
    return version


def folder_of(version: ModelVersion) -> Path:
    return Path(version.artifact_url.removeprefix("file://"))


def serving(context: TrainingContext) -> Serving:
    return Serving(context.model_store, device="cpu", engine="torch-float32")


@on_postgresql
def test_an_ordinal_job_keeps_the_order_of_its_levels_and_measures_their_distance(
    database: Database, context: TrainingContext, levels_csv: Path, base: dict[str, Any]
) -> None:
    job_id = submit(database, levels_csv, **{**base, "baseline": True}, task="ordinal", labels=NAMED)
    version = trained(database, context, job_id)
    assert version.labels == ["mid", "high", "low"]
    with database.read() as session:
        figures = registry.metrics(session, version.id)
        tested = session.scalars(select(TestPrediction)).all()
    for name in ("quadratic_kappa", "mean_absolute_error"):
        assert {f"{prefix}{name}" for prefix in ("", "tfidf_", "majority_")} <= {metric for metric, _ in figures}
    steps = [abs(version.labels.index(row.actual) - version.labels.index(row.predicted)) for row in tested]
    assert figures["mean_absolute_error", ""] == pytest.approx(np.mean(steps))
    assert count(database, ConfusionCell) == 9
    for row in tested:
        below = itertools.accumulate(row.probabilities[label] for label in version.labels)
        median = next(label for label, total in zip(version.labels, below, strict=True) if total >= 0.5 - 1e-6)
        assert (row.predicted, row.probability) == (median, row.probabilities[median])
    assert load_artifact(folder_of(version), version.sha256).spec.polarity == {"mid": -1, "high": 0, "low": 1}
    card = (folder_of(version) / CARD).read_text(encoding="utf-8")
    assert "one of the ordered 3 labels" in card
    assert "| Quadratic weighted kappa |" in card
    [said] = load_model(version, serving(context)).score(["とても嬉しい"])
    assert said["score_signed"] == pytest.approx(said["probabilities"]["low"] - said["probabilities"]["mid"], abs=1e-6)
    [plain] = pipeline("text-classification", str(folder_of(version)))(["とても嬉しい"], top_k=None)
    assert sum(entry["score"] for entry in plain) == pytest.approx(1, abs=1e-5)  # softmax


@pytest.mark.parametrize("head", ["linear", pytest.param("guide", marks=pytest.mark.slow)])
def test_a_continuous_job_predicts_numbers_in_the_unit_of_its_targets(
    sqlite: Database,
    context: TrainingContext,
    numbers_csv: Path,
    base: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    head: str,
) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(output, "console", Console(file=screen, width=200))
    settings = {**base, "baseline": True, "epochs": 6, "learning_rate": 3e-3, "head": head}
    job_id = submit(sqlite, numbers_csv, **settings, task="continuous")
    version = trained(sqlite, context, job_id)
    assert (version.labels, version.temperature) == (["value"], 1.0)
    lines = numbers_csv.read_text(encoding="utf-8").splitlines()
    with sqlite.read() as session:
        figures = registry.metrics(session, version.id)
        tested = session.scalars(select(TestPrediction)).all()
        epochs = jobs.epochs(session, job_id)
        wrong = registry.wrongest(session, version.id)
        assert registry.paired(session, version.id, version.id) == (6, 0, 0)
    for row in tested:
        assert float(row.actual) == float(lines[row.row_number - 1].split(",")[0])
        assert row.probabilities["value"] == pytest.approx(float(row.predicted), abs=1e-4)
        assert row.probability == 1
    errors = [abs(float(row.actual) - float(row.predicted)) for row in tested]
    assert figures["mean_absolute_error", ""] == pytest.approx(np.mean(errors), abs=1e-4)
    assert errors[tested.index(wrong[0])] == max(errors)
    assert 0 < figures["tfidf_mean_absolute_error", ""] < figures["majority_mean_absolute_error", ""]
    assert not {"accuracy", "f1_macro", "ece"} & {name for name, _ in figures}
    assert count(sqlite, ConfusionCell) == 0
    kept = [epoch for epoch in epochs if epoch.kept][-1]
    assert kept.valid_f1_macro == max(epoch.valid_f1_macro for epoch in epochs)
    job_output.job_summary(sqlite, job_of(sqlite, job_id))
    assert all(name in screen.getvalue() for name in ("R2", "D2", "Spearman", "ridge regression, and the mean"))
    assert "accuracy" not in screen.getvalue().lower()

    spec = load_artifact(folder_of(version), version.sha256).spec
    assert spec.scale is not None
    assert (spec.scale.low, spec.scale.high) == (10, 13)
    text = "とても嬉しい日"
    [said] = load_model(version, serving(context)).score([text])
    assert set(said) == {"label", "probability", "score_signed", "probabilities"}
    assert (said["label"], said["probability"]) == ("value", 1.0)
    assert said["score_signed"] == pytest.approx(spec.scale.signed(said["probabilities"]["value"]))
    card = (folder_of(version) / CARD).read_text(encoding="utf-8")
    assert "Assigns a number" in card
    assert "| Mean absolute error |" in card
    assert "F1" not in card
    pictures = {"epochs.png", "values.png", "errors.png"}
    assert {path.name for path in folder_of(version).glob("*.png")} == pictures
    if head == "linear":  # plain transformers give the output, and the card says how to convert it
        [plain] = pipeline("text-classification", str(folder_of(version)))([text])
        value = plain["score"] * spec.scale.deviation + spec.scale.mean
        assert value == pytest.approx(said["probabilities"]["value"], abs=1e-4)


def test_of_two_continuous_models_the_one_closer_to_a_target_wins_the_row(sqlite: Database) -> None:
    predicted = {1: ["1", "2", "30"], 2: ["1.5", "2.0", "-4"]}  # the actual values are 1, 2 and 3
    with sqlite.begin() as session:
        for values in predicted.values():
            version = ModelVersion(
                base_model="starter", artifact_url="file:///a", sha256="0", labels=["value"], cleaner_version="2"
            )
            rows = [
                {"row_number": i, "text": f"文{i}", "actual": str(i), "predicted": value, "probability": 1.0,
                 "probabilities": {"value": float(value)}}
                for i, value in enumerate(values, 1)
            ]  # fmt: skip
            registry.add_version(session, version, [], [], rows)
    with sqlite.read() as session:
        assert registry.paired(session, 1, 2) == (3, 1, 1)
        assert [row.row_number for row in registry.wrongest(session, 2)] == [3, 1, 2]


def test_the_stream_stores_values_of_a_continuous_champion(
    lite: Bench, context: TrainingContext, numbers_csv: Path, base: dict[str, Any], tmp_path: Path
) -> None:
    job_id = submit(lite.database, numbers_csv, **base, task="continuous", polarity={"10": 1, "12": -1})
    version = trained(lite.database, context, job_id)
    with lite.database.begin() as session:
        registry.assign(session, "champion", version.id)
    lite.stream.publish([wire(i, "嬉しい" * i) for i in range(1, 6)])
    assert lite.worker().drain() == 5
    for row in lite.rows(Prediction):
        value = row["probabilities"]["value"]
        assert 5 < value < 20
        assert (row["label"], row["probability"]) == ("value", 1)
        assert row["score_signed"] == pytest.approx(max(-1, min(1, 11 - value)), abs=1e-6)


def test_artifacts_of_other_tasks_stay_readable_for_earlier_releases(tiny_artifact: Any) -> None:
    written = json.loads((tiny_artifact.folder / "tweetscore.json").read_text(encoding="utf-8"))
    assert not {"scale"} & set(written)
    assert not {"levels"} & set(written["config"])
