"""The comparison of a teacher and its student, for the job's report, the model card and the command line."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Figures:
    """Figures of one model on the test rows, its size, and its speed in float32 PyTorch without tokenising."""

    base_model: str
    accuracy: float
    f1_macro: float
    parameters: int
    bytes: int
    tweets_per_second: float


@dataclass(frozen=True)
class Distillation:
    """Teacher and student on the same test rows.

    `teacher_model` is a model version. `agreement`, 0 to 1, is the share of the rows for which both predict the same.
    """

    teacher_model: int
    test_rows: int
    device: str
    same_test_rows: bool
    agreement: float
    teacher: Figures
    student: Figures


COLUMNS = ("", "teacher", "student", "student / teacher")


def comparison(report: dict[str, Any]) -> tuple[str, list[tuple[str, str, str, str]]] | None:
    """Return the title and the rows of the table in a job's report, see `COLUMNS`; None for a job without teacher."""
    found = report.get("distillation")
    if found is None:
        return None
    teacher, student = found["teacher"], found["student"]

    def row(name: str, key: str, shown: str, divisor: float = 1) -> tuple[str, str, str, str]:
        one, other = teacher[key] / divisor, student[key] / divisor
        return name, format(one, shown), format(other, shown), f"{other / one:.3f}" if one else ""

    rows = [
        row("Accuracy", "accuracy", ".4f"),
        row("F1 macro", "f1_macro", ".4f"),
        row("Parameters", "parameters", ",.0f"),
        row("Weights on disk, MB", "bytes", ",.1f", 1_000_000),
        row(f"Tweets per second ({found['device']})", "tweets_per_second", ",.0f"),
    ]
    title = (
        f"Teacher (model {found['teacher_model']}) and student on {found['test_rows']:,} test rows; "
        f"they agree on {found['agreement']:.1%}"
    )
    return title, rows
