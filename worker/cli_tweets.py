"""`tweetscore push`, `score` and `rescore`: publish a file of tweets, score one directly, score stored tweets."""

import os
import time
from datetime import UTC, datetime
from typing import Annotated

import typer

from worker import show
from worker.show import Json

NICENESS = 10


def push(
    file: Annotated[
        str, typer.Argument(help="X API pages, JSONL, CSV, TSV or Parquet; a file, .gz or URL; - reads standard input.")
    ],
    topic: Annotated[str | None, typer.Option(help="Topic of tweets that have none.")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first invalid line.")] = False,
    json: Json = False,
) -> None:
    """Publish tweets to the stream.

    Invalid lines are reported and skipped.
    """
    from worker.publish_file import publish_file
    from worker.runtime import broker
    from worker.settings import load_settings

    settings = load_settings()
    with broker(settings, show.aside) as url:
        pushed = publish_file(settings, url, file, quiet=json, topic=topic, strict=strict)
    if json:
        show.as_json(
            {
                "published": pushed.published, "bad_lines": pushed.bad_count, "bad": pushed.bad,
                "encoding": pushed.encoding, "seconds": pushed.seconds,
            }
        )  # fmt: skip
    else:
        rate = pushed.published / max(pushed.seconds, 1e-9)
        read_as = "" if pushed.encoding == "UTF-8" else f", read as {pushed.encoding}"
        show.console.print(
            f"published {pushed.published} tweets in {pushed.seconds:.1f} s ({rate:,.0f} a second){read_as}"
        )
    for fault in pushed.bad:
        show.errors.print(fault, style="red", markup=False, soft_wrap=True)
    if pushed.bad_count:
        show.errors.print(f"{pushed.bad_count} lines are no tweets and were left out", style="red")
        raise typer.Exit(1)


def score(
    file: Annotated[str, typer.Argument(help="As `push` takes it, with or without ids; - reads standard input.")],
    model: Annotated[int | None, typer.Option(help="Model version; by default the champion.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object per line.")] = False,
) -> None:
    """Score tweets in this process, without the queue, and store nothing."""
    from worker.publish_file import score_file
    from worker.runtime import open_sql
    from worker.settings import load_settings

    settings = load_settings()
    if score_file(settings, open_sql(settings), file, model, json):
        raise typer.Exit(1)


def rescore(
    model: Annotated[int, typer.Option(help="Model version.")],
    since: Annotated[
        datetime | None,
        typer.Option(
            formats=["%Y-%m-%d", "%Y-%m-%dT%H:%M:%S", "%Y-%m-%dT%H:%M:%SZ"], help="Only tweets from this time on, UTC."
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Score stored tweets with a model, newest first.

    Tweets that the model has scored are left out, so an interrupted run can be started again.
    """
    from rich.progress import MofNCompleteColumn, TextColumn, TimeRemainingColumn

    from worker.backfill import rescore as backfill
    from worker.runtime import depth_reader, open_sql
    from worker.settings import load_settings

    settings = load_settings()
    database = open_sql(settings)
    os.nice(NICENESS)  # for whoever scores new tweets on this machine
    began = time.monotonic()
    columns = (MofNCompleteColumn(), TextColumn("{task.fields[text]}"), TimeRemainingColumn())
    with show.long_work(f"model {model}", *columns) as tell:

        def progress(done: int, total: int, waiting: bool) -> None:
            tell(done, total, f"{done:,} of {total:,}, new tweets first" if waiting else "")

        scored = backfill(
            database, settings, model, since and since.replace(tzinfo=UTC), depth_reader(settings), progress
        )
    seconds = time.monotonic() - began
    if json:
        show.as_json({"model_version_id": model, "scored": scored, "seconds": seconds})
    else:
        show.console.print(f"scored {scored} stored tweets with model {model} in {seconds:.1f} s")
