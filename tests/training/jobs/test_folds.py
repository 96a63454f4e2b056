"""Cross-validation of a job: what it stores, and that an interrupted one gives the same figures."""

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from db import jobs, registry
from db.models import ModelVersion, OutOfFoldPrediction, TestPrediction
from db.session import Database
from tests.support.training_jobs import NEVER, count, job_of, left_in, running, submit
from tests.support.world import on_postgresql
from training import failpoint
from training.jobs.context import TrainingContext
from training.jobs.run import run_next_job
from training.store.cache import Cache
from training.store.paths import file_sha256
from training.store.store import Store
from worker.cli.training import job_output


@pytest.fixture
def learning(base: dict[str, Any]) -> dict[str, Any]:
    """Settings with which the easy rows are learned in part, so that figures differ between folds and models.

    Every fold trains on 27 of the 60 rows, in 4 steps an epoch, and the kept model on 48, in 6.
    """
    return {**base, "pooling": "mean", "learning_rate": 2e-3}


STEPS = {"fold": 8, "kept": 12}


def version_of(database: Database, job_id: int) -> ModelVersion:
    with database.read() as session:
        version = registry.of_job(session, job_id)
        assert version is not None, jobs.get(session, job_id).error
        return version


def figures_of(database: Database, job_id: int) -> dict[tuple[str, str], float]:
    with database.read() as session:
        return registry.metrics(session, version_of(database, job_id).id)


def out_of_fold(database: Database, job_id: int) -> list[tuple[Any, ...]]:
    with database.read() as session:
        rows = registry.out_of_fold(session, version_of(database, job_id).id)
        return [(row.row_number, row.fold, row.actual, row.predicted, row.probabilities) for row in rows]


def predictions_of(database: Database, job_id: int) -> list[tuple[int, dict[str, Any]]]:
    query = select(TestPrediction).where(TestPrediction.model_version_id == version_of(database, job_id).id)
    with database.read() as session:
        return sorted((row.row_number, row.probabilities) for row in session.scalars(query))


def card_of(database: Database, job_id: int) -> str:
    folder = Path(version_of(database, job_id).artifact_url.removeprefix("file://"))
    return (folder / "README.md").read_text(encoding="utf-8")


def retried(database: Database, context: TrainingContext, job_id: int, fault: str = "") -> int:
    """Run a job again, with a failpoint, and return how many optimizer steps that took."""
    with database.begin() as session:
        if jobs.get(session, job_id).state == "failed":
            jobs.retry(session, job_id)
    failpoint.arm(",".join(filter(None, ["stepped=pause:0", fault])))
    try:
        run_next_job(database, context, "here", NEVER)
        return failpoint._armed["stepped"].passed
    finally:
        failpoint.arm("")


@on_postgresql
def test_every_row_is_predicted_once_by_a_model_that_was_not_trained_on_it(
    database: Database, context: TrainingContext, labelled_csv: Path, learning: dict[str, Any]
) -> None:
    job_id = submit(database, labelled_csv, file_sha256(labelled_csv), **learning, folds=2)
    run_next_job(database, context, "here", NEVER)
    rows, lines = out_of_fold(database, job_id), labelled_csv.read_text(encoding="utf-8").splitlines()
    assert [row[0] for row in rows] == list(range(2, len(lines) + 1))
    assert [row[2] for row in rows] == [line.split(",")[0] for line in lines[1:]]
    assert [[row[1] for row in rows].count(fold) for fold in (1, 2)] == [30, 30]
    assert all(sum(row[4].values()) == pytest.approx(1, abs=1e-5) for row in rows)
    right = [[row[2] == row[3] for row in rows if row[1] == fold] for fold in (1, 2)]
    figures = figures_of(database, job_id)
    assert figures["cv_accuracy_mean", ""] == pytest.approx(sum(map(sum, right)) / 60)
    assert figures["cv_accuracy_sd", ""] == pytest.approx(abs(sum(right[0]) - sum(right[1])) / 30 / 2**0.5)
    assert {name for name, _ in figures if name.startswith("cv_")} == {
        "cv_folds", "cv_accuracy_mean", "cv_accuracy_sd", "cv_f1_macro_mean", "cv_f1_macro_sd",
    }  # fmt: skip


def test_an_interrupted_job_repeats_no_fold_and_gives_the_same_figures_and_the_model_of_a_job_without_folds(
    sqlite: Database,
    context: TrainingContext,
    labelled_csv: Path,
    learning: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    plain = submit(sqlite, labelled_csv, **learning)
    assert retried(sqlite, context, plain) == STEPS["kept"]
    whole = submit(sqlite, labelled_csv, **learning, folds=2)
    assert retried(sqlite, context, whole) == 2 * STEPS["fold"] + STEPS["kept"]
    torn = submit(sqlite, labelled_csv, **learning, folds=2)
    # In the second epoch of fold 2; fold 1 is not repeated, and fold 2 goes on after its first epoch.
    assert retried(sqlite, context, torn, "validated=fail@4") == 2 * STEPS["fold"]
    assert job_of(sqlite, torn).state == "failed"
    assert retried(sqlite, context, torn, "folded=fail") == STEPS["fold"] / 2
    folder = context.jobs_folder / str(torn)
    assert left_in(folder) == ["part2", "result-0001-0001", "result-0002-0002"]
    # A damaged result is made again.
    (folder / "result-0001-0001" / "arrays.safetensors").write_bytes(b"torn")
    assert retried(sqlite, context, torn, "evaluated=fail") == STEPS["fold"] + STEPS["kept"]
    assert retried(sqlite, context, torn) == 0
    job = job_of(sqlite, torn)
    assert (job.state, job.step, job.total_steps) == ("succeeded", 2 * STEPS["fold"] + STEPS["kept"], job.step)
    assert left_in(context.jobs_folder) == []
    assert out_of_fold(sqlite, torn) == out_of_fold(sqlite, whole)
    figures = figures_of(sqlite, torn)
    assert figures == figures_of(sqlite, whole)
    # The model that is kept is that of a job without folds.
    assert {key: value for key, value in figures.items() if not key[0].startswith("cv_")} == figures_of(sqlite, plain)
    assert predictions_of(sqlite, torn) == predictions_of(sqlite, plain)
    assert out_of_fold(sqlite, plain) == []
    with sqlite.read() as session:
        losses = [[metric.valid_loss for metric in jobs.epochs(session, job_id)] for job_id in (plain, whole, torn)]
    assert losses[0] == losses[1] == losses[2]
    # Where people see it.
    line = f"2-fold cross-validation: macro-F1 {figures['cv_f1_macro_mean', '']:.2f} ± "
    job_output.job_summary(sqlite, job)
    assert line in capsys.readouterr().out
    assert line in card_of(sqlite, torn)
    assert "all 60 labelled rows" in card_of(sqlite, torn)


def test_a_worker_that_must_end_within_a_fold_gives_the_job_back_with_a_checkpoint_of_the_fold(
    sqlite: Database, context: TrainingContext, labelled_csv: Path, base: dict[str, Any]
) -> None:
    job_id = submit(sqlite, labelled_csv, **{**base, "epochs": 1000}, folds=2)
    stopping = threading.Event()
    with running(sqlite, context, job_id, stopping):
        stopping.set()
    job = job_of(sqlite, job_id)
    assert (job.state, job.attempts) == ("queued", 0)
    saved = left_in(context.jobs_folder / str(job_id) / "part1")
    assert any(name.startswith("step-") for name in saved)
    with sqlite.begin() as session:
        assert jobs.epochs(session, job_id) == []  # those of the kept model only


def test_a_cancelled_job_ends_within_a_fold_and_leaves_nothing(
    sqlite: Database, context: TrainingContext, labelled_csv: Path, base: dict[str, Any]
) -> None:
    job_id = submit(sqlite, labelled_csv, **{**base, "epochs": 1000}, folds=2)
    with running(sqlite, context, job_id, threading.Event()), sqlite.begin() as session:
        jobs.request_cancel(session, job_id)
    assert job_of(sqlite, job_id).state == "cancelled"
    assert left_in(context.jobs_folder) == []
    assert count(sqlite, OutOfFoldPrediction) == 0


@pytest.mark.slow
def test_another_machine_takes_the_finished_folds_from_the_store(
    sqlite: Database, context: TrainingContext, labelled_csv: Path, learning: dict[str, Any], tmp_path: Path
) -> None:
    shared = replace(context, checkpoint_store=Store(f"memory://{tmp_path}/checkpoints", Cache(tmp_path / "c", 10**9)))
    job_id = submit(sqlite, labelled_csv, **learning, folds=2)
    assert retried(sqlite, shared, job_id, "validated=fail@4") == 2 * STEPS["fold"]
    elsewhere = replace(shared, jobs_folder=tmp_path / "elsewhere")
    assert retried(sqlite, elsewhere, job_id) == STEPS["fold"] / 2 + STEPS["kept"]
    assert job_of(sqlite, job_id).state == "succeeded"
    assert shared.checkpoint_store is not None
    assert shared.checkpoint_store.names("") == []


@pytest.mark.slow
def test_rows_of_several_labels_are_cross_validated(
    sqlite: Database, context: TrainingContext, tmp_path: Path, base: dict[str, Any]
) -> None:
    path = tmp_path / "several.csv"
    written = ["joy", "anger", "joy|anger", ""]
    path.write_text("label,text\n" + "".join(f"{written[i % 4]},今日のこと{i}\n" for i in range(40)), encoding="utf-8")
    job_id = submit(sqlite, path, **{**base, "epochs": 1}, task="multi_label", folds=2)
    run_next_job(sqlite, context, "here", NEVER)
    rows = out_of_fold(sqlite, job_id)
    assert [set(row[2].split("|")) for row in rows] == [set(written[i % 4].split("|")) for i in range(40)]
    assert all(row[3] == "|".join(name for name, value in row[4].items() if value >= 0.5) for row in rows)


def test_four_rows_of_a_label_are_trained_measured_and_warned_about(
    sqlite: Database,
    context: TrainingContext,
    tmp_path: Path,
    base: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "few.csv"
    rows = [f"positive,嬉しい日{i}" for i in range(4)] + [f"negative,悲しい日{i}" for i in range(4)]
    path.write_text("label,text\n" + "\n".join(rows) + "\n", encoding="utf-8")
    job_id = submit(sqlite, path, **{**base, "epochs": 1, "baseline": True}, head="guide", folds=2)
    run_next_job(sqlite, context, "here", NEVER)
    job = job_of(sqlite, job_id)
    assert (job.state, job.error) == ("succeeded", None)
    [note, *_] = job.data_report["notes"]
    assert note.startswith("few rows: negative 4 (1 in the test part), positive 4 (1 in the test part); ")
    job_output.job_summary(sqlite, job)
    assert f"note: {note}" in capsys.readouterr().out
    assert f"Note: {note}." in card_of(sqlite, job_id)
