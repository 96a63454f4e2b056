"""`tweetscore adapt`: adapt a base model to stored tweets."""

from typing import Annotated, Any

import typer

from worker.cli.output import Json
from worker.cli.training.submitted import submitted


def adapt(
    base_model: Annotated[
        str | None, typer.Option(help="Encoder: a Hub name, a local folder, starter, or adapted:ID.")
    ] = None,
    base_revision: Annotated[str | None, typer.Option(help="Commit of the Hub repository.")] = None,
    tweets: Annotated[int | None, typer.Option(help="Different texts at most, the newest first.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the texts.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Highest learning rate of the schedule.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Cut each text to this many tokens.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the random numbers.")] = None,
    setting: Annotated[
        list[str] | None, typer.Option("--set", help="Any other field: --set mask_share=0.2. Repeatable.")
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Show the job's progress until it ends.")] = False,
    json: Json = False,
) -> None:
    """Queue a job that adapts a base model to the stored tweets.

    No labels are needed. `train --base-model adapted:ID` then fine-tunes the result.
    """
    from worker.cli.options import pairs
    from worker.connections import open_sql
    from worker.intake.submit_job import submit_adapt
    from worker.settings import load_settings

    settings = load_settings()
    options: dict[str, Any] = {
        "base_model": base_model, "base_revision": base_revision, "tweets": tweets, "epochs": epochs,
        "learning_rate": learning_rate, "max_length": max_length, "seed": seed,
    }  # fmt: skip
    options = {name: value for name, value in options.items() if value is not None} | pairs("--set", setting or [])
    database = open_sql(settings)
    submitted(settings, database, submit_adapt(settings, database, **options), wait, json)
