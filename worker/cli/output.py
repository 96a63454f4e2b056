"""Terminal output of the command line: tables, progress bars and JSON."""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from worker.scoring.engine_choice import Choice

if TYPE_CHECKING:  # not imported at run time, so that `--help` is fast
    from rich.progress import Progress, ProgressColumn

    from db.models import EpochMetric, ModelVersion, TrainingJob
    from db.session import Database

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]

console = Console(highlight=False)
errors = Console(stderr=True, highlight=False)

POLL_SECONDS = 0.25
PROGRESS_SECONDS = 10.0
MODEL_METRICS = (
    ("roc_auc", "ROC-AUC"), ("average_precision", "Average precision"), ("log_loss", "Log loss"), ("brier", "Brier"),
    ("ece", "ECE"), ("ece_uncalibrated", "ECE before scaling"),
)  # fmt: skip
# Columns that only workers use.
INTERNAL = {"message", "answer_due_at"}
COLORS = {"succeeded": "green", "failed": "red", "cancelled": "yellow", "running": "cyan"}


def line(text: str) -> None:
    console.print(text, markup=False, soft_wrap=True)


def aside(text: str) -> None:
    """Print a line to standard error, so that standard output holds only the result."""
    errors.print(text, markup=False, soft_wrap=True)


def as_json(value: Any) -> None:
    """Print one JSON document. Times are in ISO-8601."""
    print(json.dumps(value, ensure_ascii=False, default=_plain, indent=2))


def table(title: str | None, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    console.print(as_table(title, columns, rows))


def compact_table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print a table without borders and with one line per row: text that does not fit is cut off."""
    result = Table(*columns, box=None, pad_edge=False, header_style="bold")
    for row in rows:
        cells = (" ".join(("" if value is None else _cell(value)).split()) for value in row)
        result.add_row(*(Text(cell, no_wrap=True, overflow="ellipsis") for cell in cells))
    console.print(result)


def as_table(title: str | None, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> Table:
    result = Table(*columns, title=title, title_justify="left", title_style="bold")
    for row in rows:
        result.add_row(*(Text("" if value is None else _cell(value)) for value in row))
    return result


def bar(*columns: "ProgressColumn", on: Console | None = None) -> "Progress":
    """Return a progress bar with its percentage, then `columns`; by default the estimated time left."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    last = columns or (TimeRemainingColumn(),)
    return Progress(
        TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), *last, console=on or console,
        # Do not redirect standard output to a bar that is on standard error.
        redirect_stdout=on is None, redirect_stderr=on is None,
    )  # fmt: skip


@contextmanager
def long_work(what: str, *columns: "ProgressColumn", prints: bool = False) -> Iterator[Callable[..., None]]:
    """Show progress on standard error: a bar on a terminal, otherwise a line every ten seconds.

    Yields a function that takes (done, total or None, text). With `prints` the work writes to standard output itself,
    so no bar is shown when that is a terminal.
    """
    progress, printed_at = bar(*columns, on=errors), time.monotonic()
    shown = progress.add_task(what, total=None, text="")

    def update(done: int, total: int | None, text: str = "") -> None:
        nonlocal printed_at
        progress.update(shown, completed=done, total=total, text=text)
        if not errors.is_terminal and time.monotonic() - printed_at > PROGRESS_SECONDS:
            printed_at = time.monotonic()
            of = f" of {total:,}" if total else ""
            errors.print(f"{what}: {text or f'{done:,}{of}'}", markup=False)

    progress.disable = not errors.is_terminal or (prints and console.is_terminal)
    with progress:
        yield update


def findings(found: dict[str, Any]) -> None:
    """Print the findings of `data check`."""
    tokens = found["tokens"]
    table(
        f"{found['file']}: {found['format']}, {found['encoding']}",
        ["property", "value"],
        [
            ("columns", ", ".join(found["columns"]) or "none"),
            ("rows", f"{found['rows']:,}, and {found['bad_lines']:,} lines that cannot be read"),
            ("labels", ", ".join(f"{label} {count:,}" for label, count in found["labels"].items()) or "none"),
            ("duplicates", f"{found['duplicates']:,} texts, {found['repeated_ids']:,} ids"),
            ("under two labels", f"{found['conflicting']:,}"),
            (
                f"tokens ({tokens['base_model']})",
                f"mean {tokens['mean']:.1f}, median {tokens['median']:.0f}, p99 {tokens['p99']:.0f}, longest "
                f"{tokens['longest']}; {tokens['truncated']:,} cut at {tokens['max_length']}",
            ),
        ],
    )
    most = max(tokens["histogram"].values()) or 1
    table(
        "Texts by tokens",
        ["tokens", "texts", ""],
        [(name, f"{n:,}", "█" * round(40 * n / most)) for name, n in tokens["histogram"].items()],
    )
    for line in (*found["bad"], *(f"- {advice}" for advice in found["advice"])):
        console.print(line, markup=False, soft_wrap=True)


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
    progress = bar(TextColumn("{task.fields[text]}"))
    shown = progress.add_task(f"job {job_id} queued", total=None, text="")
    with Live(progress, console=console, auto_refresh=False) as live:
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
            if console.is_terminal:
                live.update(Group(progress, *([epochs_shown(done)] if done else [])), refresh=True)
            else:
                for epoch in done[printed:]:
                    console.print(f"job {job_id}: {epoch_line(epoch)}")
                printed = len(done)
            if job.state in FINISHED_STATES:
                # The summary shows the epochs. Without a terminal `Live` prints its last content without a newline.
                live.update(progress if console.is_terminal else Group(), refresh=True)
                return job
            watch()
            time.sleep(POLL_SECONDS)


def pace(job: "TrainingJob") -> str:
    """Return loss, samples per second and time left, as far as they are known."""
    parts = [] if job.loss is None else [f"loss {job.loss:.3f}"]
    if job.state == "running" and job.samples_per_second and job.total_steps and job.data_report:
        parts.append(f"{job.samples_per_second:.0f} samples/s")
        rows = job.data_report.get("row_passes") or job.config["epochs"] * job.data_report["sizes"]["train"]
        left = rows * (1 - job.step / job.total_steps)
        parts.append(f"{timedelta(seconds=round(left / job.samples_per_second))} left")
    return ", ".join(parts)


def epoch_line(epoch: "EpochMetric") -> str:
    return (
        f"Epoch: {epoch.epoch}, Loss: {epoch.train_loss:.4f}, lr: {epoch.learning_rate:.3g}, "
        f"Validation Accuracy = {epoch.valid_accuracy:.4f}"
    )


def epochs_shown(epochs: "Sequence[EpochMetric]") -> Table:
    kept = next((epoch for epoch in reversed(epochs) if epoch.kept), None)
    return as_table(
        "Epochs (kept: the last whose validation result does not differ significantly from the best)",
        ["epoch", "training loss", "lr", "validation loss", "accuracy", "F1 macro", "seconds", ""],
        [
            (
                str(e.epoch), f"{e.train_loss:.4f}", f"{e.learning_rate:.2e}", f"{e.valid_loss:.4f}",
                f"{e.valid_accuracy:.4f}", f"{e.valid_f1_macro:.4f}", f"{e.seconds:.1f}", "kept" if e is kept else "",
            )
            for e in epochs
        ],
    )  # fmt: skip


def engine_table(choice: Choice) -> None:
    """Print the engines that were tried for a model on one machine; the selected one comes first."""
    table(
        f"Engines on {choice.hardware}; {choice.token_budget} tokens per forward pass",
        ["engine", "tweets/s", "finding"],
        [
            (trial.engine, trial.tweets_per_second and f"{trial.tweets_per_second:.0f}", trial.verdict or "not needed")
            for trial in sorted(choice.trials, key=lambda trial: not trial.serves)
        ],
    )


def metric_rows(figures: dict[tuple[str, str], float]) -> list[dict[str, Any]]:
    return [{"metric": metric, "label": label, "value": value} for (metric, label), value in sorted(figures.items())]


def test_table(version: "ModelVersion", figures: dict[tuple[str, str], float]) -> None:
    """Print a model's test metrics and those of the baselines. For single labels micro-F1 equals accuracy."""
    rows: list[tuple[str, ...]] = []

    def add(name: str, metric: str, label: str = "", note: str = "") -> None:
        values = (figures.get((f"{of}{metric}", label)) for of in ("", "tfidf_", "majority_"))
        rows.append((name, *map(_figure, values), note))

    for metric, name in (("accuracy", "Accuracy"), ("f1_micro", "F1 micro"), ("f1_macro", "F1 macro")):
        low, high = figures.get((f"{metric}_low", "")), figures.get((f"{metric}_high", ""))
        add(name, metric, note="" if low is None or high is None else f"95 %: {low:.3f} to {high:.3f}")
    for metric, name in MODEL_METRICS:
        if (metric, "") in figures:
            add(name, metric)
    for label in version.labels:
        support = figures.get(("support", label))
        for metric in ("precision", "recall", "f1"):
            rows_of_label = f"{support:.0f} rows" if support is not None and metric == "precision" else ""
            add(f"{metric} {label}", metric, label, rows_of_label)
    table(
        f"Test rows: model {version.id} ({version.base_model}), TF-IDF + logistic regression, and the majority label",
        ["metric", "model", "TF-IDF", "majority", ""],
        rows,
    )


def job_summary(database: "Database", job: "TrainingJob") -> None:
    """Print a job's epochs and metrics, or why it failed."""
    from db import jobs, registry

    state = f"[{COLORS.get(job.state, 'white')}]{job.state}[/]"
    progress = f", {pace(job)}" if job.state == "running" and pace(job) else ""
    console.print(f"job {job.id} {state}, start {job.attempts}, step {job.step} of {job.total_steps or '?'}{progress}")
    if job.data_report:
        report = job.data_report
        sizes, encoding = report["sizes"], report.get("encoding", "UTF-8")
        read_as = "" if encoding == "UTF-8" else f", read as {encoding}"
        guide = report.get("split") == "guide"
        console.print(
            f"data{read_as}: {report['rows']} rows of {report['read']} ({report['duplicates']} duplicates, "
            f"{report['blank']} blank, {report['conflicting']} texts under two labels"
            f"{', kept as in the guide' if guide else ' left out'}); training {sizes['train']}, validation "
            f"{sizes['valid']}, test {sizes['test']}"
        )
        if guide and report["also_in_training"]["test"]:
            console.print(
                f"{report['also_in_training']['test']} test rows have a text that is also in the training rows: "
                "the test metrics are too optimistic"
            )
        for note in report.get("notes", ()):
            console.print(f"note: {note}", markup=False)
    if job.error:
        console.print(job.error, style="red", markup=False)
    with database.read() as session:
        done, version = jobs.epochs(session, job.id), registry.of_job(session, job.id)
        figures = registry.metrics(session, version.id) if version else {}
    if done:
        console.print(epochs_shown(done))
    if version:
        test_table(version, figures)
        teacher_table(job.data_report or {})


def teacher_table(report: dict[str, Any]) -> None:
    """Print the comparison of teacher and student in a job's report, if it has one."""
    from training.reporting.distillation import COLUMNS, comparison

    if compared := comparison(report):
        table(compared[0], COLUMNS, compared[1])


def fields(row: Any) -> dict[str, Any]:
    """Return a table row as a dictionary for `--json`, without the columns in `INTERNAL`."""
    return {column.name: getattr(row, column.key) for column in row.__table__.columns if column.name not in INTERNAL}


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
