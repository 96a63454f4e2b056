"""The routes as their users walk them: `tweetscore up` in its own processes, and every door for jobs and for tweets.

One `up` serves the whole file; each test brings its own tweets.
"""

import json
import os
import re
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from celery import Celery
from sqlalchemy import select

import worker
from db import jobs, registry
from db.models import EpochMetric, Prediction, TestMetric, TestPrediction, TrainingJob, Tweet
from db.session import Database, open_database
from tests.conftest import PATIENCE_SECONDS, wait_until
from worker.app import broker_url
from worker.stream import embedded_valkey
from worker.stream.redis_client import connect
from worker.stream.stream import Stream

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory, tiny_encoder: Path) -> Iterator[SimpleNamespace]:
    """A running `tweetscore up` on a home of its own, its base model the tiny one."""
    home = tmp_path_factory.mktemp("up") / "home"
    environment = {
        "TWEETSCORE_HOME": str(home),
        "TWEETSCORE_READ_ROOTS": str(tiny_encoder.parent),
        "TWEETSCORE_BASE_MODEL": str(tiny_encoder),
        "TWEETSCORE_ENGINE": "auto",
        "TWEETSCORE_WATCH_SECONDS": "0.2",
        "TWEETSCORE_LINGER_SECONDS": "0.5",
        "TWEETSCORE_LEASE_SECONDS": "3",
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "worker.cli", "up"],
        env={**os.environ, **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for role in ("train", "score"):
            log = home / "logs" / f"{role}.log"
            wait_until(lambda log=log: log.exists() and " ready." in log.read_text(errors="replace"))
        url = f"unix://{embedded_valkey.socket_path(home)}"
        database = open_database(f"sqlite:///{home / 'tweetscore.db'}")
        yield SimpleNamespace(
            home=home, environment=environment, process=process, url=url, database=database, walk=None,
            first=[uuid.uuid4().hex for _ in range(30)],
        )  # fmt: skip
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(PATIENCE_SECONDS)


@pytest.fixture(autouse=True)
def _same_home(up: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in up.environment.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def champion(up: SimpleNamespace, tweetscore: Run, labelled_csv: Path, tmp_path: Path) -> int:
    """The version that scores: trained and promoted by the first test that runs here, after tweets had come."""
    if up.walk is None:
        tweets = tmp_path / "tweets.jsonl"
        tweets.write_text("".join(json.dumps({"id": i, "text": f"嬉しい{i}", "topic": "猫"}) + "\n" for i in up.first))
        pushed = tweetscore("push", str(tweets))
        trained = tweetscore("train", str(labelled_csv), "--epochs", "2", "--wait")
        early, log = scored(up.database, up.first), (up.home / "logs" / "score.log").read_text()
        with up.database.read() as session:
            version = registry.versions(session)[0].id
        promoted = tweetscore("models", "promote", str(version))
        up.walk = SimpleNamespace(
            pushed=pushed, trained=trained, early=early, log=log, version=version, promoted=promoted
        )
    return int(up.walk.version)


def finished(database: Database, job_id: int) -> TrainingJob:
    def job() -> TrainingJob:
        with database.read() as session:
            return jobs.get(session, job_id)

    wait_until(lambda: job().finished_at is not None)
    return job()


def scored(database: Database, ids: list[str]) -> list[Prediction]:
    with database.read() as session:
        return list(session.scalars(select(Prediction).where(Prediction.tweet_id.in_(ids))))


def test_a_trained_and_promoted_model_scores_the_tweets_that_waited_for_it(
    up: SimpleNamespace, champion: int, tweetscore: Run
) -> None:
    ids, walk = up.first, up.walk
    assert walk.pushed.returncode == 0, walk.pushed.stderr
    assert "published 30 tweets" in walk.pushed.stdout
    assert walk.trained.returncode == 0, walk.trained.stderr
    assert "Epoch: 2, Loss:" in walk.trained.stdout
    assert "TF-IDF" in walk.trained.stdout
    with up.database.read() as session:
        job = jobs.get(session, registry.get(session, champion).job_id)
        assert (job.state, job.step, job.attempts) == ("succeeded", job.total_steps, 1)
        assert [e.epoch for e in session.scalars(select(EpochMetric).where(EpochMetric.job_id == job.id))] == [1, 2]
        metrics = select(TestMetric.metric).where(TestMetric.model_version_id == champion)
        assert {"accuracy", "f1_micro", "f1_macro", "tfidf_f1_macro"} <= set(session.scalars(metrics))
        rows = select(TestPrediction).where(TestPrediction.model_version_id == champion)
        assert len(list(session.scalars(rows))) == 6
    # The tweets came before there was any model: they waited in the stream.
    assert walk.early == []
    assert "there is no champion yet" in walk.log

    assert walk.promoted.returncode == 0
    wait_until(lambda: len(scored(up.database, ids)) == 30)
    row = scored(up.database, ids)[0]
    assert row.model_version_id == champion
    assert sum(row.probabilities.values()) == pytest.approx(1, abs=1e-5)
    assert row.label == max(row.probabilities, key=row.probabilities.__getitem__)
    assert row.score_signed == pytest.approx(row.probabilities["positive"] - row.probabilities["negative"], abs=1e-5)
    stream = Stream(connect(up.url), "tweets", "scorers")
    wait_until(lambda: stream.depth().idle and stream.length() == 0)
    shown = ""

    def tried() -> bool:
        nonlocal shown
        shown = tweetscore("models", "show", str(champion)).stdout
        return "no engine was tried on this machine yet" not in shown

    wait_until(tried)
    assert re.search(r"serves: .* of 6 validation labels as float32", " ".join(shown.split()))


@pytest.mark.usefixtures("champion")
def test_a_bare_xadd_from_any_client_is_scored_without_a_celery_message(up: SimpleNamespace) -> None:
    tweet_id = uuid.uuid4().hex
    client = connect(up.url)
    client.xadd("tweets", {"tweet": json.dumps({"v": 1, "id": tweet_id, "text": "最高の一日"})})
    wait_until(lambda: scored(up.database, [tweet_id]))


@pytest.mark.usefixtures("champion")
def test_python_publishes_tweets_and_refuses_what_is_none(up: SimpleNamespace) -> None:
    ids = [uuid.uuid4().hex for _ in range(5)]
    assert worker.publish({"id": i, "text": "悪くない", "author_id": "7"} for i in ids) == 5
    wait_until(lambda: len(scored(up.database, ids)) == 5)
    with up.database.read() as session:
        assert {t.author_id for t in session.scalars(select(Tweet).where(Tweet.tweet_id.in_(ids)))} == {"7"}
    length = connect(up.url).xinfo_stream("tweets")["entries-added"]
    with pytest.raises(worker.errors.BadRecord, match="no text"):
        worker.publish([{"id": "1", "text": "a"}, {"id": "2"}])
    assert connect(up.url).xinfo_stream("tweets")["entries-added"] == length


def test_python_submits_a_job(up: SimpleNamespace, labelled_csv: Path) -> None:
    job_id = worker.submit_training(str(labelled_csv), epochs=1, seed=3)
    labelled_csv.unlink()  # the job has its own copy
    job = finished(up.database, job_id)
    assert (job.state, job.config["seed"], job.config["epochs"]) == ("succeeded", 3, 1)


def test_a_running_job_is_cancelled_within_a_few_steps(
    up: SimpleNamespace, tweetscore: Run, labelled_csv: Path
) -> None:
    job_id = worker.submit_training(str(labelled_csv), epochs=1000)

    def step() -> int:
        with up.database.read() as session:
            return jobs.get(session, job_id).step

    wait_until(lambda: step() > 0)
    assert "is running, stopping" in tweetscore("jobs", "cancel", str(job_id)).stdout
    job = finished(up.database, job_id)
    assert job.state == "cancelled"
    assert job.step < job.total_steps
    wait_until(lambda: not (up.home / "jobs" / str(job_id)).exists())
    assert tweetscore("jobs", "show", str(job_id)).returncode == 1


@pytest.mark.slow
def test_a_job_whose_worker_is_killed_goes_on_from_its_checkpoint(up: SimpleNamespace, labelled_csv: Path) -> None:
    job_id = worker.submit_training(str(labelled_csv), epochs=30)

    def done() -> list[EpochMetric]:
        with up.database.read() as session:
            return jobs.epochs(session, job_id)

    wait_until(lambda: len(done()) >= 3)
    before = {epoch.epoch: epoch.valid_loss for epoch in done()}
    family = psutil.Process(up.process.pid).children(recursive=True)
    next(p for p in family if p.cmdline()[-1] == "train").kill()

    job = finished(up.database, job_id)
    assert (job.state, job.attempts, job.fencing_token, job.step) == ("succeeded", 2, 2, job.total_steps)
    assert [epoch.epoch for epoch in done()] == list(range(1, 31))
    assert {epoch.epoch: epoch.valid_loss for epoch in done() if epoch.epoch in before} == pytest.approx(
        before, abs=1e-4
    )
    assert f"job {job_id}: resumes from step" in (up.home / "logs" / "train.log").read_text()


@pytest.mark.usefixtures("champion")
def test_a_pickled_message_is_refused_and_the_worker_goes_on(up: SimpleNamespace) -> None:
    client = Celery(broker=broker_url(up.url))
    client.conf.update(task_serializer="pickle", accept_content=["pickle"])
    client.send_task("worker.tasks.score", queue="scoring")
    tweet_id = uuid.uuid4().hex
    assert worker.publish([{"id": tweet_id, "text": "それでも動く"}]) == 1
    wait_until(lambda: scored(up.database, [tweet_id]))


def test_answers_come_as_table_csv_and_json(tweetscore: Run) -> None:
    assert "│ 2" in tweetscore("query", "SELECT 1 + 1 AS two").stdout
    assert tweetscore("query", "SELECT 'a,b' AS x", "--format", "csv").stdout == 'x\n"a,b"\n'
    assert json.loads(tweetscore("query", "SELECT '猫' AS x", "--json").stdout) == [{"x": "猫"}]
    refused = tweetscore("query", "DELETE FROM tweets")
    assert (refused.returncode, "refused" in refused.stderr) == (2, True)


@pytest.mark.usefixtures("champion")
def test_score_answers_at_once_and_stores_nothing(up: SimpleNamespace, tweetscore: Run) -> None:
    answered = tweetscore(
        "score", "-", "--json", stdin='{"text":"とても嬉しい"}\n{"id":"x","text":"とても悲しい"}\n{bad\n'
    )
    assert answered.returncode == 1  # done in part
    lines = [json.loads(line) for line in answered.stdout.splitlines()]
    assert [line["id"] for line in lines] == ["1", "x"]
    assert set(lines[0]["probabilities"]) == {"negative", "positive"}
    assert "line 3: the line is not JSON" in answered.stderr
    with up.database.read() as session:
        assert session.get(Tweet, "x") is None


@pytest.mark.usefixtures("champion")
def test_every_listing_is_also_json(tweetscore: Run) -> None:
    models = json.loads(tweetscore("models", "list", "--json").stdout)
    assert ["champion"] in [model["aliases"] for model in models]
    promoted = next(model for model in models if "champion" in model["aliases"])

    def show() -> Any:
        return json.loads(tweetscore("models", "show", str(promoted["id"]), "--json").stdout)

    wait_until(lambda: show()["engines"])  # there are none until the trial has ended
    shown = show()
    assert {"metric", "label", "value"} <= set(shown["metrics"][0])
    assert json.loads(tweetscore("jobs", "list", "--json").stdout)[0]["id"] >= models[0]["job_id"]
    checks = json.loads(tweetscore("doctor", "--json").stdout)
    assert all(check["ok"] for check in checks), checks
    (engine,) = [choice["engine"] for choice in shown["engines"]]
    (champion,) = [check["finding"] for check in checks if check["name"] == "champion"]
    assert engine in champion
    assert "tokens per forward pass" in champion


@pytest.mark.slow
@pytest.mark.usefixtures("champion")
def test_a_killed_worker_is_started_again_and_a_stop_leaves_nothing_running(up: SimpleNamespace) -> None:
    """Last in the file: it ends the `up` the others use."""
    family = psutil.Process(up.process.pid).children(recursive=True)
    scorer = next(p for p in family if p.cmdline()[-1] == "score")
    scorer.kill()
    tweet_id = uuid.uuid4().hex
    worker.publish([{"id": tweet_id, "text": "復活"}])
    wait_until(lambda: scored(up.database, [tweet_id]))

    family = psutil.Process(up.process.pid).children(recursive=True)
    assert len(family) >= 3  # server and two workers
    up.process.send_signal(signal.SIGTERM)
    assert up.process.wait(PATIENCE_SECONDS) == 0
    _, alive = psutil.wait_procs(family, timeout=PATIENCE_SECONDS)
    assert not alive
    assert embedded_valkey.find(up.home) is None
