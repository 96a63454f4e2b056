"""Publish the tweets of a file to the stream, or score them in this process."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from db import registry
from db.errors import NotFound
from db.session import Database
from training.data.table_file import TableFile, open_table
from worker.app import SCORING, make_app, nudge
from worker.connections import open_stream
from worker.errors import BadRecord
from worker.intake.publish import FLUSH_TWEETS, send
from worker.intake.tweet_file import read_tweets
from worker.settings import Settings
from worker.stream.tweet_record import Tweet

log = logging.getLogger(__name__)

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
    settings: Settings,
    url: str,
    file: str,
    *,
    topic: str | None = None,
    strict: bool = False,
    on_flush: Callable[[PublishReport, int | None, int | None], None] = lambda report, position, size: None,
    notify: Callable[[str], None] = log.warning,
) -> PublishReport:
    """Publish the tweets of a file in their order, and nudge the workers after each flush.

    Lines that are not tweets are counted and skipped; with `strict` the first of them raises `BadRecord`. `topic`
    applies to tweets that have none. `on_flush` gets the report so far with the position in the file and its size in
    bytes, None where they are unknown; `notify` gets a sentence when publishing has to wait.
    """
    stream, app, report, began = open_stream(settings, url), make_app(settings), PublishReport(strict), time.monotonic()
    with open_table(file) as table:
        report.encoding = table.encoding_name
        for flush in batched(_valid_tweets(table, report, topic=topic), FLUSH_TWEETS):
            send(stream, [tweet.payload() for tweet in flush], settings, notify)
            nudge(app, SCORING)
            report.published += len(flush)
            report.seconds = time.monotonic() - began
            on_flush(report, table.position(), table.size)
    report.seconds = time.monotonic() - began
    return report


@dataclass(frozen=True)
class ScoredTweets:
    """Tweets with their predictions, and the position in the file and its size in bytes, None where unknown."""

    model_version_id: int
    tweets: list[Tweet]
    predictions: list[dict[str, Any]]
    position: int | None
    size: int | None


def score_file(
    settings: Settings, database: Database, file: str, model_id: int | None, report: PublishReport
) -> Iterator[ScoredTweets]:
    """Score the tweets of a file in this process, a window at a time. Bad lines are counted in `report`.

    Raises `NotFound` when no model is named and there is no champion.
    """
    from worker.scoring.scoring_model import open_model, serving_from
    from worker.scoring.window import USUAL_WINDOW_TWEETS

    with database.read() as session:
        wanted = model_id if model_id is not None else registry.assigned(session, registry.CHAMPION)
        if wanted is None:
            raise NotFound("there is no champion yet; train a model and promote it, or name one with --model")
        version = registry.get(session, wanted)
    with open_table(file) as table, ExitStack() as stack:
        model = None
        size = min(settings.window_tweets, USUAL_WINDOW_TWEETS)  # shows progress soon
        for window in batched(_valid_tweets(table, report, need_id=False), size):
            model = model or stack.enter_context(open_model(version, serving_from(settings)))
            predictions = model.current().score([tweet.text for tweet in window])
            yield ScoredTweets(version.id, window, predictions, table.position(), table.size)


def batched(tweets: Iterator[Tweet], size: int) -> Iterator[list[Tweet]]:
    while batch := list(islice(tweets, size)):
        yield batch


def _valid_tweets(table: TableFile, report: PublishReport, **options: Any) -> Iterator[Tweet]:
    for number, tweet in read_tweets(table, **options):
        if isinstance(tweet, Tweet):
            yield tweet
        else:
            report.add_fault(table.name, number, tweet)
