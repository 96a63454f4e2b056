"""`tweetscore train`: queue a fine-tuning job on labelled rows of a file, on labels of stored tweets, or on both."""

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from worker.cli import output
from worker.cli.data import DAYS
from worker.cli.output import Json
from worker.cli.training.submitted import submitted
from worker.errors import BadRequest

if TYPE_CHECKING:
    from db.models import TrainingJob
    from db.session import Database
    from worker.settings import Settings

TASK = "single_label, multi_label (labels joined by |), ordinal (ordered levels) or continuous (numbers)."


def train(
    dataset: Annotated[
        str | None, typer.Argument(help="CSV, TSV, JSONL or Parquet: a label and a text in each row.")
    ] = None,
    from_labels: Annotated[
        bool, typer.Option("--from-labels", help="Train on stored tweets that people labelled, besides a file's rows.")
    ] = False,
    since: Annotated[
        datetime | None, typer.Option(formats=DAYS, help="With --from-labels: only tweets from this time on, UTC.")
    ] = None,
    topic: Annotated[str | None, typer.Option(help="With --from-labels: only tweets of this topic.")] = None,
    preset: Annotated[str | None, typer.Option(help="Set of hyper-parameters: guide or fast.")] = None,
    base_model: Annotated[
        str | None, typer.Option(help="Encoder: a Hub name, a local folder, starter, or adapted:ID.")
    ] = None,
    base_revision: Annotated[str | None, typer.Option(help="Commit of the Hub repository.")] = None,
    task: Annotated[str | None, typer.Option(help=TASK)] = None,
    labels: Annotated[str | None, typer.Option(help="Allowed labels: a,b or 0=negative,1=positive.")] = None,
    polarity: Annotated[str | None, typer.Option(help="Score of each label from -1 to 1: good=1,bad=-1.")] = None,
    head: Annotated[str | None, typer.Option(help="Classification head: guide or linear.")] = None,
    pooling: Annotated[str | None, typer.Option(help="Vector of a text: pooler, mean or cls.")] = None,
    loss: Annotated[str | None, typer.Option(help="Loss function: bce, cross_entropy or mse.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training rows.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Highest learning rate of the schedule.")] = None,
    train_batch_size: Annotated[int | None, typer.Option(help="Rows of one training step.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Cut each text to this many tokens.")] = None,
    split: Annotated[str | None, typer.Option(help="How rows are split: stratified or guide.")] = None,
    folds: Annotated[int | None, typer.Option(help="First cross-validate with so many folds: 2 to 20.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the random numbers.")] = None,
    unlabelled: Annotated[int | None, typer.Option(help="Also learn from up to this many stored tweets.")] = None,
    setting: Annotated[
        list[str] | None, typer.Option("--set", help="Any other field: --set dropout=0.1. Repeatable.")
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Show the job's progress until it ends.")] = False,
    json: Json = False,
) -> None:
    """Queue a fine-tuning job.

    With --wait, a worker is started for it unless `tweetscore up` runs.
    """
    from worker.cli.options import label_map, numbers, pairs
    from worker.connections import open_sql
    from worker.settings import load_settings

    settings = load_settings()
    options: dict[str, Any] = {
        "base_model": base_model, "base_revision": base_revision, "task": task, "head": head, "pooling": pooling,
        "loss": loss, "epochs": epochs, "learning_rate": learning_rate, "train_batch_size": train_batch_size,
        "max_length": max_length, "split": split, "folds": folds, "seed": seed, "unlabelled": unlabelled,
        "labels": label_map(labels), "polarity": numbers("polarity", polarity),
    }  # fmt: skip
    options = {name: value for name, value in options.items() if value is not None} | pairs("--set", setting or [])
    selected = {"since": since and since.replace(tzinfo=UTC), "topic": topic} if from_labels else None
    if selected is None and (since or topic is not None):
        raise BadRequest("--since and --topic select labelled tweets; give --from-labels with them")
    database = open_sql(settings)
    submitted(settings, database, _submit(settings, database, dataset, preset, options, selected), wait, json)


def _submit(
    settings: "Settings",
    database: "Database",
    dataset: str | None,
    preset: str | None,
    options: dict[str, Any],
    selected: dict[str, Any] | None,
) -> "TrainingJob":
    """Queue a job on a file or, with `selected`, on labelled tweets and the rows of a file if there is one."""
    if selected is None:
        from worker.intake.submit_job import submit_training

        if dataset is None:
            raise BadRequest("there is nothing to train on; name a file of labelled rows, or give --from-labels")
        return submit_training(settings, database, dataset, preset, **options)
    from worker.labelling.train_from_labels import submit_from_labels

    queued = submit_from_labels(settings, database, dataset, preset, **selected, **options)
    output.aside(f"{queued.tweets:,} labelled tweets" + (f" and the rows of {dataset}" if dataset else ""))
    for note in queued.notes:
        output.aside(f"note: {note}")
    return queued.job
