"""Start, cancel and retry jobs from the page Jobs, with the functions that the command line uses."""

import tempfile
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import streamlit as st

from db import jobs
from db.models import utc_now
from training.config import LOSSES, PRESETS
from worker.console import acting, text
from worker.console.context import Console, forget
from worker.console.job import job_queries
from worker.console.queries import JAPAN
from worker.errors import BadRequest
from worker.intake.job_progress import nudge_worker

FILE, LABELS, BOTH = "A file", "Labels of people", "Both"
LONGEST_NAME_BYTES = 200
TYPES = ("csv", "tsv", "parquet", "jsonl", "ndjson", "json", "gz")


@dataclass(frozen=True)
class Given:
    """What the visitor entered. `name` and `content` are of the uploaded file, None without one."""

    source: str
    name: str | None
    content: bytes | None
    preset: str
    options: dict[str, Any]
    since: datetime | None = None
    topic: str | None = None


def form(console: Console) -> None:
    """The form that starts a job. An error of the input is shown below it."""
    source = st.segmented_control("Learn from", (FILE, LABELS, BOTH), default=FILE, key="jobs_source") or FILE
    with st.form("jobs_start", border=False):
        uploaded = None
        if source != LABELS:
            uploaded = st.file_uploader("CSV, TSV, JSON lines or Parquet: a label and a text in each row", type=TYPES)
        since, topic = _which_labels(console) if source != FILE else (None, None)
        with st.container(horizontal=True):
            names = list(PRESETS)
            preset = st.selectbox("Preset", names, index=names.index(console.settings.preset), width=150)
            epochs = st.number_input("Epochs", 1, 1000, None, placeholder="of the preset", width=150)
            task = st.selectbox("Task", list(LOSSES), format_func=lambda name: name.replace("_", " "), width=170)
            base_model = st.text_input("Base model", placeholder=console.settings.base_model, width=280)
        options = {"epochs": epochs, "task": task, "base_model": base_model.strip() or None}
        if st.form_submit_button("Start the job", type="primary"):
            with acting.showing():
                name, content = (uploaded.name, uploaded.getvalue()) if uploaded is not None else (None, None)
                chosen = {option: value for option, value in options.items() if value is not None}
                start(console, Given(source, name, content, preset, chosen, since, topic))
                st.rerun()


def _which_labels(console: Console) -> tuple[datetime | None, str | None]:
    text.note(f"{job_queries.labelled(console):,} tweets have labels of people. What a model proposed is not used.")
    with st.container(horizontal=True):
        day = st.date_input("Tweets since (Japan time)", None, width=220)
        topics = ["", *job_queries.label_topics(console)]
        topic = st.selectbox("Topic", topics, format_func=lambda name: name or "all", width=280)
    return since_of(day), topic or None


def since_of(day: object) -> datetime | None:
    """The start of a day in Japan."""
    return datetime.combine(day, time(), ZoneInfo(JAPAN)).astimezone(UTC) if isinstance(day, date) else None


def start(console: Console, given: Given) -> int:
    """Queue the job and return its id. Raises what `submit_training` and `submit_from_labels` raise."""
    from worker.intake.submit_job import submit_training
    from worker.labelling.train_from_labels import submit_from_labels

    acting.require(console, "operate")
    if given.source != LABELS and given.content is None:
        raise BadRequest("no file is chosen; choose one with a label and a text in each row")
    notes: list[str] = []
    with tempfile.TemporaryDirectory(prefix="tweetscore-") as folder:
        path = None
        if given.source != LABELS and given.content is not None:
            path = Path(folder) / file_name(given.name or "")
            path.write_bytes(given.content)
        if given.source == FILE and path is not None:
            job = submit_training(console.settings, console.database(), path, given.preset, **given.options)
        else:
            queued = submit_from_labels(
                console.settings, console.database(), path, given.preset,
                since=given.since, topic=given.topic, **given.options,
            )  # fmt: skip
            job, notes = queued.job, queued.notes
    forget()
    acting.tell(f"Job {job.id} is queued{nudge_worker(console.settings)}.")
    for note in [*notes, *(job.data_report or {}).get("notes", ())]:
        acting.tell(f"Note: {note}.")
    return job.id


def file_name(given: str) -> str:
    """The name of an upload without folders, so that messages name the file as its owner does."""
    name = Path(given.replace("\\", "/")).name
    usable = name.isprintable() and name.strip(". ") and len(name.encode("utf-8", "replace")) <= LONGEST_NAME_BYTES
    return name if usable else "upload" + "".join(Path(name).suffixes[-2:])[-20:]


def cancel(console: Console, job_id: int) -> None:
    """As `tweetscore jobs cancel`."""
    with acting.telling():
        acting.require(console, "operate")
        with console.database().begin() as session:
            job = jobs.request_cancel(session, job_id)
        acting.tell(f"Job {job.id} is {job.state}" + (", stopping." if job.state == "running" else "."))


def retry(console: Console, job_id: int) -> None:
    """As `tweetscore jobs retry`."""
    with acting.telling():
        acting.require(console, "operate")
        with console.database().begin() as session:
            failed_at = jobs.get(session, job_id).finished_at
            jobs.retry(session, job_id)
        days = console.settings.checkpoint_days
        old = failed_at is not None and failed_at < utc_now() - timedelta(days=days)
        restart = f"; it failed more than {days:g} days ago, so it starts from the beginning" if old else ""
        acting.tell(f"Job {job_id} is queued again{restart}{nudge_worker(console.settings)}.")
