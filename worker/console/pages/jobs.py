"""The page Jobs: the queue, running jobs with their curves, and a form that starts one. It changes by itself."""

from typing import Any

import streamlit as st

from db.models import FINISHED_STATES, TrainingJob
from training.evaluation.epoch import quality_names
from worker.console import acting, progress_bar, text
from worker.console.context import Console
from worker.console.job import job_charts, job_queries, starting
from worker.console.queries import JAPAN
from worker.intake.job_progress import pace, task_of

REFRESH_SECONDS = 2.0
TIME = st.column_config.DatetimeColumn(format="YYYY-MM-DD HH:mm", timezone=JAPAN)


def render(console: Console) -> None:
    st.title("Jobs")
    acting.show_told()
    if console.may("operate"):
        with st.expander("Start a job", expanded=not job_queries.recent(console)):
            starting.form(console)
    _changing(console)


@st.fragment(run_every=REFRESH_SECONDS)
def _changing(console: Console) -> None:
    """The part that is drawn again by itself."""
    acting.show_told()
    with acting.showing():
        found = job_queries.recent(console)
        if not found:
            text.hint(
                "There is no job yet. "
                + ("Start one above" if console.may("operate") else "Somebody with the access 'operate' can start one")
                + ", or run `tweetscore train labelled.csv`."
            )
            return
        models = job_queries.made(console)
        _queue(console, [job for job in found if job.state not in FINISHED_STATES])
        st.subheader("All jobs", anchor=False)
        st.dataframe(
            [row(job, models) for job in found], hide_index=True,
            column_config={"submitted (Japan time)": TIME,
                           "job": st.column_config.NumberColumn(format="%d", pinned=True),
                           "loss": st.column_config.NumberColumn(format="%.3f")},
        )  # fmt: skip
        chosen = st.selectbox("One job", [job.id for job in found], format_func=lambda i: f"Job {i}", key="jobs_chosen")
        job = next((job for job in found if job.id == chosen), None) or job_queries.job(console, int(chosen))
        if job is not None:
            _details(console, job, models.get(job.id))


def row(job: TrainingJob, models: dict[int, int]) -> dict[str, Any]:
    return {
        "job": job.id, "kind": job.kind, "state": state_of(job), "model": str(models.get(job.id, "")),
        "steps": f"{job.step:,} of {job.total_steps:,}" if job.total_steps else "", "loss": job.loss,
        "submitted (Japan time)": job.submitted_at, "error": job.error or "",
    }  # fmt: skip


def state_of(job: TrainingJob) -> str:
    return "stopping" if job.state == "running" and job.cancel_requested else job.state


def _queue(console: Console, open_jobs: list[TrainingJob]) -> None:
    """A bar for each job that runs or waits."""
    if not open_jobs:
        text.note("No job runs or waits.")
    for job in reversed(open_jobs):  # the oldest runs first
        said = f"Job {job.id} {state_of(job)}"
        if job.total_steps:
            said += f", step {job.step:,} of {job.total_steps:,}"
        if known := pace(job):
            said += f", {known}"
        if job.error:  # what a queued job waits for
            said += f": {job.error}"
        progress_bar.draw(job.step / job.total_steps if job.total_steps else 0.0, said)


def _details(console: Console, job: TrainingJob, model: int | None) -> None:
    text.facts(
        [
            ("State", state_of(job)), ("Start", job.attempts), ("Base model", job.config.get("base_model")),
            ("Made", f"model {model}" if model is not None else None), ("Rows", _rows(job)),
        ]
    )  # fmt: skip
    if job.error:
        (text.problem if job.state == "failed" else text.warning)(job.error)
    if console.may("operate"):
        with st.container(horizontal=True):
            if job.state not in FINISHED_STATES:
                st.button(
                    "Cancel the job", on_click=starting.cancel, args=(console, job.id), disabled=job.cancel_requested
                )
            if job.state == "failed":
                st.button("Retry the job", on_click=starting.retry, args=(console, job.id))
    for note in (job.data_report or {}).get("notes", ()):
        text.note(f"Note: {note}")
    _curves(console, job)


def _rows(job: TrainingJob) -> str | None:
    """How the rows are split, once they were read."""
    sizes = (job.data_report or {}).get("sizes", {})
    parts = [f"{sizes[part]:,} {name}" for part, name in
             (("train", "training"), ("valid", "validation"), ("test", "test")) if part in sizes]  # fmt: skip
    return ", ".join(parts) or None


def _curves(console: Console, job: TrainingJob) -> None:
    done = job_queries.epochs(console, job.id)
    counted, losses = job_queries.losses(console, job.id, done)
    if losses.empty:
        if job.state not in FINISHED_STATES:
            text.hint("The curves begin with the first steps.")
        return
    st.altair_chart(job_charts.losses(losses, counted), key=f"losses-{job.id}")
    if done.empty:
        return
    accuracy, f1_macro = quality_names(task_of(job))
    st.altair_chart(job_charts.qualities(job_queries.qualities(done, (accuracy, f1_macro))), key=f"quality-{job.id}")
    kept = done.loc[done["kept"].astype(bool), "epoch"].max()
    shown = done.assign(kept=["kept" if epoch == kept else "" for epoch in done["epoch"]])
    number = st.column_config.NumberColumn
    st.dataframe(
        shown, hide_index=True,
        column_config={
            "epoch": number(format="%d"), "train_loss": number("training loss", format="%.4f"),
            "learning_rate": number("learning rate", format="%.2e"),
            "valid_loss": number("validation loss", format="%.4f"), "valid_accuracy": number(accuracy, format="%.4f"),
            "valid_f1_macro": number(f1_macro, format="%.4f"), "seconds": number("seconds", format="%.1f"),
        },
    )  # fmt: skip
