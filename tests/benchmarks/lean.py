"""The CPU time that scoring takes outside the model, by step: `python -m tests.benchmarks.lean`.

Windows of real tweets pass the steps of the route one after another, in one thread, on a real stream and database. Each
figure is the time of that thread, so that neither a wait nor a busy machine counts; the server of PostgreSQL does not
count either, SQLite does. Median, least and greatest over the windows.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch

from db import migrate, predictions
from db.session import open_database
from tests.benchmarks import models
from tests.benchmarks.bulk import two_databases
from tests.benchmarks.system import tweets
from tests.support.paths import tweets_file
from tests.support.rows import assign, make_version
from training.model.artifact import load_artifact
from training.model.batching import Batch, Logits
from training.text.cleaning import clean
from worker.connections import open_stream
from worker.engines.engine_choice import Choice
from worker.engines.engines import TorchEngine
from worker.scoring.scoring_model import ScoringModel
from worker.scoring.window import Window, add_tweets, stored_predictions, tweet_columns, window_row
from worker.settings import load_settings
from worker.stream import embedded_valkey
from worker.stream.stream import Stream

STEPS = ("read", "parse", "clean", "tokenise", "batch, pad", "rows", "SQL", "ack")
TOKEN_BUDGET = 1024


class TimedEngine(TorchEngine):
    """Float32 PyTorch that measures its own time: it is the model's, not Python's."""

    seconds = 0.0

    def run(self, batches: Sequence[Batch]) -> list[Logits]:
        began = time.thread_time()
        found = super().run(batches)
        self.seconds = time.thread_time() - began
        return found


class Steps:
    """The steps of the route, timed."""

    def __init__(self, stream: Stream, model: ScoringModel, engine: TimedEngine, database: Any, window: int) -> None:
        self.stream, self.model, self.engine, self.database, self.window = stream, model, engine, database, window
        self.seconds: dict[str, list[float]] = {step: [] for step in STEPS}

    def timed(self, step: str, run: Callable[[], Any]) -> Any:
        began = time.thread_time()
        found = run()
        self.seconds[step].append(time.thread_time() - began)
        return found

    def pass_window(self) -> None:
        window = self.read()
        self.tokenise(window)
        self.forward(window, self.model, "batch, pad")
        self.commit(window)

    def read(self) -> Window:
        window = Window(self.timed("read", lambda: self.stream.read(self.window, None)), self.model)
        self.timed("parse", lambda: add_tweets(window))
        return window

    def tokenise(self, window: Window) -> None:
        spec = self.model.spec
        texts = self.timed("clean", lambda: [clean(text, spec.cleaner_version) for text in window.texts])
        window.rows = self.timed("tokenise", lambda: self.model.encode(texts, spec.config.max_length))

    def forward(self, window: Window, model: ScoringModel, step: str) -> None:
        window.scores = self.timed(step, lambda: model.forward(window.rows))
        self.seconds[step][-1] -= self.engine.seconds

    def commit(self, window: Window) -> None:
        scores = window.scores
        assert scores is not None
        columns = self.timed("rows", lambda: (tweet_columns(window), stored_predictions(window, scores)))
        self.timed("SQL", lambda: self.store(window, *columns))
        self.timed("ack", lambda: self.acknowledge(window))

    def acknowledge(self, window: Window) -> None:
        self.stream.ack(window.ids)
        self.stream.trim()

    def store(self, window: Window, stored: Any, scored: Any) -> None:
        assert window.scores is not None
        with self.database.begin() as session:
            predictions.add_scored(session, stored, scored)
            predictions.bury(session, window.dead)
            predictions.add_window(session, window_row(window, window.scores, self.stream.consumer))


@contextmanager
def a_database(kind: str, scratch: Path) -> Iterator[str]:
    if kind == "sqlite":
        yield f"sqlite:///{scratch / 'tweets.db'}"
    else:
        with two_databases("postgresql") as (url, _):
            yield url


def measure(kind: str, source: Path, window: int, windows: int, scratch: Path) -> dict[str, list[float]]:
    """Milliseconds per 1,000 tweets of each step, one value per window."""
    artifact_folder = scratch / "starter"
    if not artifact_folder.exists():
        models.starter_artifact(artifact_folder)
    artifact = load_artifact(artifact_folder)
    engine = TimedEngine(artifact.model, torch.device("cpu"), torch.float32)
    model = ScoringModel(0, artifact, engine, Choice(engine.name, TOKEN_BUDGET, "", []))
    payloads = tweets(window * (windows + 1), source)
    model.tokenise([json.loads(payload)["text"] for payload in payloads])  # a worker's cache of words is full
    with a_database(kind, scratch) as url, embedded_valkey.owned(scratch / kind) as server:
        database = open_database(url)
        migrate.upgrade(database)
        model.version_id = make_version(database)
        assign(database, model.version_id)
        stream = open_stream(load_settings(), server.url)
        stream.ensure_group()
        steps = Steps(stream, model, engine, database, window)
        for start in range(0, len(payloads), window):
            stream.publish(payloads[start : start + window])
            steps.pass_window()
        database.close()
    # The first window warms up.
    return {step: [1e6 * seconds / window for seconds in found[1:]] for step, found in steps.seconds.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.lean", description=__doc__)
    parser.add_argument("--database", choices=["sqlite", "postgresql"], action="append", help="both by default")
    parser.add_argument("--window", type=int, default=512, metavar="TWEETS")
    parser.add_argument("--windows", type=int, default=6, metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    parser.add_argument("--tweets", type=Path, default=tweets_file())
    options = parser.parse_args(arguments)
    written: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory(prefix="tweetscore-") as scratch:
        for kind in options.database or ["sqlite", "postgresql"]:
            found = measure(kind, options.tweets, options.window, options.windows, Path(scratch))
            found["all"] = [sum(parts) for parts in zip(*found.values(), strict=True)]
            written[kind] = {step: median(ms) for step, ms in found.items()}
            print(f"{kind:24}{'median':>8}{'least':>8}{'most':>8}  core-ms per 1,000 tweets")
            for step, ms in found.items():
                print(f"  {step:22}{median(ms):8.2f}{min(ms):8.2f}{max(ms):8.2f}")
    if options.json:
        options.json.write_text(json.dumps(written, indent=2), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
