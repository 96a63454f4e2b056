"""What the page Jobs asks the database, and the loss of each step from the run's TensorBoard files."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import streamlit as st

from db.models import TrainingJob
from worker.console.context import Console
from worker.console.model.model_queries import records

if TYPE_CHECKING:
    import pandas as pd

NEWEST = 50
# A sample of this many steps is drawn.
MOST_STEPS = 1_000
COLUMNS = (
    "id", "kind", "state", "step", "total_steps", "loss", "samples_per_second", "attempts", "cancel_requested",
    "submitted_at", "started_at", "finished_at", "error", "dataset", "config", "data_report",
)  # fmt: skip
# Names of the scalars that `training.reporting.tensorboard` writes, and of the lines here.
SCALARS = {"training loss": "training, each step", "validation loss": "validation, after each epoch"}


def recent(console: Console) -> list[TrainingJob]:
    """The newest jobs, unattached to a session."""
    found = console.frame(
        f"SELECT {', '.join(COLUMNS)} FROM training_jobs ORDER BY id DESC LIMIT :top",  # noqa: S608 - names of columns
        {"top": NEWEST},
    )
    return [_job(row) for row in records(found)]


def job(console: Console, job_id: int) -> TrainingJob | None:
    found = console.frame(
        f"SELECT {', '.join(COLUMNS)} FROM training_jobs WHERE id = :job",  # noqa: S608 - names of columns
        {"job": job_id},
    )
    return None if found.empty else _job(records(found)[0])


def _job(row: Mapping[str, Any]) -> TrainingJob:
    import pandas as pd

    values: dict[str, Any] = {
        str(name): value if isinstance(value, dict) or not pd.isna(value) else None for name, value in row.items()
    }
    for name in ("id", "step", "total_steps", "attempts"):
        if values[name] is not None:
            values[name] = int(values[name])
    return TrainingJob(**values)


def made(console: Console) -> dict[int, int]:
    """The model version of each job that made one."""
    found = console.frame("SELECT job_id, id FROM model_versions WHERE job_id IS NOT NULL")
    return {int(row["job_id"]): int(row["id"]) for row in records(found)}


def epochs(console: Console, job_id: int) -> "pd.DataFrame":
    return console.frame(
        """SELECT epoch, train_loss, learning_rate, valid_loss, valid_accuracy, valid_f1_macro, seconds, kept
           FROM epoch_metrics WHERE job_id = :job ORDER BY epoch""",
        {"job": job_id},
    )


def label_topics(console: Console) -> list[str]:
    """Topics of tweets that people labelled."""
    found = console.frame(
        """SELECT DISTINCT t.topic FROM v_labels AS l JOIN tweets AS t ON t.tweet_id = l.tweet_id
           WHERE t.topic IS NOT NULL ORDER BY t.topic LIMIT 300"""
    )
    return [str(topic) for topic in found["topic"]]


def labelled(console: Console) -> int:
    """How many tweets people labelled."""
    return int(console.frame("SELECT count(*) AS n FROM v_labels")["n"].iloc[0])


# --- curves: frames with the columns x, line and loss


def losses(console: Console, job_id: int, by_epoch: "pd.DataFrame") -> tuple[str, "pd.DataFrame"]:
    """What x counts, and the losses: by step if the run's files are on this machine, else by epoch."""
    by_step = _by_step(console.settings.boards / f"job-{job_id}")
    if not by_step.empty:
        return "optimizer step", by_step
    melted = by_epoch.rename(columns={"epoch": "x", "train_loss": "training", "valid_loss": "validation"})
    return "epoch", melted.melt("x", ["training", "validation"], var_name="line", value_name="loss")


def qualities(by_epoch: "pd.DataFrame", names: tuple[str, str]) -> "pd.DataFrame":
    """Columns x, line and value: both validation figures of each epoch."""
    renamed = by_epoch.rename(columns={"epoch": "x", "valid_accuracy": names[0], "valid_f1_macro": names[1]})
    return renamed.melt("x", [*names], var_name="line", value_name="value")


def _by_step(folder: Path) -> "pd.DataFrame":
    import pandas as pd

    rows: list[tuple[int, str, float]] = []
    if folder.is_dir():
        run = _run(str(folder))
        run.Reload()  # reads what was written since
        tags = run.Tags()["scalars"]
        rows = [(e.step, line, e.value) for tag, line in SCALARS.items() if tag in tags for e in run.Scalars(tag)]
    return pd.DataFrame(rows, columns=["x", "line", "loss"])


@st.cache_resource(show_spinner=False, max_entries=20)
def _run(folder: str) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(folder, size_guidance={"scalars": MOST_STEPS, "images": 1, "histograms": 1, "tensors": 1})
