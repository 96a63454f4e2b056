"""`tweetscore push`, `score` and `rescore`: publish a file of tweets, score one directly, score stored tweets."""

import json as jsonlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer

from worker.cli import output
from worker.cli.output import Json

if TYPE_CHECKING:
    from worker.intake.publish_file import PublishReport

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
    from worker.connections import broker
    from worker.intake.publish_file import publish_file
    from worker.settings import load_settings

    settings = load_settings()
    with broker(settings, output.aside) as url, _publishing_progress(quiet=json) as (on_flush, notify):
        pushed = publish_file(settings, url, file, topic=topic, strict=strict, on_flush=on_flush, notify=notify)
    if json:
        output.as_json(
            {
                "published": pushed.published, "bad_lines": pushed.bad_count, "bad": pushed.bad,
                "encoding": pushed.encoding, "seconds": pushed.seconds,
            }
        )  # fmt: skip
    else:
        rate = pushed.published / max(pushed.seconds, 1e-9)
        read_as = "" if pushed.encoding == "UTF-8" else f", read as {pushed.encoding}"
        output.console.print(
            f"published {pushed.published} tweets in {pushed.seconds:.1f} s ({rate:,.0f} per second){read_as}"
        )
    for fault in pushed.bad:
        output.errors.print(fault, style="red", markup=False, soft_wrap=True)
    if pushed.bad_count:
        output.errors.print(f"{pushed.bad_count} lines are not tweets and were skipped", style="red")
        raise typer.Exit(1)


def score(
    file: Annotated[str, typer.Argument(help="The formats of `push`; ids are optional; - reads standard input.")],
    model: Annotated[int | None, typer.Option(help="Model version; by default the champion.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object per line.")] = False,
) -> None:
    """Score tweets in this process, without the queue, and store nothing."""
    from rich.progress import TimeRemainingColumn

    from worker.connections import open_sql
    from worker.intake.publish_file import PublishReport, score_file
    from worker.settings import load_settings

    settings = load_settings()
    report = PublishReport()
    with output.long_work("scoring", TimeRemainingColumn(), prints=True) as update:
        for scored in score_file(settings, open_sql(settings), file, model, report):
            update(scored.position or 0, scored.size)
            pairs = list(zip(scored.tweets, scored.predictions, strict=True))
            if json:
                for tweet, found in pairs:
                    line = {"id": tweet.id, "model_version_id": scored.model_version_id, **found}
                    print(jsonlib.dumps(line, ensure_ascii=False))
            else:
                rows = [(tweet.id, found["label"], found["probability"], tweet.text) for tweet, found in pairs]
                output.table(None, ["id", "label", "probability", "text"], rows)
    for fault in report.bad:
        output.errors.print(fault, style="red", markup=False, soft_wrap=True)
    if report.bad_count:
        raise typer.Exit(1)


@contextmanager
def _publishing_progress(quiet: bool) -> Iterator[tuple[Callable[..., None], Callable[[str], None]]]:
    """Show a bar while a file is published, or without a terminal a line every ten seconds.

    Yields the callbacks `on_flush` and `notify` of `publish_file`.
    """
    from rich.progress import TextColumn, TimeRemainingColumn

    if quiet:
        yield lambda report, position, size: None, lambda status: None
        return
    with output.bar(TextColumn("{task.fields[rate]}"), TimeRemainingColumn()) as progress:
        printed_at, status_shown = time.monotonic(), ""
        task = progress.add_task("publishing", total=None, rate="")

        def on_flush(report: "PublishReport", position: int | None, size: int | None) -> None:
            nonlocal printed_at
            rate = report.published / max(report.seconds, 1e-9)
            if not progress.console.is_terminal and time.monotonic() - printed_at > output.PROGRESS_SECONDS:
                printed_at = time.monotonic()
                progress.console.print(f"publishing: {report.published:,} tweets, {rate:,.0f} per second")
            text = f"{report.published} tweets, {rate:,.0f}/s"
            progress.update(task, description="publishing", completed=position, total=size, rate=text)

        def notify(status: str) -> None:
            nonlocal status_shown
            progress.update(task, description=status)
            if not progress.console.is_terminal and status != status_shown:
                status_shown = status
                progress.console.print(status, markup=False)

        yield on_flush, notify
        known = progress.tasks[task].total or 1
        progress.update(task, completed=known, total=known)


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

    Tweets that the model has scored already are skipped, so an interrupted run can be repeated.
    """
    from rich.progress import MofNCompleteColumn, TextColumn, TimeRemainingColumn

    from worker.connections import depth_reader, open_sql
    from worker.scoring.backfill import rescore as backfill
    from worker.settings import load_settings

    settings = load_settings()
    database = open_sql(settings)
    os.nice(NICENESS)  # new tweets have priority on this machine
    began = time.monotonic()
    columns = (MofNCompleteColumn(), TextColumn("{task.fields[text]}"), TimeRemainingColumn())
    with output.long_work(f"model {model}", *columns) as update:

        def progress(done: int, total: int, waiting: bool) -> None:
            update(done, total, f"{done:,} of {total:,}, waiting for new tweets" if waiting else "")

        scored = backfill(
            database, settings, model, since and since.replace(tzinfo=UTC), depth_reader(settings), progress
        )
    seconds = time.monotonic() - began
    if json:
        output.as_json({"model_version_id": model, "scored": scored, "seconds": seconds})
    else:
        output.console.print(f"scored {scored} stored tweets with model {model} in {seconds:.1f} s")
