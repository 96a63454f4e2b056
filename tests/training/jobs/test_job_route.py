"""The route of a job, from the queue to a registered model: every way it can end, and what it leaves behind."""

import io
import shutil
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from sqlalchemy import func, select

from db import jobs, registry
from db.errors import LeaseLost
from db.models import ConfusionCell, EpochMetric, ModelVersion, TestMetric, TestPrediction, TrainingJob, utc_now
from db.session import Database
from tests.conftest import PATIENCE_SECONDS, wait_until
from training import failpoint
from training.config import make_config
from training.data.dataset import Dataset, Split
from training.evaluation.epoch import Epoch
from training.evaluation.metrics import model_figures
from training.jobs.context import TrainingContext
from training.jobs.register import register_model
from training.jobs.run import run_next_job
from training.model.artifact import load_artifact, make_reference
from training.reporting.training_result import TrainingResult
from training.store.cache import Cache
from training.store.paths import file_sha256
from training.store.store import Store
from worker.cli import output

NEVER = threading.Event()


@pytest.fixture
def workshop(tmp_path: Path, tiny_encoder: Path) -> TrainingContext:
    cache = Cache(tmp_path / "cache", 1_000_000_000)
    return TrainingContext(
        model_store=Store(tmp_path / "models", cache),
        input_store=Store(tmp_path, cache),
        jobs_folder=tmp_path / "jobs",
        checkpoint_store=None,
        boards_folder=tmp_path / "boards",
        read_roots=(tmp_path, tiny_encoder.parent),
        device="cpu",
        lease_seconds=30,
        max_attempts=3,
    )


@pytest.fixture
def base(tiny_encoder: Path) -> dict[str, Any]:
    """Settings of a job that ends within a second."""
    return {"base_model": str(tiny_encoder), "epochs": 2, "train_batch_size": 8}


def submit(database: Database, dataset: Path, sha256: str | None = None, **settings: Any) -> int:
    config = make_config("fast", **settings).model_dump(mode="json")
    with database.begin() as session:
        return jobs.submit(
            session, request_id=uuid.uuid4().hex, dataset=str(dataset), dataset_sha256=sha256, config=config
        ).id


def job_of(database: Database, job_id: int) -> TrainingJob:
    with database.begin() as session:
        job = jobs.get(session, job_id)
        session.expunge(job)
        return job


def count(database: Database, table: type) -> int:
    with database.begin() as session:
        return session.scalar(select(func.count()).select_from(table)) or 0


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


@contextmanager
def running(database: Database, workshop: TrainingContext, job_id: int, stopping: threading.Event) -> Iterator[None]:
    """A worker in a thread of its own, well into the job; it must have ended by itself when the block does."""
    thread = threading.Thread(target=run_next_job, args=(database, workshop, "here", stopping), daemon=True)
    thread.start()
    try:
        wait_until(lambda: job_of(database, job_id).step > 0)
        yield
        thread.join(timeout=PATIENCE_SECONDS)
        assert not thread.is_alive()
    finally:
        stopping.set()
        thread.join(timeout=PATIENCE_SECONDS)


def test_a_finished_job_has_rows_in_every_table_and_a_whole_artifact(
    database: Database, workshop: TrainingContext, labelled_csv: Path, base: dict[str, Any]
) -> None:
    job_id = submit(database, labelled_csv, file_sha256(labelled_csv), **base)
    assert run_next_job(database, workshop, "here", NEVER) == job_id
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
        folder = Path(version.artifact_url.removeprefix("file://"))
        assert load_artifact(folder, version.sha256).spec.labels == version.labels
    assert left_in(workshop.jobs_folder) == []  # the checkpoints have served
    assert run_next_job(database, workshop, "here", NEVER) is None


def test_a_baseline_that_fails_costs_a_note_that_people_see_and_not_the_model(
    sqlite: Database,
    workshop: TrainingContext,
    labelled_csv: Path,
    base: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(output, "console", Console(file=screen, width=200))
    job_id = submit(sqlite, labelled_csv, **base)
    failpoint.arm("baseline=full~tfidf")
    try:
        run_next_job(sqlite, workshop, "here", NEVER)
    finally:
        failpoint.arm("")
    job = job_of(sqlite, job_id)
    note = "the tfidf baseline failed (MemoryError); its figures are missing"
    assert (job.state, job.data_report["notes"]) == ("succeeded", [note])
    output.job_summary(sqlite, job)
    assert f"note: {note}" in screen.getvalue()
    [artifact] = workshop.model_store.folder.iterdir()
    assert f"Note: {note}." in (artifact / "README.md").read_text(encoding="utf-8")


def test_a_job_of_several_labels_a_row_is_trained_and_registered(
    sqlite: Database, workshop: TrainingContext, tmp_path: Path, base: dict[str, Any]
) -> None:
    path = tmp_path / "several.csv"
    written = ["joy", "anger", "joy|anger", ""]
    path.write_text("label,text\n" + "".join(f"{written[i % 4]},今日のこと{i}\n" for i in range(60)), encoding="utf-8")
    job_id = submit(sqlite, path, **base, task="multi_label")
    run_next_job(sqlite, workshop, "here", NEVER)
    assert (job_of(sqlite, job_id).state, job_of(sqlite, job_id).error) == ("succeeded", None)
    lines = path.read_text(encoding="utf-8").splitlines()
    with sqlite.begin() as session:
        tested = session.scalars(select(TestPrediction)).all()
        assert len(tested) == 6
        for row in tested:
            assert set(row.actual.split("|")) == set(lines[row.row_number - 1].split(",")[0].split("|"))
            assert row.predicted == "|".join(name for name, value in row.probabilities.items() if value >= 0.5)
    assert count(sqlite, ConfusionCell) == 0


def test_the_same_job_twice_has_the_same_validation_losses(
    sqlite: Database, workshop: TrainingContext, labelled_csv: Path, base: dict[str, Any]
) -> None:
    losses = []
    for _ in range(2):
        job_id = submit(sqlite, labelled_csv, **base)
        run_next_job(sqlite, workshop, "here", NEVER)
        with sqlite.begin() as session:
            losses.append([metric.valid_loss for metric in jobs.epochs(session, job_id)])
    assert len(losses[0]) == 2
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


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
    sqlite: Database, workshop: TrainingContext, labelled_csv: Path, base: dict[str, Any], case: str
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
    assert run_next_job(sqlite, workshop, "here", NEVER) == job_id
    job = job_of(sqlite, job_id)
    assert job.state == "failed"
    assert job.error is not None
    assert [fragment for fragment in fragments if fragment not in job.error] == []
    assert "\n" not in job.error
    assert "Error:" not in job.error  # a user's mistake is told in words, not as a Python exception
    assert (count(sqlite, ModelVersion), left_in(workshop.model_store.folder)) == (0, [])
    assert run_next_job(sqlite, workshop, "here", NEVER) is None


def test_a_failed_job_is_recorded_on_every_database(
    database: Database, workshop: TrainingContext, tmp_path: Path
) -> None:
    (tmp_path / "bytes.csv").write_bytes(b"label,text\nx,\x82\n")
    job_id = submit(database, tmp_path / "bytes.csv")
    run_next_job(database, workshop, "here", NEVER)
    job = job_of(database, job_id)
    assert job.state == "failed"
    assert "row 2 of bytes.csv: the row is not UTF-8" in (job.error or "")
    assert job.finished_at is not None


def test_cancelling_a_running_job_ends_it_and_leaves_no_model(
    database: Database, workshop: TrainingContext, labelled_csv: Path, base: dict[str, Any]
) -> None:
    job_id = submit(database, labelled_csv, **{**base, "epochs": 1000})
    with running(database, workshop, job_id, threading.Event()), database.begin() as session:
        jobs.request_cancel(session, job_id)
    job = job_of(database, job_id)
    assert (job.state, job.error) == ("cancelled", None)
    assert job.total_steps is not None
    assert 0 < job.step < job.total_steps
    assert count(database, ModelVersion) == 0
    assert (left_in(workshop.model_store.folder), left_in(workshop.jobs_folder)) == ([], [])


def test_a_worker_that_must_end_gives_the_job_back_and_the_next_goes_on(
    sqlite: Database, workshop: TrainingContext, labelled_csv: Path, base: dict[str, Any]
) -> None:
    job_id = submit(sqlite, labelled_csv, **{**base, "epochs": 1000})
    stopping = threading.Event()
    with running(sqlite, workshop, job_id, stopping):
        wait_until(lambda: count(sqlite, EpochMetric) > 1)
        stopping.set()
    job = job_of(sqlite, job_id)
    assert (job.state, job.attempts, job.lease_owner) == ("queued", 0, None)
    done = epoch_seconds(sqlite, job_id)
    shorten(sqlite, job_id, len(done) + 2)
    assert run_next_job(sqlite, workshop, "there", NEVER) == job_id
    assert job_of(sqlite, job_id).state == "succeeded"
    assert len(epoch_seconds(sqlite, job_id)) == len(done) + 2
    assert epoch_seconds(sqlite, job_id)[: len(done)] == done  # as they were: not one was run again
    assert count(sqlite, ModelVersion) == 1


def epoch_seconds(database: Database, job_id: int) -> list[tuple[int, float]]:
    with database.begin() as session:
        return [(metric.epoch, metric.seconds) for metric in jobs.epochs(session, job_id)]


def shorten(database: Database, job_id: int, epochs: int) -> None:
    with database.begin() as session:
        job = jobs.get(session, job_id)
        job.config = {**job.config, "epochs": epochs}


def claim_again(database: Database, job_id: int) -> None:
    """As when the lease lapsed: another worker holds the job now, under a newer token."""
    with database.begin() as session:
        jobs.get(session, job_id).lease_expires_at = utc_now() - timedelta(seconds=1)
        session.flush()
        assert jobs.claim(session, owner="there", lease_seconds=60, max_attempts=3) is not None


def test_a_trainer_whose_job_was_taken_over_stops_and_leaves_everything_to_the_other(
    database: Database, workshop: TrainingContext, labelled_csv: Path, base: dict[str, Any]
) -> None:
    job_id = submit(database, labelled_csv, **{**base, "epochs": 1000})
    with running(database, workshop, job_id, threading.Event()):
        claim_again(database, job_id)
    job = job_of(database, job_id)
    assert (job.state, job.lease_owner, job.fencing_token, job.error) == ("running", "there", 2, None)
    assert (count(database, ModelVersion), left_in(workshop.model_store.folder)) == (0, [])
    assert left_in(workshop.jobs_folder) == [str(job_id)]  # its checkpoints are the successor's now


def test_a_stale_token_registers_nothing_and_leaves_no_artifact(
    database: Database, workshop: TrainingContext, labelled_csv: Path, tiny_artifact: Any
) -> None:
    job_id = submit(database, labelled_csv)
    with database.begin() as session:
        stale = jobs.claim(session, owner="here", lease_seconds=60, max_attempts=3)
        assert stale is not None
        token = stale.fencing_token
    claim_again(database, job_id)
    loaded = load_artifact(tiny_artifact.folder)
    split = Split(["嬉しい"], np.array([[0, 0, 1]], dtype=np.float32), [2])
    figures = model_figures(split.targets, split.targets, 1.0, loaded.spec.labels, loaded.spec.config)
    outcome = TrainingResult(
        job_id, token, loaded.spec, "labelled.csv", "0" * 64, Dataset(loaded.spec.labels, split, split, split),
        [Epoch(1, 0.1, 1e-3, 0.1, 1.0, 1.0, 0.1)], figures, split.targets,
    )  # fmt: skip
    parts = (loaded.model, loaded.tokenizer, make_reference([[2, 5, 3]], split.targets))
    with pytest.raises(LeaseLost):
        register_model(database, workshop.model_store, *parts, outcome)
    assert left_in(workshop.model_store.folder) == []
    assert [count(database, table) for table in (ModelVersion, TestMetric, TestPrediction)] == [0, 0, 0]
    assert job_of(database, job_id).state == "running"
    register_model(database, workshop.model_store, *parts, replace(outcome, fencing_token=token + 1))
    assert left_in(workshop.model_store.folder) == [f"job-{job_id}-{token + 1}"]
    assert job_of(database, job_id).state == "succeeded"
    with database.begin() as session:
        assert registry.metrics(session, registry.of_job(session, job_id).id) == figures


def test_a_job_whose_checkpoints_are_gone_starts_over_and_shows_no_epoch_twice(
    sqlite: Database, workshop: TrainingContext, labelled_csv: Path, base: dict[str, Any]
) -> None:
    job_id = submit(sqlite, labelled_csv, **{**base, "epochs": 1000})
    stopping = threading.Event()
    with running(sqlite, workshop, job_id, stopping):
        wait_until(lambda: count(sqlite, EpochMetric) > 2)
        stopping.set()
    shutil.rmtree(workshop.jobs_folder)
    shorten(sqlite, job_id, 2)
    assert run_next_job(sqlite, workshop, "here", NEVER) == job_id
    assert [epoch for epoch, _ in epoch_seconds(sqlite, job_id)] == [1, 2]
