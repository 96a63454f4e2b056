"""Files of tweets: published to the stream, or scored here and now."""

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
from training.sources import Source, open_source
from worker import show
from worker.app import SCORING, make_app
from worker.doors import FLUSH_TWEETS, nudge, send
from worker.errors import BadRecord
from worker.records import Tweet
from worker.runtime import open_stream
from worker.settings import Settings
from worker.tweetfiles import read_tweets

FAULTS_NAMED = 20


@dataclass
class Pushed:
    """What became of a file. `note` keeps the first faults in words and counts all; with `strict` it raises them."""

    strict: bool = False
    encoding: str = "UTF-8"
    published: int = 0
    seconds: float = 0.0
    bad_count: int = 0
    bad: list[str] = field(default_factory=list)

    def note(self, name: str, number: int, fault: BadRecord) -> None:
        if self.strict:
            raise BadRecord(f"{name}, line {number}: {fault}; what stood before it is published")
        self.bad_count += 1
        if len(self.bad) < FAULTS_NAMED:
            self.bad.append(f"{name}, line {number}: {fault}")


def push_file(
    settings: Settings, url: str, file: str, *, quiet: bool, topic: str | None = None, strict: bool = False
) -> Pushed:
    """Publish every tweet of a file in its order, with a nudge after each flush.

    Lines that are no tweets are noted and left out; with `strict` the first of them raises `BadRecord`. `topic` is for
    tweets that have none.
    """
    stream, app, pushed, began = open_stream(settings, url), make_app(settings), Pushed(strict), time.monotonic()
    with (
        open_source(file) as source,
        show.bar(TextColumn("{task.fields[rate]}"), TimeRemainingColumn()) as progress,
    ):
        progress.disable = quiet
        pushed.encoding, said_at = source.encoding_name, began
        shown = progress.add_task("publishing", total=source.size, rate="")
        for flush in batched(_good(source, pushed, topic=topic), FLUSH_TWEETS):
            payloads = [tweet.payload() for tweet in flush]
            send(stream, payloads, settings, lambda said: _say(progress, shown, said))
            nudge(app, SCORING)
            pushed.published += len(flush)
            rate = pushed.published / max(time.monotonic() - began, 1e-9)
            if not progress.console.is_terminal and not quiet and time.monotonic() - said_at > show.PROGRESS_SECONDS:
                said_at = time.monotonic()
                progress.console.print(f"publishing: {pushed.published:,} tweets, {rate:,.0f} a second")
            progress.update(
                shown,
                description="publishing",
                completed=source.position(),
                rate=f"{pushed.published} tweets, {rate:,.0f}/s",
            )
        progress.update(shown, completed=source.size or pushed.published, total=source.size or pushed.published)
    pushed.seconds = time.monotonic() - began
    return pushed


def _say(progress: Progress, shown: TaskID, said: str) -> None:
    """On a terminal beside the bar; elsewhere as a line, when it is another one than the last."""
    known = progress.tasks[shown].description
    progress.update(shown, description=said)
    if not progress.console.is_terminal and not progress.disable and said != known:
        progress.console.print(said, markup=False)


def score_file(settings: Settings, database: Database, file: str, model_id: int | None, as_lines: bool) -> int:
    """Score every tweet of a file and print what the model says. Returns how many lines were no tweets."""
    from worker.scorer import served, serving

    with database.read() as session:
        wanted = model_id if model_id is not None else registry.assigned(session, registry.CHAMPION)
        if wanted is None:
            raise NotFound("there is no champion yet; train a model and promote it, or name one with --model")
        version = registry.get(session, wanted)
    pushed = Pushed()
    with (
        open_source(file) as source,
        show.long_work("scoring", TimeRemainingColumn(), prints=True) as tell,
        ExitStack() as stack,
    ):
        running = None
        for window in batched(_good(source, pushed, need_id=False), settings.window_tweets):
            running = running or stack.enter_context(served(version, serving(settings)))
            scores = running.current().score([tweet.text for tweet in window])
            tell(source.position() or 0, source.size)
            if as_lines:
                for tweet, said in zip(window, scores, strict=True):
                    print(json.dumps({"id": tweet.id, "model_version_id": version.id, **said}, ensure_ascii=False))
            else:
                rows = [(t.id, s["label"], s["probability"], t.text) for t, s in zip(window, scores, strict=True)]
                show.table(None, ["id", "label", "probability", "text"], rows)
    for fault in pushed.bad:
        show.errors.print(fault, style="red", markup=False, soft_wrap=True)
    return pushed.bad_count


def batched(tweets: Iterator[Tweet], size: int) -> Iterator[list[Tweet]]:
    while batch := list(islice(tweets, size)):
        yield batch


def _good(source: Source, pushed: Pushed, **how: Any) -> Iterator[Tweet]:
    for number, tweet in read_tweets(source, **how):
        if isinstance(tweet, Tweet):
            yield tweet
        else:
            pushed.note(source.name, number, tweet)
