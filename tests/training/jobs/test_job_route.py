"""The route of a job, from the queue to a registered model: how it can end, and what it leaves behind."""

import io
import shutil
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from sqlalchemy import select
from transformers import pipeline

from db import jobs, registry
from db.models import ConfusionCell, EpochMetric, ModelVersion, TestPrediction, utc_now
from db.session import Database
from tests.conftest import wait_until
from tests.support.training_jobs import NEVER, count, epoch_seconds, job_of, left_in, running, shorten, submit
from tests.support.world import on_postgresql
from training import failpoint
from training.jobs.context import TrainingContext
from training.jobs.run import run_next_job
from training.model.artifact import load_artifact
from training.model.batching import pad
from training.store.paths import file_sha256
from training.text.tokenizer import encode
from worker.cli import output
from worker.cli.training import job_output


@on_postgresql
def test_a_finished_job_has_rows_in_every_table_and_a_whole_artifact(
    database: Database, context: TrainingContext, labelled_csv: Path, base: dict[str, Any]
) -> None:
    job_id = submit(database, labelled_csv, file_sha256(labelled_csv), **{**base, "baseline": True})
    assert run_next_job(database, context, "here", NEVER) == job_id
    job = job_of(database, job_id)
    assert (job.state, job.error, job.attempts, job.lease_owner) == ("succeeded", None, 1, None)
    assert job.dataset_sha256 == file_sha256(labelled_csv)
    assert job.data_report is not None
    assert job.data_report["sizes"] == {"train": 48, "valid": 6, "test": 6}
    with database.begin() as session:
        assert [metric.epoch for metric in jobs.epochs(session, job_id)] == [1, 2]
        version = registry.of_job(session, job_id)
        assert version is not None
        figures = registry.metrics(session, version.id)
        cells = registry.confusion(session, version.id)
        tested = session.scalars(select(TestPrediction)).all()
        assert version.labels == ["negative", "positive"]
        assert {"accuracy", "f1_micro", "f1_macro", "tfidf_f1_macro"} <= {name for name, label in figures if not label}
        assert figures["f1_micro", ""] == figures["accuracy", ""]
        assert set(cells) == {(a, b) for a in version.labels for b in version.labels}
        right = sum(row.actual == row.predicted for row in tested)
        assert (len(tested), sum(cells.values())) == (6, 6)
        assert right / 6 == pytest.approx(figures["accuracy", ""])
        lines = labelled_csv.read_text(encoding="utf-8").splitlines()
        assert all(lines[row.row_number - 1] == f"{row.actual},{row.text}" for row in tested)
        assert all(sum(row.probabilities.values()) == pytest.approx(1, abs=1e-5) for row in tested)
        assert all(row.unknown_share is not None and 0 <= row.unknown_share < 0.5 for row in tested)
        folder = Path(version.artifact_url.removeprefix("file://"))
        assert load_artifact(folder, version.sha256).spec.labels == version.labels
    assert left_in(context.jobs_folder) == []  # checkpoints are removed at the end
    assert run_next_job(database, context, "here", NEVER) is None


def test_a_baseline_that_fails_costs_a_note_that_people_see_and_not_the_model(
    sqlite: Database,
    context: TrainingContext,
    labelled_csv: Path,
    base: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(output, "console", Console(file=screen, width=200))
    job_id = submit(sqlite, labelled_csv, **{**base, "baseline": True})
    failpoint.arm("baseline=full~tfidf")
    try:
        run_next_job(sqlite, context, "here", NEVER)
    finally:
        failpoint.arm("")
    job = job_of(sqlite, job_id)
    note = "the tfidf baseline failed (MemoryError); its figures are missing"
    assert (job.state, job.data_report["notes"]) == ("succeeded", [note])
    job_output.job_summary(sqlite, job)
    assert f"note: {note}" in screen.getvalue()
    [artifact] = context.model_store.folder.iterdir()
    assert f"Note: {note}." in (artifact / "README.md").read_text(encoding="utf-8")


def test_a_job_of_several_labels_a_row_is_registered_and_plain_transformers_give_the_same_probabilities(
    sqlite: Database, context: TrainingContext, tmp_path: Path, base: dict[str, Any]
) -> None:
    path = tmp_path / "several.csv"
    written = ["joy", "anger", "joy|anger", ""]
    path.write_text("label,text\n" + "".join(f"{written[i % 4]},今日のこと{i}\n" for i in range(60)), encoding="utf-8")
    job_id = submit(sqlite, path, **base, task="multi_label")
    run_next_job(sqlite, context, "here", NEVER)
    assert (job_of(sqlite, job_id).state, job_of(sqlite, job_id).error) == ("succeeded", None)
    lines = path.read_text(encoding="utf-8").splitlines()
    with sqlite.begin() as session:
        tested = session.scalars(select(TestPrediction)).all()
        assert len(tested) == 6
        for row in tested:
            assert set(row.actual.split("|")) == set(lines[row.row_number - 1].split(",")[0].split("|"))
            assert row.predicted == "|".join(name for name, value in row.probabilities.items() if value >= 0.5)
        version = registry.of_job(session, job_id)
        assert version is not None
    assert count(sqlite, ConfusionCell) == 0
    artifact = load_artifact(Path(version.artifact_url.removeprefix("file://")))
    text = "今日は最高の一日でした"
    [said] = pipeline("text-classification", str(artifact.folder))([text], top_k=None)
    with torch.inference_mode():
        ours = artifact.model(*pad(encode(artifact.tokenizer, [text], 200), 0)).sigmoid()[0]
    assert {s["label"]: s["score"] for s in said} == pytest.approx(
        dict(zip(artifact.spec.labels, ours.tolist(), strict=True)), abs=1e-5
    )


BAD_JOBS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "one class": ({"content": "label,text\n" + "".join(f"good,x{i}\n" for i in range(20))}, ["good", "two labels"]),
    "dataset outside the roots": ({"dataset": "/etc/passwd"}, ["'/etc/passwd'", "TWEETSCORE_READ_ROOTS"]),
    "dataset gone": ({"dataset": "gone.csv"}, ["gone.csv", "there is no file"]),
    "dataset changed": ({"sha256": "0" * 64}, ["changed after", "submit it again"]),
    "encoder outside the roots": ({"base_model": "/etc"}, ["'/etc'", "TWEETSCORE_READ_ROOTS"]),
    "unknown setting": ({"config": {"epocs": 3}}, ["epocs is not a setting"]),
    "too long for the encoder": ({"max_length": 600}, ["max_length is 600", "512"]),
}


@pytest.mark.parametrize("case", BAD_JOBS)
def test_a_job_that_cannot_run_fails_with_a_sentence_and_leaves_nothing(
    sqlite: Database, context: TrainingContext, labelled_csv: Path, base: dict[str, Any], case: str
) -> None:
    change, fragments = BAD_JOBS[case]
    change = dict(change)
    labelled_csv.write_text(change.pop("content", labelled_csv.read_text(encoding="utf-8")), encoding="utf-8")
    dataset = labelled_csv.parent / change.pop("dataset", labelled_csv.name)
    config, sha256 = change.pop("config", {}), change.pop("sha256", None)
    job_id = submit(sqlite, dataset, sha256, **{**base, **change})
    with sqlite.begin() as session:
        job = jobs.get(session, job_id)
        job.config = {**job.config, **config}
    assert run_next_job(sqlite, context, "here", NEVER) == job_id
    job = job_of(sqlite, job_id)
    assert job.state == "failed"
    assert job.error is not None
    assert [fragment for fragment in fragments if fragment not in job.error] == []
    assert "\n" not in job.error
    assert "Error:" not in job.error  # a user's mistake is a sentence, not a Python exception
    assert (count(sqlite, ModelVersion), left_in(context.model_store.folder)) == (0, [])
    assert run_next_job(sqlite, context, "here", NEVER) is None


def test_a_failed_job_is_recorded_on_every_database(
    database: Database, context: TrainingContext, unreadable_csv: Path
) -> None:
    job_id = submit(database, unreadable_csv)
    run_next_job(database, context, "here", NEVER)
    job = job_of(database, job_id)
    assert job.state == "failed"
    assert "row 2 of bytes.csv: the row is not UTF-8" in (job.error or "")
    assert job.finished_at is not None


def test_a_worker_that_must_end_gives_the_job_back_and_the_next_goes_on(
    sqlite: Database, context: TrainingContext, labelled_csv: Path, base: dict[str, Any]
) -> None:
    job_id = submit(sqlite, labelled_csv, **{**base, "epochs": 1000})
    stopping = threading.Event()
    with running(sqlite, context, job_id, stopping):
        wait_until(lambda: count(sqlite, EpochMetric) > 1)
        stopping.set()
    job = job_of(sqlite, job_id)
    assert (job.state, job.attempts, job.lease_owner) == ("queued", 0, None)
    done = epoch_seconds(sqlite, job_id)
    shorten(sqlite, job_id, len(done) + 2)
    assert run_next_job(sqlite, context, "there", NEVER) == job_id
    assert job_of(sqlite, job_id).state == "succeeded"
    assert len(epoch_seconds(sqlite, job_id)) == len(done) + 2
    assert epoch_seconds(sqlite, job_id)[: len(done)] == done  # unchanged: no epoch ran again
    assert count(sqlite, ModelVersion) == 1


def claim_again(database: Database, job_id: int) -> None:
    """Let the lease lapse and another worker claim the job with a newer token, in one transaction."""
    with database.begin() as session:
        jobs.get(session, job_id).lease_expires_at = utc_now() - timedelta(seconds=1)
        session.flush()
        assert jobs.claim(session, owner="there", lease_seconds=60, max_attempts=3) is not None


def test_a_trainer_whose_job_was_taken_over_stops_and_leaves_everything_to_the_other(
    sqlite: Database, context: TrainingContext, labelled_csv: Path, base: dict[str, Any]
) -> None:
    job_id = submit(sqlite, labelled_csv, **{**base, "epochs": 1000})
    with running(sqlite, context, job_id, threading.Event()):
        claim_again(sqlite, job_id)
    job = job_of(sqlite, job_id)
    assert (job.state, job.lease_owner, job.fencing_token, job.error) == ("running", "there", 2, None)
    assert (count(sqlite, ModelVersion), left_in(context.model_store.folder)) == (0, [])
    assert left_in(context.jobs_folder) == [str(job_id)]  # the next worker resumes from its checkpoints


def test_a_job_whose_checkpoints_are_gone_starts_over_and_shows_no_epoch_twice(
    sqlite: Database, context: TrainingContext, labelled_csv: Path, base: dict[str, Any]
) -> None:
    job_id = submit(sqlite, labelled_csv, **{**base, "epochs": 1000})
    stopping = threading.Event()
    with running(sqlite, context, job_id, stopping):
        wait_until(lambda: count(sqlite, EpochMetric) > 2)
        stopping.set()
    shutil.rmtree(context.jobs_folder)
    shorten(sqlite, job_id, 2)
    assert run_next_job(sqlite, context, "here", NEVER) == job_id
    assert [epoch for epoch, _ in epoch_seconds(sqlite, job_id)] == [1, 2]
