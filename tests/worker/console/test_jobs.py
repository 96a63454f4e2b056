"""The page Jobs: the queue and the curves over both databases, and jobs that are started, cancelled and retried."""

import subprocess
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import streamlit as st

from db import jobs, registry
from db.labelling import labels
from db.models import EpochMetric, TrainingJob, utc_now
from db.session import Database
from tests.support.console import HOSTILE
from tests.support.console_pages import add_tested_version, buttons, console_of, draw, html, press
from tests.support.job_rows import epoch_metric, submit
from tests.support.rows import tweet_row, url_of, write
from training.reporting.tensorboard import TensorBoardWriter
from worker.console import acting
from worker.console.job import job_queries, starting
from worker.console.job.starting import BOTH, FILE, LABELS, Given, file_name
from worker.errors import BadRequest
from worker.settings import Access

Told = list[tuple[str, bool]]


@pytest.fixture(autouse=True)
def _fresh() -> None:
    st.cache_data.clear()
    st.cache_resource.clear()


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Told:
    """What the page would say next."""
    found: Told = []
    monkeypatch.setattr(acting, "tell", lambda sentence, done=True: found.append((sentence, done)))
    return found


def change(database: Database, job_id: int, **values: Any) -> None:
    with database.begin() as session:
        for name, value in values.items():
            setattr(jobs.get(session, job_id), name, value)


def state(database: Database, job_id: int) -> TrainingJob:
    with database.read() as session:
        return jobs.get(session, job_id)


def add_epochs(database: Database, job_id: int, losses: list[float]) -> None:
    with database.begin() as session:
        for number, loss in enumerate(losses, 1):
            metric: EpochMetric = epoch_metric(job_id, number, train_loss=loss)
            metric.kept = number < 3
            session.add(metric)


def test_jobs_of_every_state_are_shown_with_their_progress(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"epochs": 3, "base_model": "starter"}
    failed, running, queued = (submit(database, name, config=config) for name in ("failed", "running", "queued"))
    report = {"sizes": {"train": 80, "valid": 10, "test": 10}, "notes": [HOSTILE[3]]}
    change(database, failed, state="failed", error=HOSTILE[0], finished_at=utc_now())
    change(database, running, state="running", step=5, total_steps=20, loss=0.5, samples_per_second=20.0,
           data_report=report, attempts=1)  # fmt: skip
    change(database, queued, error="it waits for the disk")
    add_epochs(database, running, [0.9, 0.5, 0.4])
    app = draw("jobs", monkeypatch, database, jobs_chosen=running)
    assert not app.exception
    assert f"Job {running} running, step 5 of 20, loss 0.500, 20 samples/s, 0:00:09 left" in html(app)
    assert f"Job {queued} queued: it waits for the disk" in html(app)
    assert "80 training, 10 validation, 10 test" in html(app)
    assert "<script" not in html(app)
    assert buttons(app)[-1] == "Cancel the job"
    press(app, "Cancel the job")
    assert state(database, running).cancel_requested
    assert f"Job {running} is running, stopping." in html(app)
    assert next(button for button in app.button if button.label == "Cancel the job").disabled

    app.session_state["jobs_chosen"] = failed
    app.run()
    assert "<img" not in html(app)
    assert "&lt;img src=x" in html(app)
    press(app, "Retry the job")
    assert state(database, failed).state == "queued"
    assert f"Job {failed} is queued again; it waits for a worker" in html(app)
    press(app, "Cancel the job")
    assert state(database, failed).state == "cancelled"


def test_without_a_job_the_page_names_the_next_step(sqlite: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    app = draw("jobs", monkeypatch, sqlite)
    assert not app.exception
    assert "There is no job yet. Start one above" in html(app)
    assert buttons(app) == ["Start the job"]


@pytest.mark.parametrize("access", ["look", "label"])
def test_who_may_not_operate_starts_and_stops_nothing(
    access: Access, sqlite: Database, monkeypatch: pytest.MonkeyPatch, told: Told
) -> None:
    job = submit(sqlite)
    app = draw("jobs", monkeypatch, sqlite, access)
    assert not app.exception
    assert buttons(app) == []
    console = console_of(sqlite, access)
    starting.cancel(console, job)
    starting.retry(console, job)
    assert [f"your access is {access!r}" in sentence for sentence, _ in told] == [True, True]
    with pytest.raises(BadRequest, match=f"your access is '{access}'"):
        starting.start(console, Given(FILE, "a.csv", b"label,text\n", "fast", {}))
    assert state(sqlite, job).state == "queued"


def test_a_job_starts_from_an_uploaded_file(database: Database, labelled_csv: Path, told: Told) -> None:
    given = Given(FILE, "../映画.csv", labelled_csv.read_bytes(), "guide", {"epochs": 2})
    job = state(database, starting.start(console_of(database), given))
    assert (job.state, job.config["epochs"], job.config["head"]) == ("queued", 2, "guide")
    assert job.data_report is not None
    assert job.data_report["rows"] == 60
    assert told == [(f"Job {job.id} is queued; it waits for a worker: `tweetscore up`.", True)]


def test_an_error_of_the_input_is_the_sentence_of_the_command_line(
    sqlite: Database, tmp_path: Path, tweetscore: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    rows = "label,text\n" + "positive,嬉しい\n" * 3
    (tmp_path / "rows.csv").write_text(rows)
    refused = tweetscore("train", str(tmp_path / "rows.csv"), DATABASE_URL=url_of(sqlite))
    with pytest.raises(Exception) as page:  # noqa: PT011 - whatever the command line reports
        starting.start(console_of(sqlite), Given(FILE, "rows.csv", rows.encode(), "fast", {}))
    assert refused.returncode == 2
    assert refused.stderr.removeprefix("error: ").strip() == str(page.value)
    with pytest.raises(BadRequest, match="no file is chosen"):
        starting.start(console_of(sqlite), Given(BOTH, None, None, "fast", {}))


def test_a_job_starts_from_labels_of_people_with_and_without_a_file(
    database: Database, labelled_csv: Path, told: Told
) -> None:
    written = datetime(2026, 3, 1, tzinfo=UTC)
    names = ("positive", "negative")
    write(
        database,
        [tweet_row(str(i), topic="映画", text=f"ラベル付き{i}", tweet_created_at=written) for i in range(60)],
        [],
    )
    given = [
        {"tweet_id": str(i), "label": names[i % 2], "annotator": "花子", "source": "review", "at": utc_now()}
        for i in range(60)
    ]
    with database.begin() as session:
        labels.add(session, given)
    console = console_of(database)
    assert (job_queries.labelled(console), job_queries.label_topics(console)) == (60, ["映画"])
    since = starting.since_of(datetime(2026, 3, 1).date())  # noqa: DTZ001 - a day in Japan
    alone = state(database, starting.start(console, Given(LABELS, None, None, "fast", {}, since, "映画")))
    both = Given(BOTH, "rows.csv", labelled_csv.read_bytes(), "fast", {})
    together = state(database, starting.start(console, both))
    assert [(job.data_report or {})["rows"] for job in (alone, together)] == [60, 120]
    with pytest.raises(Exception, match="people labelled no stored tweet of this time and topic"):
        starting.start(console, Given(LABELS, None, None, "fast", {}, since, "雨"))


@pytest.mark.parametrize(
    ("given", "name"),
    [("映画.csv", "映画.csv"), ("../../etc/x.tsv", "x.tsv"), ("c:\\a\\b.csv.gz", "b.csv.gz"), ("..", "upload"),
     ("", "upload"), ("a" * 300 + ".parquet", "upload.parquet"), ("a\nb.csv", "upload.csv")],
)  # fmt: skip
def test_an_upload_keeps_its_name_without_folders(given: str, name: str) -> None:
    assert file_name(given) == name


def test_curves_are_by_step_where_the_run_was_written_and_by_epoch_elsewhere(sqlite: Database) -> None:
    console, job = console_of(sqlite), submit(sqlite)
    add_epochs(sqlite, job, [0.9, 0.6])
    done = job_queries.epochs(console, job)
    counted, losses = job_queries.losses(console, job, done)
    assert (counted, list(losses["x"]), list(losses["loss"])) == ("epoch", [1, 2, 1, 2], [0.9, 0.6, 0.5, 0.5])
    with TensorBoardWriter(console.settings.boards / f"job-{job}") as board:
        for step in range(5):
            board.step(step, 1 / (step + 1), 0.1)
    counted, losses = job_queries.losses(console, job, done)
    assert (counted, list(losses["x"])) == ("optimizer step", [0, 1, 2, 3, 4])
    assert list(losses["loss"]) == pytest.approx([1, 0.5, 0.3333, 0.25, 0.2], abs=1e-3)


def test_the_model_of_a_job_is_found(sqlite: Database) -> None:
    job, version = submit(sqlite), add_tested_version(sqlite, 30)
    with sqlite.begin() as session:
        registry.get(session, version).job_id = job
    assert job_queries.made(console_of(sqlite)) == {job: version}
