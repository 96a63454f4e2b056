"""Terminal output of the command line: tables, progress bars and JSON."""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from worker.engines.engine_choice import Choice

if TYPE_CHECKING:  # not imported at run time, so that `--help` is fast
    from rich.progress import Progress, ProgressColumn

    from db.models import Cascade, Evaluation, ModelVersion
    from training.model.cascade import CascadeSpec
    from worker.maintenance.label_suspects import Suspects

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]

console = Console(highlight=False)
errors = Console(stderr=True, highlight=False)

PROGRESS_SECONDS = 10.0
MAX_LABELS_SHOWN = 30
TEST_METRICS = (
    ("quadratic_kappa", "Quadratic kappa"), ("mean_absolute_error", "Mean absolute error"),
    ("root_mean_squared_error", "Root mean squared error"), ("pearson", "Pearson"), ("spearman", "Spearman"),
    ("accuracy", "Accuracy"), ("f1_micro", "F1 micro"), ("f1_macro", "F1 macro"), ("roc_auc", "ROC-AUC"),
    ("average_precision", "Average precision"), ("log_loss", "Log loss"), ("brier", "Brier"), ("ece", "ECE"),
    ("ece_uncalibrated", "ECE before scaling"),
)  # fmt: skip
# Shown for a model that no job has measured.
NO_TEST_FIGURES = "no test figures"
# One in so many points of a cascade's curve is shown.
CURVE_STEP = 10
# Columns that only workers use.
INTERNAL = {"message", "answer_due_at"}


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
            ("labels", _labels_found(found["labels"])),
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


def suspects(found: "Suspects", limit: int) -> None:
    """Print the first `limit` rows that are probably mislabelled."""
    for note in found.notes:
        line(note)
    if not found.found:
        line(f"none of {found.rows:,} rows of {found.file} is probably mislabelled")
        return
    table(
        f"{len(found.found):,} of {found.rows:,} rows of {found.file} are probably mislabelled"
        + (f"; the first {limit}" if len(found.found) > limit else ""),
        ["row", "given", "suggested", "given p", "suggested p", "text"],
        [(s.row, s.given or "(none)", s.suggested or "(none)", s.given_probability, s.suggested_probability, s.text)
         for s in found.found[:limit]],
    )  # fmt: skip


def _labels_found(labels: dict[str, int]) -> str:
    counts = [f"{label} {count:,}" for label, count in labels.items()]
    more = len(counts) - MAX_LABELS_SHOWN
    return ", ".join(counts[:MAX_LABELS_SHOWN]) + (f" and {more:,} more" if more > 0 else "") or "none"


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


def cascade_table(title: str, spec: "CascadeSpec | Cascade") -> None:
    """Print the threshold of a cascade and its curve, with the chosen point and one in ten of the others."""
    line(title)
    by = "by the lower 5 % bound" if spec.bound == "bootstrap" else "by the estimate"
    line(
        f"threshold {spec.threshold:.4f}: it passes on {spec.planned_share:.1%} of the tweets, to keep {spec.keep:g} "
        f"of the teacher's macro-F1 {by}"
    )
    shown = [point for i, point in enumerate(spec.curve) if i % CURVE_STEP == 0 or point["threshold"] == spec.threshold]
    table(
        f"Thresholds on {spec.rows:,} labelled rows",
        ["threshold", "passed on", "F1 macro", "of the teacher's", "lower 5 % bound", ""],
        [
            (point["threshold"], f"{point['share']:.1%}", point["f1_macro"], point["ratio"], point["ratio_low"],
             "chosen" if point["threshold"] == spec.threshold else "")
            for point in shown
        ],
    )  # fmt: skip


def metric_rows(figures: dict[tuple[str, str], float]) -> list[dict[str, Any]]:
    return [{"metric": metric, "label": label, "value": value} for (metric, label), value in sorted(figures.items())]


def test_table(version: "ModelVersion", figures: dict[tuple[str, str], float]) -> None:
    """Print a model's test metrics and those of the baselines. For single labels micro-F1 equals accuracy."""
    from training.data.columns import VALUE
    from training.evaluation.cross_validation import describe

    continuous = version.labels == [VALUE]
    table(
        f"Test rows: model {version.id} ({version.base_model}), TF-IDF + "
        + ("ridge regression, and the mean" if continuous else "logistic regression, and the majority label"),
        ["metric", "model", "TF-IDF", "mean" if continuous else "majority", ""],
        _test_rows(version, figures),
    )
    if crossed := describe(figures):
        console.print(crossed)


def evaluation_table(version: "ModelVersion", evaluation: "Evaluation", figures: dict[tuple[str, str], float]) -> None:
    """Print the metrics of an evaluation on another file. It has no baselines."""
    table(
        f"{evaluation.dataset}, {evaluation.rows:,} rows: model {version.id} ({version.base_model})",
        ["metric", "model", ""],
        [(name, value, note) for name, value, _, _, note in _test_rows(version, figures)],
    )


def _test_rows(version: "ModelVersion", figures: dict[tuple[str, str], float]) -> list[tuple[str, ...]]:
    """Return metric, value, the values of TF-IDF and of the majority label, and a note."""
    from training.data.columns import VALUE

    rows: list[tuple[str, ...]] = []

    def add(name: str, metric: str, label: str = "", note: str = "") -> None:
        values = (figures.get((f"{of}{metric}", label)) for of in ("", "tfidf_", "majority_"))
        rows.append((name, *map(_figure, values), note))

    for metric, name in TEST_METRICS:
        low, high = figures.get((f"{metric}_low", "")), figures.get((f"{metric}_high", ""))
        if (metric, "") in figures:
            add(name, metric, note="" if low is None or high is None else f"95 %: {low:.3f} to {high:.3f}")
    continuous = version.labels == [VALUE]
    for label in () if continuous else version.labels:
        support = figures.get(("support", label))
        for metric in ("precision", "recall", "f1"):
            rows_of_label = f"{support:.0f} rows" if support is not None and metric == "precision" else ""
            add(f"{metric} {label}", metric, label, rows_of_label)
    return rows


def macro_f1(figures: dict[tuple[str, str], float]) -> str:
    """Return macro-F1 and its interval; empty for figures without macro-F1."""
    f1, low, high = (figures.get((f"f1_macro{end}", "")) for end in ("", "_low", "_high"))
    if f1 is None:
        return ""
    return f"{f1:.3f}" + ("" if low is None or high is None else f" ({low:.3f} to {high:.3f})")


def evaluation_fields(evaluation: "Evaluation", figures: dict[tuple[str, str], float]) -> dict[str, Any]:
    """Return an evaluation with its metrics for `--json`."""
    return {**fields(evaluation), "metrics": metric_rows(figures)}


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
