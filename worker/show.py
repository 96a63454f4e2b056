"""What people see: tables and bars. Takes rows, prints them; decides nothing."""

import json
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from db import jobs, registry
from db.models import FINISHED_STATES, EpochMetric, ModelVersion, TrainingJob
from db.session import Database
from worker.choices import Choice

Json = Annotated[bool, typer.Option("--json", help="One JSON document instead of tables.")]

console = Console(highlight=False)
errors = Console(stderr=True, highlight=False)

POLL_SECONDS = 0.25
COLORS = {"succeeded": "green", "failed": "red", "cancelled": "yellow", "running": "cyan"}


def as_json(value: Any) -> None:
    """One JSON document on standard output; times in ISO-8601."""
    print(json.dumps(value, ensure_ascii=False, default=_plain, indent=2))


def table(title: str | None, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    shown = Table(*columns, title=title, title_justify="left", title_style="bold")
    for row in rows:
        shown.add_row(*("" if value is None else _cell(value) for value in row))
    console.print(shown, markup=False)


def bar(*extra: ProgressColumn) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        *extra,
        TimeRemainingColumn(),
        console=console,
    )


def follow(database: Database, job_id: int, watch: Callable[[], None] = lambda: None) -> TrainingJob:
    """Show a job until it ends: a bar with the loss on a terminal, a line an epoch elsewhere. Returns the ended job."""
    told = 0
    with bar(TextColumn("{task.fields[loss]}")) as progress:
        shown = progress.add_task(f"job {job_id} queued", total=None, loss="")
        while True:
            with database.read() as session:
                job, done = jobs.get(session, job_id), jobs.epochs(session, job_id)
            loss = "" if job.loss is None else f"loss {job.loss:.3f}"
            progress.update(
                shown, description=f"job {job_id} {job.state}", total=job.total_steps, completed=job.step, loss=loss
            )
            if not console.is_terminal:
                for epoch in done[told:]:
                    console.print(f"job {job_id}: {epoch_line(epoch)}")
                told = len(done)
            if job.state in FINISHED_STATES:
                if job.state == "succeeded" and job.total_steps:
                    progress.update(shown, completed=job.total_steps)
                return job
            watch()
            time.sleep(POLL_SECONDS)


def epoch_line(epoch: EpochMetric) -> str:
    return (
        f"Epoch: {epoch.epoch}, Loss: {epoch.train_loss:.4f}, lr: {epoch.learning_rate:.3g}, "
        f"Validation Accuracy = {epoch.valid_accuracy:.4f}"
    )


def epoch_table(epochs: Sequence[EpochMetric]) -> None:
    best = max(epochs, key=lambda epoch: epoch.valid_f1_macro, default=None)
    table(
        "Epochs (the best by validation F1 macro is kept)",
        ["epoch", "training loss", "lr", "validation loss", "accuracy", "F1 macro", "seconds", ""],
        [
            (
                str(e.epoch), f"{e.train_loss:.4f}", f"{e.learning_rate:.2e}", f"{e.valid_loss:.4f}",
                f"{e.valid_accuracy:.4f}", f"{e.valid_f1_macro:.4f}", f"{e.seconds:.1f}", "best" if e is best else "",
            )
            for e in epochs
        ],
    )  # fmt: skip


def engine_table(choice: Choice) -> None:
    """What was tried to score with a model on one machine, the engine that serves first."""
    table(
        f"Engines on {choice.hardware}; {choice.token_budget} tokens a forward",
        ["engine", "tweets/s", "what was found"],
        [
            (trial.engine, trial.tweets_per_second and f"{trial.tweets_per_second:.0f}", trial.says or "not needed")
            for trial in sorted(choice.trials, key=lambda trial: not trial.serves)
        ],
    )


def test_table(version: ModelVersion, figures: dict[tuple[str, str], float]) -> None:
    """Test figures of a model beside the baseline's. Of single labels micro-F1 is accuracy, by definition."""
    rows: list[tuple[str, float | None, float | None, str]] = []
    for metric, name in (("accuracy", "Accuracy"), ("f1_micro", "F1 micro"), ("f1_macro", "F1 macro")):
        rows.append((name, figures.get((metric, "")), figures.get((f"tfidf_{metric}", "")), ""))
    for label in version.labels:
        support = figures.get(("support", label))
        for metric in ("precision", "recall", "f1"):
            rows.append(
                (
                    f"{metric} {label}", figures.get((metric, label)), figures.get((f"tfidf_{metric}", label)),
                    f"{support:.0f}" if support is not None and metric == "precision" else "",
                )
            )  # fmt: skip
    table(
        f"Test rows: model {version.id} ({version.base_model}) beside TF-IDF + logistic regression",
        ["figure", "model", "TF-IDF", "rows"],
        [(n, _figure(ours), _figure(theirs), support) for n, ours, theirs, support in rows],
    )


def job_summary(database: Database, job: TrainingJob) -> None:
    """A job's epochs and figures, or why it failed."""
    state = f"[{COLORS.get(job.state, 'white')}]{job.state}[/]"
    console.print(f"job {job.id} {state}, start {job.attempts}, step {job.step} of {job.total_steps or '?'}")
    if job.data_report:
        report = job.data_report
        sizes = report["sizes"]
        console.print(
            f"data: {report['rows']} rows of {report['read']} ({report['duplicates']} duplicates, {report['blank']} "
            f"blank, {report['conflicting']} texts under two labels left out); training {sizes['train']}, validation "
            f"{sizes['valid']}, test {sizes['test']}"
        )
    if job.error:
        console.print(job.error, style="red", markup=False)
    with database.read() as session:
        done, version = jobs.epochs(session, job.id), registry.of_job(session, job.id)
        figures = registry.metrics(session, version.id) if version else {}
    if done:
        epoch_table(done)
    if version:
        test_table(version, figures)


def fields(row: Any) -> dict[str, Any]:
    """A table row as a dictionary, for `--json`."""
    return {column.name: getattr(row, column.key) for column in row.__table__.columns}


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    if isinstance(value, datetime):
        return value.strftime("%Y-%m-%d %H:%M:%S")
    return str(value)


def _plain(value: Any) -> Any:
    return value.isoformat() if isinstance(value, datetime) else str(value)
