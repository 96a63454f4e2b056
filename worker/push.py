"""Files of tweets: published to the stream, or scored here and now."""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TextIO

from rich.progress import Progress, TaskID, TextColumn, TimeRemainingColumn

from db import registry
from db.errors import NotFound, plain
from db.session import Database
from training.paths import is_file
from worker import show
from worker.app import SCORING, make_app
from worker.doors import FLUSH_TWEETS, nudge, send
from worker.errors import BadRecord
from worker.records import Tweet, open_text, read_tweets
from worker.runtime import open_stream
from worker.settings import Settings

FAULTS_NAMED = 20


@dataclass
class Pushed:
    published: int = 0
    seconds: float = 0.0
    bad_count: int = 0
    bad: list[str] = field(default_factory=list)

    def note(self, name: str, number: int, fault: BadRecord) -> None:
        self.bad_count += 1
        if len(self.bad) < FAULTS_NAMED:
            self.bad.append(f"{name}, line {number}: {fault}")


def push_file(settings: Settings, url: str, file: str, *, quiet: bool) -> Pushed:
    """Publish every tweet of a file in its order, with a nudge after each flush; bad lines are noted and left out."""
    stream, app, pushed, began = open_stream(settings, url), make_app(settings), Pushed(), time.monotonic()
    with (
        _opened(file) as (source, name, size),
        show.bar(TextColumn("{task.fields[rate]}"), TimeRemainingColumn()) as progress,
    ):
        progress.disable = quiet
        shown = progress.add_task("publishing", total=size, rate="")
        for flush in batched(_good(source, name, pushed), FLUSH_TWEETS):
            payloads = [tweet.payload() for tweet in flush]
            send(stream, payloads, settings, lambda said: tell(progress, shown, said))
            nudge(app, SCORING)
            pushed.published += len(flush)
            rate = pushed.published / max(time.monotonic() - began, 1e-9)
            at = source.buffer.tell() if size else None
            progress.update(
                shown, description="publishing", completed=at, rate=f"{pushed.published} tweets, {rate:,.0f}/s"
            )
        progress.update(shown, completed=size or pushed.published, total=size or pushed.published)
    pushed.seconds = time.monotonic() - began
    return pushed


def tell(progress: Progress, shown: TaskID, said: str) -> None:
    """On a terminal beside the bar; elsewhere as a line, when it is another one than the last."""
    known = progress.tasks[shown].description
    progress.update(shown, description=said)
    if not progress.console.is_terminal and not progress.disable and said != known:
        progress.console.print(said, markup=False)


def score_file(settings: Settings, database: Database, file: str, model_id: int | None, as_lines: bool) -> int:
    """Score every tweet of a file and print what the model says. Returns how many lines were no tweets."""
    from worker.scorer import load_model, serving

    with database.read() as session:
        wanted = model_id if model_id is not None else registry.assigned(session, registry.CHAMPION)
        if wanted is None:
            raise NotFound("there is no champion yet; train a model and promote it, or name one with --model")
        version = registry.get(session, wanted)
    pushed = Pushed()
    with _opened(file) as (source, name, _):
        model = None
        for window in batched(_good(source, name, pushed, need_id=False), settings.window_tweets):
            model = model or load_model(version, serving(settings))
            scores = model.score([tweet.text for tweet in window])
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


def _good(source: TextIO, name: str, pushed: Pushed, *, need_id: bool = True) -> Iterator[Tweet]:
    for number, tweet in read_tweets(source, name, need_id=need_id):
        if isinstance(tweet, BadRecord):
            pushed.note(name, number, tweet)
        else:
            yield tweet


@contextmanager
def _opened(file: str) -> Iterator[tuple[TextIO, str, int | None]]:
    """The source, its name, and its size in bytes where it has one."""
    if file == "-":
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")  # type: ignore[union-attr]
        yield sys.stdin, "stdin", None
        return
    path = Path(file)
    if not is_file(path):
        raise NotFound(f"there is no file {plain(file)}; name a JSONL, CSV or TSV file, or - for standard input")
    if path.stat().st_size == 0:
        raise NotFound(f"{plain(file)} is empty; it should hold a tweet a line")
    with open_text(file) as source:
        yield source, path.name, path.stat().st_size
