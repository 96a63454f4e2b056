"""Storms: workers killed at random while tweets stream in, a trainer killed again and again.

`pytest -m slow` kills less often than `pytest -m storm`. Both report what was killed and how long it took.
"""

import os
import random
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest

import worker
from db import registry
from db.models import ModelVersion, Prediction, TestPrediction
from tests.conftest import PATIENCE_SECONDS, wait_until
from tests.support.actors import Actor
from tests.support.bench import wire
from tests.support.commands import Command, command
from tests.support.servers import server_pid
from tests.support.world import World, on_postgresql
from training.config import make_config
from training.model.artifact import make_spec, save_artifact
from training.model.base_model import STARTER, STARTER_FOLDER, BaseModelFolder
from training.model.classifier import build_model
from training.text.tokenizer import load_tokenizer
from worker.connections import model_store
from worker.process.supervisor import child_environment
from worker.stream import embedded_valkey

TWEETS = 10_000
SCORERS = 3
SERVER_KILLS = 10
WORDS = [
    "雨",
    "最高",
    "電車",
    "遅れ",
    "猫",
    "仕事",
    "嬉しい",
    "つらい",
    "ラーメン",
    "地震",
    "大丈夫",
    "眠い",
    "祭り",
    "勝った",
]


def storm_of_tweets(world: World, kills: int, start: Callable[[], Any], report: Callable[[str], None]) -> None:
    """`kills` random kills while 10,000 tweets come in, some of them twice; the server restarts twice in between."""
    chance = random.Random(20261124)
    tweets = [wire(i, "".join(chance.choices(WORDS, k=chance.randint(2, 12)))) for i in range(TWEETS)]
    chance.shuffle(tweets)
    home, began, repeats = world.settings.home, time.monotonic(), 0
    portions = [tweets[i::kills] for i in range(kills)]
    restarts = {kills // 3, 2 * kills // 3}
    workers = [start() for _ in range(SCORERS)]
    server = embedded_valkey.owned(home)
    server.__enter__()
    try:
        for number, portion in enumerate(portions):
            if number in restarts:
                server.__exit__(None, None, None)
                server = embedded_valkey.owned(home)
                server.__enter__()
            again = chance.sample(portion, len(portion) // 10)
            repeats += len(again)
            world.stream.publish([*portion, *again])
            pause = time.monotonic() + chance.uniform(0.05, 1.5)
            wait_until(lambda pause=pause: time.monotonic() > pause)
            unlucky = chance.randrange(SCORERS)
            workers[unlucky].kill()
            workers[unlucky] = start()
        world.drained()
        took = time.monotonic() - began
    finally:
        for worker in workers:
            worker.kill()
        server.__exit__(None, None, None)
    rows = Counter(row["tweet_id"] for row in world.rows(Prediction))
    assert rows == dict.fromkeys(map(str, range(TWEETS)), 1)
    assert world.dead() == []
    logs = "".join(path.read_text(errors="replace") for path in world.settings.logs.glob("*.log"))
    claimed = sum(map(int, re.findall(r"claimed (\d+) records", logs)))
    report(
        f"storm: {kills} kills of {SCORERS} scorers, 2 restarts of the server, {TWEETS:,} tweets and {repeats:,} "
        f"repeats: {sum(rows.values()):,} rows, {claimed:,} tweets taken over and scored again, 0 dead letters, "
        f"{took:.0f} s ({world.database.engine.dialect.name})"
    )


@pytest.fixture
def starter_world(own: World, tmp_path: Path) -> World:
    """The champion is the starter encoder with an untrained head, which has the size of a real model."""
    config = make_config("fast", base_model=STARTER)
    encoder, tokenizer, labels = (
        BaseModelFolder(STARTER, STARTER_FOLDER),
        load_tokenizer(STARTER_FOLDER),
        ["bad", "good"],
    )
    folder = model_store(own.settings).folder / "job-0-1"
    model = build_model(encoder, 2, config)
    sha256 = save_artifact(folder, model, tokenizer, make_spec(labels, model.config, encoder, tokenizer))
    with own.database.begin() as session:
        version = ModelVersion(
            base_model=STARTER, artifact_url=folder.as_uri(), sha256=sha256, labels=labels, cleaner_version="1"
        )
        registry.add_version(session, version, [], [], [])
        registry.assign(session, registry.CHAMPION, version.id)
    return own


class Scorer(Command):
    """`tweetscore worker score`, to be killed."""

    def __init__(self, world: World) -> None:
        super().__init__(world.settings.logs / "storm.log", world.given, "worker", "score")

    def kill(self) -> None:
        self.end()


@pytest.mark.parametrize(
    ("kills", "database_url", "shards"),
    [
        pytest.param(40, "sqlite", 1, marks=pytest.mark.slow),
        pytest.param(40, "postgresql", 2, marks=pytest.mark.slow),
        pytest.param(200, "sqlite", 2, marks=pytest.mark.storm),
        pytest.param(200, "postgresql", 1, marks=pytest.mark.storm),
    ],
    indirect=["database_url", "shards"],
)
def test_01_random_kills_of_scorers_lose_no_tweet_and_score_none_twice(
    starter_world: World, kills: int, report: Callable[[str], None]
) -> None:
    storm_of_tweets(starter_world, kills, lambda: Actor("score", starter_world.given), report)


@pytest.mark.storm
def test_random_kills_of_the_whole_command_lose_no_tweet_and_score_none_twice(
    starter_world: World, report: Callable[[str], None]
) -> None:
    """The same with the real command: a start takes seconds, and many kills come before the worker is ready."""
    with embedded_valkey.owned(starter_world.settings.home):
        first = Scorer(starter_world)
        first.says(" ready.")
        first.kill()
    storm_of_tweets(starter_world, 60, lambda: Scorer(starter_world), report)


@pytest.mark.storm
def test_ten_kills_of_the_embedded_server_under_up_lose_no_tweet_and_score_none_twice(
    starter_world: World, monkeypatch: pytest.MonkeyPatch, report: Callable[[str], None]
) -> None:
    """Kill the server that `tweetscore up` owns, and some scorers, while a program publishes."""
    world, chance = starter_world, random.Random(20261125)
    for name, value in child_environment(world.settings).items():
        monkeypatch.setenv(name, value)
    with ExitStack() as stack:
        up = stack.enter_context(command(world.settings.logs / "up.log", world.given, "up", "--scorers", str(SCORERS)))
        up.says("Press Ctrl-C to stop.")
        began = time.monotonic()
        publisher = stack.enter_context(Publisher(chance))
        for kill in range(SERVER_KILLS):
            wait_until(lambda: embedded_valkey.find(world.settings.home))
            pause = time.monotonic() + chance.uniform(0.5, 20)  # some before they count as healthy
            wait_until(lambda pause=pause: time.monotonic() > pause)
            os.kill(
                server_pid(embedded_valkey.Server(embedded_valkey.socket_path(world.settings.home))), signal.SIGKILL
            )
            if kill % 2:
                chance.choice([child for child in up.family() if _scores(child)]).kill()
        publisher.ends()
        world.drained()
        took = time.monotonic() - began
        assert up.process.poll() is None
        up.send(signal.SIGTERM)
        assert up.ended() == 0
    rows = Counter(row["tweet_id"] for row in world.rows(Prediction))
    assert rows == dict.fromkeys(publisher.acknowledged, 1)
    assert world.dead() == []
    assert up.said().count("the embedded server was ended by SIGKILL") == SERVER_KILLS
    report(
        f"storm: {SERVER_KILLS} kills of the server under `up`, {SERVER_KILLS // 2} of its scorers, "
        f"{len(publisher.acknowledged):,} tweets in {publisher.calls:,} calls and {publisher.repeats:,} repeats: "
        f"{sum(rows.values()):,} rows, 0 dead letters, lag 0, pending 0, the longest call {publisher.longest:.1f} s, "
        f"{took:.0f} s ({world.database.engine.dialect.name})"
    )


def _scores(process: psutil.Process) -> bool:
    try:
        return process.cmdline()[-2:] == ["worker", "score"]
    except psutil.Error:  # it has ended
        return False


class Publisher(threading.Thread):
    """Calls `worker.publish` until it is stopped; `acknowledged` are the ids of the calls that returned."""

    def __init__(self, chance: random.Random) -> None:
        super().__init__(name="publisher", daemon=True)
        self._chance = random.Random(chance.random())
        self._ending = threading.Event()
        self.acknowledged: list[str] = []
        self.calls, self.repeats, self.longest = 0, 0, 0.0
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            while not self._ending.wait(self._chance.uniform(0, 0.1)):
                self._publish()
        except Exception as error:  # for `ends`
            self.error = error

    def _publish(self) -> None:
        first, count = len(self.acknowledged), self._chance.randint(1, 60)
        ids = [str(i) for i in range(first, first + count)]
        again = self._chance.sample(self.acknowledged, min(first, count // 10))
        tweets = [{"id": id_, "text": "".join(self._chance.choices(WORDS, k=8))} for id_ in [*ids, *again]]
        began = time.monotonic()
        worker.publish(tweets)
        self.longest = max(self.longest, time.monotonic() - began)
        self.acknowledged += ids
        self.calls += 1
        self.repeats += len(again)

    def __enter__(self) -> "Publisher":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self.join(PATIENCE_SECONDS)

    def ends(self) -> None:
        self._ending.set()
        self.join(PATIENCE_SECONDS)
        assert not self.is_alive()
        if self.error is not None:
            raise self.error


@pytest.mark.slow
@on_postgresql
def test_a_trainer_killed_ten_times_ends_its_job_as_if_nobody_had_touched_it(
    world: World, labelled_csv: Path, report: Callable[[str], None]
) -> None:
    untouched = world.submit(labelled_csv, epochs=24)
    world.finishes(untouched)
    chance, job_id, began = random.Random(7), world.submit(labelled_csv, epochs=24), time.monotonic()
    given = {"max_attempts": 20, "lease_seconds": 0.5}
    points = ["stepped", "validated", "draft", "checkpointed", "recorded"]
    for _ in range(10):
        with world.worker("train", f"{chance.choice(points)}=kill@{chance.randint(1, 2)}", **given) as trainer:
            wait_until(lambda trainer=trainer: not trainer.alive or world.job(job_id).finished_at is not None)
            assert not trainer.alive
    with world.worker("train", **given):
        job = world.ends(job_id, "succeeded")
    assert job.attempts == 11
    assert list(world.epochs(job_id)) == list(range(1, 25))
    assert world.epochs(job_id) == pytest.approx(world.epochs(untouched), abs=1e-4)
    said: dict[int, dict[int, float]] = {job_id: {}, untouched: {}}
    job_of = {row["id"]: row["job_id"] for row in world.rows(ModelVersion)}
    for row in world.rows(TestPrediction):
        said[job_of[row["model_version_id"]]][row["row_number"]] = row["probability"]
    assert len(said[job_id]) == 6
    assert said[job_id] == pytest.approx(said[untouched], abs=1e-4)
    report(
        f"storm: a trainer killed 10 times in {time.monotonic() - began:.0f} s, {job.attempts} starts, 24 epochs once "
        f"each, validation losses and test predictions within 1e-4 ({world.database.engine.dialect.name})"
    )
