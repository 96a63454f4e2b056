"""Terminal output about jobs: their progress, epochs and results, and the base models that they adapt."""

import time
from collections.abc import Callable
from math import exp
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.table import Table

from worker.cli import output
from worker.intake.job_progress import pace, task_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from db.models import BaseModel, EpochMetric, TrainingJob
    from db.session import Database

POLL_SECONDS = 0.25
COLORS = {"succeeded": "green", "failed": "red", "cancelled": "yellow", "running": "cyan"}


def follow(database: "Database", job_id: int, watch: Callable[[], None] = lambda: None) -> "TrainingJob":
    """Show a job until it ends: a bar and its epochs on a terminal, otherwise one line per epoch. Returns the ended
    job.

    Reads only SQL, so it works on any machine. `watch` is called on every poll.
    """
    from rich.live import Live
    from rich.progress import TextColumn

    from db import jobs
    from db.models import FINISHED_STATES

    printed = 0
    progress = output.bar(TextColumn("{task.fields[text]}"))
    shown = progress.add_task(f"job {job_id} queued", total=None, text="")
    with Live(progress, console=output.console, auto_refresh=False) as live:
        while True:
            with database.read() as session:
                job, done = jobs.get(session, job_id), jobs.epochs(session, job_id)
            progress.update(
                shown,
                description=f"job {job_id} {job.state}",
                total=job.total_steps,
                completed=job.step,
                text=pace(job),
            )
            if output.console.is_terminal:
                shown_epochs = [epochs_shown(done, task_of(job))] if done else []
                live.update(Group(progress, *shown_epochs), refresh=True)
            else:
                for epoch in done[printed:]:
                    output.console.print(f"job {job_id}: {epoch_line(epoch, task_of(job))}")
                printed = len(done)
            if job.state in FINISHED_STATES:
                # The summary shows the epochs. Without a terminal `Live` prints its last content without a newline.
                live.update(progress if output.console.is_terminal else Group(), refresh=True)
                return job
            watch()
            time.sleep(POLL_SECONDS)


def epoch_line(epoch: "EpochMetric", task: str) -> str:
    from training.evaluation.epoch import quality_names

    return (
        f"Epoch: {epoch.epoch}, Loss: {epoch.train_loss:.4f}, lr: {epoch.learning_rate:.3g}, "
        f"Validation {quality_names(task)[0].title()} = {epoch.valid_accuracy:.4f}"
    )


def epochs_shown(epochs: "Sequence[EpochMetric]", task: str) -> Table:
    from training.evaluation.epoch import quality_names

    title = "kept: the last whose validation result does not differ significantly from the best"
    if task == "continuous":
        title = "kept: the one with the lowest mean absolute error on the validation rows"
    kept = next((epoch for epoch in reversed(epochs) if epoch.kept), None)
    return output.as_table(
        f"Epochs ({title})",
        ["epoch", "training loss", "lr", "validation loss", *quality_names(task), "seconds", ""],
        [
            (
                str(e.epoch), f"{e.train_loss:.4f}", f"{e.learning_rate:.2e}", f"{e.valid_loss:.4f}",
                f"{e.valid_accuracy:.4f}", f"{e.valid_f1_macro:.4f}", f"{e.seconds:.1f}", "kept" if e is kept else "",
            )
            for e in epochs
        ],
    )  # fmt: skip


def queued(job: "TrainingJob", hint: str) -> None:
    output.console.print(f"job {job.id} queued{hint}")
    _notes(job.data_report or {})


def _notes(report: dict[str, Any]) -> None:
    for note in report.get("notes", ()):
        output.console.print(f"note: {note}", markup=False, soft_wrap=True)


def job_summary(database: "Database", job: "TrainingJob") -> None:
    """Print a job's epochs and metrics, or why it failed."""
    from db import jobs, registry

    state = f"[{COLORS.get(job.state, 'white')}]{job.state}[/]"
    progress = f", {pace(job)}" if job.state == "running" and pace(job) else ""
    kind = "" if job.kind == "train" else f" ({job.kind})"
    output.console.print(
        f"job {job.id}{kind} {state}, start {job.attempts}, step {job.step} of {job.total_steps or '?'}{progress}"
    )
    if job.data_report and job.kind == "adapt":
        adapt_data(job.data_report)
    elif job.data_report:
        report = job.data_report
        sizes, encoding = report["sizes"], report.get("encoding", "UTF-8")
        read_as = "" if encoding == "UTF-8" else f", read as {encoding}"
        guide = report.get("split") == "guide"
        output.console.print(
            f"data{read_as}: {report['rows']} rows of {report['read']} ({report['duplicates']} duplicates, "
            f"{report['blank']} blank, {report['conflicting']} texts under two labels"
            f"{', kept as in the guide' if guide else ' left out'}); training {sizes['train']}, validation "
            f"{sizes['valid']}, test {sizes['test']}"
        )
        if guide and report["also_in_training"]["test"]:
            output.console.print(
                f"{report['also_in_training']['test']} test rows have a text that is also in the training rows: "
                "the test metrics are too optimistic"
            )
        _notes(report)
    if job.error:
        output.console.print(job.error, style="red", markup=False)
    with database.read() as session:
        done, version = jobs.epochs(session, job.id), registry.of_job(session, job.id)
        figures = registry.metrics(session, version.id) if version else {}
        base = registry.base_model_of_job(session, job.id)
    if done:
        output.console.print(epochs_shown(done, task_of(job)))
    if version:
        output.test_table(version, figures)
        teacher_table(job.data_report or {})
    if base:
        base_table([base])


def adapt_data(report: dict[str, Any]) -> None:
    """Print which tweets a job read to adapt a base model."""
    sizes = report["sizes"]
    output.console.print(
        f"tweets: {report['rows']} different texts of {report['read']} read, {report['duplicates']} copies or blank "
        f"left out; training {sizes['train']}, held out {sizes['valid']}"
    )
    if report["new_head"]:
        output.console.print(
            "the base model has no head for hidden words, so a new one is trained too: the loss before says nothing "
            "about the base model"
        )


def base_table(rows: "Sequence[BaseModel]") -> None:
    """Print adapted base models. The perplexity is the exponential of the loss."""

    def change(before: float, after: float) -> str:
        return f"{before:.4g} to {after:.4g}"

    output.table(
        "Adapted base models, with loss and perplexity of hidden words in held-out tweets before and after",
        ["name", "job", "base model", "tweets", "loss", "perplexity", "created"],
        [
            (f"adapted:{row.id}", row.job_id, row.base_model, row.tweets, change(row.loss_before, row.loss_after),
             change(exp(row.loss_before), exp(row.loss_after)), row.created_at)
            for row in rows
        ],
    )  # fmt: skip


def teacher_table(report: dict[str, Any]) -> None:
    """Print the comparison of teacher and student in a job's report, if it has one."""
    from training.reporting.distillation import COLUMNS, comparison

    if compared := comparison(report):
        output.table(compared[0], COLUMNS, compared[1])
