"""Publish the tweets of a file to the stream, or score them directly."""

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from rich.progress import Progress, TaskID, TextColumn, TimeRemainingColumn

from db import registry
from db.errors import NotFound
from db.session import Database
from training.table_file import TableFile, open_table
from worker import show
from worker.app import SCORING, make_app
from worker.doors import FLUSH_TWEETS, nudge, send
from worker.errors import BadRecord
from worker.runtime import open_stream
from worker.settings import Settings
from worker.tweet_file import read_tweets
from worker.tweet_record import Tweet

MAX_FAULTS = 20


@dataclass
class PublishReport:
    """Counts of tweets and of bad lines, with the messages of the first `MAX_FAULTS`."""

    strict: bool = False
    encoding: str = "UTF-8"
    published: int = 0
    seconds: float = 0.0
    bad_count: int = 0
    bad: list[str] = field(default_factory=list)

    def add_fault(self, name: str, number: int, fault: BadRecord) -> None:
        """Count a bad line; raises it as `BadRecord` with `strict`."""
        if self.strict:
            raise BadRecord(f"{name}, line {number}: {fault}; the tweets before it are published")
        self.bad_count += 1
        if len(self.bad) < MAX_FAULTS:
            self.bad.append(f"{name}, line {number}: {fault}")


def publish_file(
    settings: Settings, url: str, file: str, *, quiet: bool, topic: str | None = None, strict: bool = False
) -> PublishReport:
    """Publish the tweets of a file in their order, and nudge the workers after each flush.

    Lines that are not tweets are counted and skipped; with `strict` the first of them raises `BadRecord`. `topic`
    applies to tweets that have none.
    """
    stream, app, report, began = open_stream(settings, url), make_app(settings), PublishReport(strict), time.monotonic()
    with (
        open_table(file) as table,
        show.bar(TextColumn("{task.fields[rate]}"), TimeRemainingColumn()) as progress,
    ):
        progress.disable = quiet
        prints_lines = not (quiet or progress.console.is_terminal)
        report.encoding, logged_at = table.encoding_name, began
        task = progress.add_task("publishing", total=table.size, rate="")
        for flush in batched(_valid_tweets(table, report, topic=topic), FLUSH_TWEETS):
            payloads = [tweet.payload() for tweet in flush]
            send(stream, payloads, settings, lambda status: _show_status(progress, task, status))
            nudge(app, SCORING)
            report.published += len(flush)
            rate = report.published / max(time.monotonic() - began, 1e-9)
            if prints_lines and time.monotonic() - logged_at > show.PROGRESS_SECONDS:
                logged_at = time.monotonic()
                progress.console.print(f"publishing: {report.published:,} tweets, {rate:,.0f} a second")
            progress.update(
                task,
                description="publishing",
                completed=table.position(),
                rate=f"{report.published} tweets, {rate:,.0f}/s",
            )
        progress.update(task, completed=table.size or report.published, total=table.size or report.published)
    report.seconds = time.monotonic() - began
    return report


def _show_status(progress: Progress, task: TaskID, status: str) -> None:
    """Show a status beside the bar; without a terminal print it as a line when it changes."""
    previous = progress.tasks[task].description
    progress.update(task, description=status)
    if not progress.console.is_terminal and not progress.disable and status != previous:
        progress.console.print(status, markup=False)


def score_file(settings: Settings, database: Database, file: str, model_id: int | None, as_lines: bool) -> int:
    """Score the tweets of a file and print the predictions. Returns how many lines are not tweets."""
    from worker.scoring_model import open_model, serving_from

    with database.read() as session:
        wanted = model_id if model_id is not None else registry.assigned(session, registry.CHAMPION)
        if wanted is None:
            raise NotFound("there is no champion yet; train a model and promote it, or name one with --model")
        version = registry.get(session, wanted)
    report = PublishReport()
    with (
        open_table(file) as table,
        show.long_work("scoring", TimeRemainingColumn(), prints=True) as update,
        ExitStack() as stack,
    ):
        model = None
        for window in batched(_valid_tweets(table, report, need_id=False), settings.window_tweets):
            model = model or stack.enter_context(open_model(version, serving_from(settings)))
            scores = model.current().score([tweet.text for tweet in window])
            update(table.position() or 0, table.size)
            if as_lines:
                for tweet, answer in zip(window, scores, strict=True):
                    print(json.dumps({"id": tweet.id, "model_version_id": version.id, **answer}, ensure_ascii=False))
            else:
                rows = [(t.id, s["label"], s["probability"], t.text) for t, s in zip(window, scores, strict=True)]
                show.table(None, ["id", "label", "probability", "text"], rows)
    for fault in report.bad:
        show.errors.print(fault, style="red", markup=False, soft_wrap=True)
    return report.bad_count


def batched(tweets: Iterator[Tweet], size: int) -> Iterator[list[Tweet]]:
    while batch := list(islice(tweets, size)):
        yield batch


def _valid_tweets(table: TableFile, report: PublishReport, **options: Any) -> Iterator[Tweet]:
    for number, tweet in read_tweets(table, **options):
        if isinstance(tweet, Tweet):
            yield tweet
        else:
            report.add_fault(table.name, number, tweet)
