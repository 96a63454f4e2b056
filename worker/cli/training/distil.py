"""`tweetscore distil`: train a small model, the student, to predict as a larger one does, the teacher."""

from typing import Annotated, Any

import typer

from worker.cli.output import Json
from worker.cli.training.submitted import submitted


def distil(
    teacher: Annotated[int, typer.Option(help="Model version to learn from.")],
    student: Annotated[
        str | None,
        typer.Option(help="Encoder: a Hub name, a local folder, or starter; by default TWEETSCORE_BASE_MODEL."),
    ] = None,
    tweets: Annotated[int, typer.Option(min=0, help="Learn from up to this many stored tweets.")] = 10_000,
    dataset: Annotated[
        str | None, typer.Option(help="Labelled rows; by default those that the teacher was trained on.")
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="Divisor of the logits of both in the loss.")] = None,
    preset: Annotated[str | None, typer.Option(help="Set of hyper-parameters: guide or fast.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training rows.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Highest learning rate of the schedule.")] = None,
    labels: Annotated[str | None, typer.Option(help="Allowed labels: a,b or 0=negative,1=positive.")] = None,
    setting: Annotated[
        list[str] | None, typer.Option("--set", help="Any other field: --set dropout=0.1. Repeatable.")
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Show the job's progress until it ends.")] = False,
    json: Json = False,
) -> None:
    """Queue a job that trains a student on the probabilities of a teacher.

    Seed, split and labels are those of the teacher's job, so that neither was trained on the test rows.
    """
    from worker.cli.options import label_map, pairs
    from worker.connections import open_sql
    from worker.intake.submit_distillation import submit_distillation
    from worker.settings import load_settings

    settings = load_settings()
    options: dict[str, Any] = {
        "base_model": student, "unlabelled": tweets, "soft_temperature": temperature, "epochs": epochs,
        "learning_rate": learning_rate, "labels": label_map(labels),
    }  # fmt: skip
    options = {name: value for name, value in options.items() if value is not None} | pairs("--set", setting or [])
    database = open_sql(settings)
    job = submit_distillation(settings, database, teacher, dataset, preset, **options)
    submitted(settings, database, job, wait, json)
