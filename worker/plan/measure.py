"""Measure what windows of the champion cost on this machine, on a stream and an SQLite file of their own.

The newest tweets that are stored, or those of the sample, pass the same route as in a worker, in this process. The
stream and the database that the settings name are left alone, except that champion and tweets are looked up.
"""

import json
import random
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import count, cycle, islice
from pathlib import Path
from statistics import median
from typing import Any, ClassVar

import psutil
from sqlalchemy import func, select

from db import migrate, predictions, registry
from db.models import ModelVersion, Prediction, utc_now
from db.session import Database, open_database
from training.data.sample import UNLABELLED
from training.jobs.stored_tweets import LANGUAGE
from worker.connections import open_sql
from worker.errors import BadRequest
from worker.scoring.champion import Champion
from worker.scoring.pipeline import FIRST_WINDOW_TWEETS, Limits, Pipeline
from worker.scoring.scores import Model
from worker.scoring.scoring_model import Serving, load_model, serving_from
from worker.scoring.window import Window
from worker.settings import Settings
from worker.stream import embedded_valkey
from worker.stream.redis_client import connect
from worker.stream.stream import Record, Stream

NAME = "champion"
SIZES = (1, 4, 16, 64, 256, 512)
# Windows of one size are scored for about so long.
SECONDS_A_SIZE = 1.5
LEAST_WINDOWS, MOST_WINDOWS = 6, 200
LONGEST_SIZE_SECONDS = 5.0
LEAST_ALONE, ALONE_SECONDS = 5, 0.5
SERVER_MEMORY_MB = 1024
LINGER_SECONDS = 0.001
# With fewer tweets in the database, those of the sample: equal texts of a window are scored once.
FEWEST_TWEETS, MOST_TWEETS = 1_000, 5_000


class Loaded(Champion):
    """A champion that is always the given model."""

    def __init__(self, database: Database, serving: Serving, model: Model) -> None:
        super().__init__(database, serving)
        self._model = model

    def current(self) -> Model:
        return self._model


class Varied(Pipeline):
    """Reads windows of `size` on average, half to one and a half of it.

    A worker's windows are never of one size, and an engine is slower with batches of a shape that is new to it.
    """

    size = 1
    random: ClassVar = random.Random(1)

    def next_size(self, records: list[Record], size: int, most: int) -> int:
        return max(1, round(self.size * self.random.uniform(0.5, 1.5)))


@dataclass
class Bench:
    """A route on a stream and a database of its own; ids of tweets are never used twice."""

    stream: Stream
    database: Database
    champion: Loaded
    server: psutil.Process
    texts: Iterator[str]
    ids: Iterator[int] = field(default_factory=lambda: count(time.time_ns()))

    def publish(self, tweets: int) -> None:
        some = zip(self.ids, islice(self.texts, tweets), strict=False)
        self.stream.publish([json.dumps({"v": 1, "id": str(id_), "text": text}).encode() for id_, text in some])

    def pipeline(self, size: int) -> Varied:
        limits = Limits(2 * size, 60.0, LINGER_SECONDS)
        pipeline = Varied(self.stream, self.database, self.champion, limits, threading.Event())
        pipeline.size = size
        return pipeline

    def alone_ms(self, size: int) -> float:
        """Milliseconds of a window whose steps do not overlap with those of others: the median of a few."""
        pipeline, ends_at = self.pipeline(size), time.monotonic() + ALONE_SECONDS
        found: list[float] = []
        while len(found) < LEAST_ALONE or time.monotonic() < ends_at:
            tweets = pipeline.next_size([], size, size)
            self.publish(tweets)
            began = time.perf_counter()
            pipeline.score_at_once(Window(pipeline.read(tweets, 0), self.champion.current()))
            found.append(1000 * (time.perf_counter() - began) * size / tweets)
        return median(found)

    def window(self, size: int) -> dict[str, float]:
        """The costs of windows of so many tweets, as in `WindowCost`."""
        alone_ms = self.alone_ms(size)
        windows = min(MOST_WINDOWS, max(LEAST_WINDOWS, round(1000 * SECONDS_A_SIZE / alone_ms)))
        self.publish(windows * size + FIRST_WINDOW_TWEETS)
        before, before_cpu = utc_now(), self.cpu_seconds()
        scored = self.pipeline(size).drain()
        core_seconds = self.cpu_seconds() - before_cpu
        # All tweets of a window have one time, taken between the forward and the commit.
        at = Prediction.scored_at
        counts = select(at, func.count()).where(at >= before).group_by(at).order_by(at)
        with self.database.read() as session:
            times, tweets = zip(*session.execute(counts).all(), strict=True)
        # From the end of the first window, which is of another size, to that of the last.
        seconds_a_tweet = (times[-1] - times[0]).total_seconds() / sum(tweets[1:])
        return {
            "tweets": size, "period_ms": round(1000 * seconds_a_tweet * size, 2), "alone_ms": round(alone_ms, 2),
            "core_ms": round(1000 * core_seconds * size / scored, 2),
        }  # fmt: skip

    def cpu_seconds(self) -> float:
        server = self.server.cpu_times()
        return time.process_time() + server.user + server.system


def measure(settings: Settings, notify: Callable[[str], None]) -> dict[str, Any]:
    """Figures of the champion, in the form of `measured.json`, within half a minute.

    Raises `BadRequest` when there is no champion, or when its engine was not selected yet.
    """
    serving = serving_from(settings)
    model, version, stored = _champion(settings, serving)
    sample = [json.loads(line)["text"] for line in UNLABELLED.read_text(encoding="utf-8").splitlines()]
    texts = stored if len(stored) >= FEWEST_TWEETS else sample
    model.tokenise(texts)  # a worker's cache of words is full
    with ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tweetscore-", ignore_cleanup_errors=True)))
        server = stack.enter_context(embedded_valkey.owned(home, SERVER_MEMORY_MB))
        scratch = open_database(f"sqlite:///{home / 'tweets.db'}")
        stack.callback(scratch.close)
        migrate.upgrade(scratch)
        _add_versions(scratch, version, model)
        process = psutil.Process(connect(server.url).info("server")["process_id"])
        stream = Stream(connect(server.url), settings.stream_key, settings.group)  # not those of the settings
        stream.ensure_group()
        bench = Bench(stream, scratch, Loaded(scratch, serving, model), process, cycle(texts))
        bench.alone_ms(SIZES[0])  # warms up
        windows: list[dict[str, float]] = []
        for size in SIZES:
            if len(windows) > 1 and LEAST_WINDOWS * windows[-1]["period_ms"] > 1000 * LONGEST_SIZE_SECONDS:
                break  # of a large model a smaller window says as much
            windows.append(bench.window(size))
            notify("windows of {tweets} tweets: {period_ms:.1f} ms, {alone_ms:.1f} alone".format(**windows[-1]))
    cores = len(psutil.Process().cpu_affinity())
    measured = {
        "machine": f"a machine with {cores} cores on {time.strftime('%Y-%m-%d')}",
        "cores": cores,
        "engine": " + ".join(part.engine.name for part in model.parts),
        "windows": windows,
    }
    return {"models": {NAME: measured}}


def _champion(settings: Settings, serving: Serving) -> tuple[Model, ModelVersion, list[str]]:
    """The champion, and the texts of the newest tweets."""
    database = open_sql(settings)
    try:
        with database.read() as session:
            version_id = registry.assigned(session, registry.CHAMPION)
            if version_id is None:
                raise BadRequest("there is no champion to measure; train a model, then `tweetscore models promote ID`")
            version = registry.get(session, version_id)
            tweets = predictions.newest_texts(session, LANGUAGE, utc_now(), None, MOST_TWEETS)
    finally:
        database.close()
    model = load_model(version, serving)
    if any(part.start_trial is not None for part in model.parts):
        raise BadRequest("no worker has tried the champion's engines here yet; run `tweetscore up` until it has")
    return model, version, [text for _, _, text in tweets]


def _add_versions(scratch: Database, version: ModelVersion, model: Model) -> None:
    """The model versions that predictions refer to, with the ids that they have elsewhere."""
    with scratch.begin() as session:
        for version_id in {model.version_id, *(part.version_id for part in model.parts)}:
            copied = ModelVersion(
                id=version_id, base_model=version.base_model, artifact_url=version.artifact_url,
                sha256=version.sha256, labels=version.labels, cleaner_version=version.cleaner_version,
            )  # fmt: skip
            registry.add_version(session, copied, [], [], [])
