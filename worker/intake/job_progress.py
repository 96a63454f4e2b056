"""How far a job is, and a nudge of the workers that run jobs: the same for the command line and the console."""

from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from db.models import TrainingJob
    from worker.settings import Settings

WAITS_FOR_WORKER = "; it waits for a worker: `tweetscore up`"


def nudge_worker(settings: "Settings") -> str:
    """Nudge a training worker. Returns the end of a sentence when none can be reached, else nothing."""
    from worker.app import TRAINING, client_app, nudge
    from worker.stream import embedded_valkey

    no_server = settings.embedded and embedded_valkey.owner(settings.home) is None
    nudged = not no_server and nudge(client_app(settings), TRAINING)
    return "" if nudged else WAITS_FOR_WORKER


def pace(job: "TrainingJob") -> str:
    """Return loss, samples per second and time left, as far as they are known."""
    parts = [] if job.loss is None else [f"loss {job.loss:.3f}"]
    if job.state == "running" and job.samples_per_second and job.total_steps and job.data_report:
        parts.append(f"{job.samples_per_second:.0f} samples/s")
        left = _rows_to_train(job) * (1 - job.step / job.total_steps)
        parts.append(f"{timedelta(seconds=round(left / job.samples_per_second))} left")
    return ", ".join(parts)


def task_of(job: "TrainingJob") -> str:
    task: str = job.config.get("task", "single_label")
    return task


def _rows_to_train(job: "TrainingJob") -> float:
    """Return the rows that a job trains on in all, each counted as often as it is used."""
    report = job.data_report or {}
    learned: float = report.get("sample_row_passes", 0)
    if passes := report.get("row_passes"):
        return learned + float(passes)
    sizes, folds = report["sizes"], job.config.get("folds")
    rows: float = sizes["train"]
    if folds:  # each row is used in all folds but one, there too for training or for validation
        rows += (folds - 1) * sum(sizes.values()) * sizes["train"] / (sizes["train"] + sizes["valid"])
    return learned + rows * int(report.get("epochs", job.config["epochs"]))
