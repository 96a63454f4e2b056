"""`tweetscore models cascade`: rows, threshold, registration, evaluation, and what deletion refuses."""

import json
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import worker
from db import registry
from db.errors import InUse, NotFound
from db.models import ModelVersion
from db.session import Database
from tests.conftest import LABELS
from tests.support.cascades import Pair, make_pair, tweets
from tests.support.rows import cascade_row, make_version
from training.data.dataset import read_rows
from training.errors import BadArtifact, BadConfig, BadDataset
from training.evaluation.cascade import NoThreshold
from training.evaluation.metrics import metrics
from training.jobs.run import run_next_job
from training.jobs.unlabelled.teacher import find_teacher
from training.model.cascade import load_cascade
from worker.connections import training_context
from worker.errors import BadRequest
from worker.intake.evaluate_model import evaluate_model
from worker.intake.make_cascade import make_cascade
from worker.intake.submit_job import submit_training
from worker.settings import Settings

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def pair(settings: Settings, home_database: Database, tiny_encoder: Path) -> Pair:
    return make_pair(settings, home_database, tiny_encoder)


def test_the_command_makes_a_version_that_show_and_list_describe(pair: Pair, tweetscore: Run) -> None:
    options = ("--keep", "0.9", "--by-estimate", "--rows", str(pair.file))
    done = tweetscore("models", "cascade", "1", "2", *options)
    assert done.returncode == 0, done.stderr
    with pair.database.read() as session:
        row, version = registry.cascade(session, 3), registry.get(session, 3)
    assert row is not None
    assert (row.student_id, row.teacher_id, row.keep, row.bound) == (1, 2, 0.9, "estimate")
    chosen = next(point for point in row.curve if point["threshold"] == row.threshold)
    assert chosen["ratio"] >= 0.9 > row.curve[0]["ratio"]
    assert chosen["share"] == pytest.approx(row.planned_share, abs=1e-4)
    assert 0.2 < row.planned_share < 0.8
    said = f"threshold {row.threshold:.4f}: it passes on {row.planned_share:.1%} of the tweets, to keep 0.9 of the"
    shown = tweetscore("models", "show", "3").stdout
    for printed in (done.stdout, shown):
        assert said in printed
        assert "chosen" in printed
    assert "no test figures: `tweetscore models evaluate 3 labelled.csv`" in done.stdout
    assert "note: what model 1 was trained on is not known, since no job trained it" in done.stdout
    assert shown.startswith("model 3: cascade of models 1 and 2")
    assert "a part of model 3, a cascade" in tweetscore("models", "show", "2").stdout
    read = json.loads(tweetscore("models", "show", "3", "--json").stdout)
    assert read["cascade"]["curve"] == row.curve
    assert "cascade" in tweetscore("models", "list").stdout
    spec = load_cascade(pair.settings.home / "models" / version.artifact_url.rpartition("/")[2], version.sha256)
    assert (spec.threshold, spec.curve, spec.student.artifact) == (row.threshold, row.curve, "student")
    assert version.labels == LABELS  # in the teacher's order


def test_a_cascade_is_evaluated_as_its_models_decide(pair: Pair, tmp_path: Path) -> None:
    made = pair.cascade()
    evaluated = evaluate_model(pair.settings, pair.database, made.version.id, str(pair.file))
    assert evaluated.evaluation.rows == made.spec.rows
    kept = next(point for point in made.spec.curve if point["threshold"] == made.spec.threshold)
    assert evaluated.figures["f1_macro", ""] == pytest.approx(kept["f1_macro"], abs=1e-4)
    # Calibrated on these rows, so better than the models' own probabilities.
    raw = evaluated.figures["ece_uncalibrated", ""]
    assert evaluated.figures["ece", ""] < raw
    alone = evaluate_model(pair.settings, pair.database, pair.student, str(pair.file)).figures
    assert alone["f1_macro", ""] < evaluated.figures["f1_macro", ""]
    assert pair.cascade(keep=0.5).rows.notes[-1].startswith("nothing is passed on: model 1 alone keeps 0.5 of the")
    place = pair.settings.home / "models" / "teacher"
    place.rename(tmp_path / "teacher")
    with pytest.raises(BadArtifact, match="teacher has no SHA256SUMS"):
        evaluate_model(pair.settings, pair.database, made.version.id, str(pair.file))


def test_models_that_do_not_fit_and_rows_that_are_too_few_are_refused(pair: Pair, tmp_path: Path) -> None:
    cascade, two = pair.cascade().version.id, make_version(pair.database)

    def refused(error: type[Exception], match: str, *ids: int, **options: object) -> None:
        given = {"file": str(pair.file), "keep": 0.9, **options}
        with pytest.raises(error, match=match):
            make_cascade(pair.settings, pair.database, *ids, **given)  # type: ignore[arg-type]

    refused(BadConfig, "model 3 is a cascade itself", pair.student, cascade)
    refused(BadConfig, "model 1 cannot be both", pair.student, pair.student)
    refused(BadConfig, "needs two models of the same labels", two, pair.teacher)
    refused(BadConfig, "keep is 1.5", pair.student, pair.teacher, keep=1.5)
    refused(NotFound, "there is no model 99", pair.student, 99)
    refused(NoThreshold, "no threshold keeps 1 of", pair.student, pair.teacher, keep=1.0, bound="bootstrap")
    refused(BadRequest, "give labelled rows that neither model was trained on with --rows", 1, 2, file=None)
    few = tmp_path / "few.csv"
    few.write_text("label,text\n" + "".join(f"neutral,猫{i}\n" for i in range(60)), encoding="utf-8")
    refused(BadDataset, "none of the label negative", pair.student, pair.teacher, file=str(few))
    with pair.database.read() as session:
        assert session.query(ModelVersion).count() == 4
        with pytest.raises(BadConfig, match="teacher 3 is a cascade; name the model that it passes tweets on to, 2"):
            find_teacher(session, cascade, LABELS)
    assert sorted(p.name for p in (pair.settings.home / "models").iterdir() if p.name.startswith("cascade")) == [
        registry_name(pair.database, cascade)
    ]


def registry_name(database: Database, version_id: int) -> str:
    with database.read() as session:
        return registry.get(session, version_id).artifact_url.rpartition("/")[2]


def test_by_default_the_rows_are_those_that_neither_job_trained_on(
    settings: Settings, home_database: Database, tiny_encoder: Path, tmp_path: Path
) -> None:
    """The teacher's validation rows choose and its test rows measure, without what the student learned."""
    texts = tweets(700)
    lines = [f'{LABELS[i % 3]},"{"嬉しい悲しい普通"[3 * (i % 3) : 3 * (i % 3) + 3]}{t}"' for i, t in enumerate(texts)]
    lines = [line for line in lines if line.count('"') == 2]
    whole, part = tmp_path / "whole.csv", tmp_path / "part.csv"
    whole.write_text("label,text\n" + "\n".join(lines) + "\n", encoding="utf-8")
    part.write_text("label,text\n" + "\n".join(lines[:200]) + "\n", encoding="utf-8")
    given = settings.model_copy(update={"base_model": str(tiny_encoder), "read_roots": (tmp_path, tiny_encoder.parent)})
    for dataset in (part, whole):
        options: dict[str, Any] = {"epochs": 1, "add_sample": False, "baseline": False, "base_model": str(tiny_encoder)}
        submit_training(given, home_database, dataset, "fast", **options)
        assert run_next_job(home_database, training_context(given), "here", threading.Event()) is not None
    made = make_cascade(given, home_database, 1, 2, keep=0.3, bound="estimate")
    learned = set(read_rows(part).texts)
    assert made.rows.name == "the validation rows of job 2"
    assert 50 <= len(made.rows.choosing) < 70
    # The student's own validation and test rows, a fifth of its file, are as good as new ones.
    assert 0 < len(learned & {*made.rows.choosing.texts, *made.rows.test.texts}) < 20
    assert made.rows.notes[0].endswith("rows are left out: model 1 or 2 learned them")
    with home_database.read() as session:
        stored = registry.metrics(session, made.version.id)
        tested = registry.tested_rows(session, made.version.id)
        shared, _, _ = registry.paired(session, made.version.id, 2)
    assert stored == pytest.approx(made.cascade)
    assert tested == set(made.rows.test.rows.row_numbers)
    assert shared == len(tested)  # so that the guard of promotions can compare it with its teacher
    probabilities = np.array([[0.2, 0.3, 0.5]] * len(tested), np.float32)
    assert set(metrics(made.rows.test.rows.targets, probabilities, LABELS, "single_label")) <= set(stored)


def test_the_parts_of_a_cascade_can_be_deleted_only_after_it(database: Database) -> None:
    student, teacher, cascade = (make_version(database) for _ in range(3))
    with database.begin() as session:
        registry.add_cascade(session, cascade_row(cascade, student, teacher))
    for part in (student, teacher):
        with database.begin() as session, pytest.raises(InUse, match=f"`tweetscore models delete {cascade}`"):
            registry.mark_deleted(session, part, False)
    for version in (cascade, student, teacher):
        with database.begin() as session:
            assert registry.mark_deleted(session, version, False).deleted_at is not None
    other = make_version(database)
    with database.begin() as session, pytest.raises(NotFound, match=f"model {student} was deleted"):
        registry.add_cascade(session, cascade_row(other, student, teacher))


def test_python_makes_a_cascade_with_the_settings_of_the_environment(pair: Pair) -> None:
    assert worker.make_cascade(pair.student, pair.teacher, 0.9, bound="estimate", file=str(pair.file)) == 3
