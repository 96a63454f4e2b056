"""Models after training: compared, promoted, rolled back, deleted; stored tweets scored anew; runs that are watched."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from sqlalchemy import func, select

from db import jobs, predictions, registry
from db.errors import InUse, NotFound
from db.models import EpochMetric, ModelVersion, Prediction, TrainingJob, Tweet, utc_now
from db.session import Database, open_database
from tests.conftest import LABELS, PATIENCE_SECONDS, wait_until
from worker.cli import output
from worker.cli.training import job_output
from worker.connections import model_store, open_sql
from worker.errors import StreamError
from worker.scoring import backfill
from worker.scoring.backfill import rescore
from worker.settings import Settings, load_settings
from worker.stream.stream import Depth

Run = Callable[..., subprocess.CompletedProcess[str]]
Promote = Callable[..., int]


def version_of(database: Database, rows: list[tuple[str, str, str, float]] = ()) -> int:  # type: ignore[assignment]
    """A registered model with these test rows: (text, actual, predicted, probability)."""
    with database.begin() as session:
        version = ModelVersion(
            base_model="tiny", artifact_url="file:///nowhere", sha256="0", labels=LABELS, cleaner_version="1"
        )
        tested = [
            {"row_number": n, "text": text, "actual": a, "predicted": p, "probability": sure, "probabilities": {}}
            for n, (text, a, p, sure) in enumerate(rows)
        ]
        return registry.add_version(session, version, [], [], tested).id


def test_a_rollback_is_one_more_row_and_passes_over_what_was_deleted(database: Database) -> None:
    one, two, three = (version_of(database) for _ in range(3))
    with database.begin() as session:
        with pytest.raises(NotFound, match="no other model was the champion before"):
            registry.rollback(session, "champion")
        for version in (one, two, three):
            registry.assign(session, "champion", version)
        assert registry.rollback(session, "champion") == (three, two)
        assert registry.assigned(session, "champion") == two
        assert registry.rollback(session, "champion") == (two, three)  # back again
        registry.mark_deleted(session, two, predictions=False)
        assert registry.rollback(session, "champion") == (three, one)
        spells = [(row.alias, row.model_version_id) for row in registry.history(session)]
        assert spells == [("champion", v) for v in (one, two, three, two, three, one)]
        with pytest.raises(NotFound, match="no other model was the challenger"):
            registry.rollback(session, "challenger")


def test_a_deleted_model_is_neither_promoted_nor_listed_and_one_in_use_is_not_deleted(database: Database) -> None:
    one, two = version_of(database), version_of(database)
    with database.begin() as session:
        registry.assign(session, "challenger", one)
        with pytest.raises(InUse, match=f"model {one} is the challenger"):
            registry.mark_deleted(session, one, predictions=False)
        registry.mark_deleted(session, two, predictions=False)
        assert [v.id for v in registry.versions(session)] == [one]
        assert [v.id for v in registry.versions(session, deleted=True)] == [two, one]
        for refused in (
            lambda: registry.assign(session, "champion", two),
            lambda: registry.mark_deleted(session, two, predictions=True),
        ):
            with pytest.raises(NotFound, match=f"model {two} was deleted"):
                refused()


def test_what_a_deleted_model_said_of_tweets_stays_unless_it_is_to_go(database: Database) -> None:
    versions = [version_of(database) for _ in range(2)]
    keep(database, 3)
    for version, delete_predictions in zip(versions, (False, True), strict=True):
        with database.begin() as session:
            predictions.add_predictions(session, [said(f"{i:04}", version) for i in range(3)])
            registry.mark_deleted(session, version, delete_predictions)
    with database.read() as session:
        assert [predictions.prediction_count(session, version) for version in versions] == [3, 0]


def test_the_most_confidently_wrong_come_first_and_shared_rows_are_paired(database: Database) -> None:
    rows = [("a", "x", "x", 0.9), ("b", "x", "y", 0.7), ("c", "y", "x", 0.95), ("d", "y", "y", 0.6)]
    one = version_of(database, rows)
    other = version_of(database, [("a", "x", "y", 0.5), ("b", "x", "x", 0.5), ("c", "y", "y", 0.5), ("z", "x", "y", 1)])
    with database.read() as session:
        assert [row.text for row in registry.wrongest(session, one)] == ["c", "b"]
        assert [row.text for row in registry.wrongest(session, one, limit=1)] == ["c"]
        assert registry.paired(session, one, other) == (3, 1, 2)
        assert registry.paired(session, other, one) == (3, 2, 1)


def test_a_text_that_stands_among_the_test_rows_twice_is_paired_once(database: Database) -> None:
    """As in the guide's split; a text under both labels is two."""
    one = version_of(database, [("a", "x", "x", 0.9), ("a", "x", "x", 0.9), ("a", "y", "x", 0.9)])
    other = version_of(database, [("a", "x", "y", 0.9), ("a", "x", "y", 0.9), ("a", "y", "y", 0.9)])
    with database.read() as session:
        assert registry.paired(session, one, other) == (2, 1, 1)


# --- rescoring


def keep(database: Database, count: int, first: int = 0, **fields: Any) -> None:
    rows = [
        {"tweet_id": f"{i:04}", "text": f"今日は雨{i}", "author_id": None, "lang": None, "topic": None,
         "tweet_created_at": None, "received_at": utc_now(), **fields}
        for i in range(first, first + count)
    ]  # fmt: skip
    with database.begin() as session:
        predictions.add_tweets(session, rows)


def said(tweet_id: str, version: int) -> dict[str, Any]:
    return {
        "tweet_id": tweet_id, "model_version_id": version, "label": "neutral", "probability": 0.5, "score_signed": None,
        "probabilities": {}, "scored_at": utc_now(),
    }  # fmt: skip


def count(database: Database, version: int) -> int:
    with database.read() as session:
        return predictions.prediction_count(session, version)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return load_settings(home=tmp_path / "home", engine="torch-float32")


NO_STREAM: Callable[[], Depth | None] = lambda: None  # noqa: E731


def test_a_backfill_that_was_stopped_goes_on_and_scores_each_tweet_once(
    database: Database, settings: Settings, promote: Promote
) -> None:
    version = promote(database, model_store(settings).folder)
    keep(database, 300)
    with database.begin() as session:
        predictions.add_predictions(
            session, [said(f"{i:04}", version) for i in range(10)]
        )  # as the stream's worker does
    told: list[tuple[int, int]] = []

    def stop_after_the_first_chunk(done: int, total: int, waiting: bool) -> None:
        told.append((done, total))
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rescore(database, settings, version, None, NO_STREAM, stop_after_the_first_chunk)
    assert told == [(0, 290), (backfill.CHUNK_TWEETS, 290)]
    assert count(database, version) == 10 + backfill.CHUNK_TWEETS
    assert rescore(database, settings, version, None, NO_STREAM) == 290 - backfill.CHUNK_TWEETS
    assert count(database, version) == 300
    assert rescore(database, settings, version, None, NO_STREAM) == 0
    with database.read() as session:
        assert session.scalar(select(func.count()).where(Prediction.label.in_(LABELS))) == 300


def test_a_tweet_that_is_deleted_while_it_is_scored_stays_deleted(
    database: Database, settings: Settings, promote: Promote, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = promote(database, model_store(settings).folder)
    keep(database, 5)
    rows_of = backfill.prediction_rows

    def rows_then_delete(*given: Any) -> Any:
        with database.begin() as session:
            predictions.delete_tweets(session, ["0002"], [], None, 10)
        return rows_of(*given)

    monkeypatch.setattr(backfill, "prediction_rows", rows_then_delete)
    rescore(database, settings, version, None, NO_STREAM)
    with database.read() as session:
        assert sorted(session.scalars(select(Prediction.tweet_id))) == ["0000", "0001", "0003", "0004"]


def test_since_takes_tweets_by_when_they_were_written_or_came(
    database: Database, settings: Settings, promote: Promote
) -> None:
    version = promote(database, model_store(settings).folder)
    new, old = datetime(2026, 5, 2, tzinfo=UTC), datetime(2026, 4, 1, tzinfo=UTC)
    keep(database, 2, first=0, tweet_created_at=old, received_at=new)
    keep(database, 3, first=10, tweet_created_at=new, received_at=new)
    keep(database, 4, first=20, received_at=new)
    keep(database, 5, first=30, received_at=old)
    assert rescore(database, settings, version, datetime(2026, 5, 1, tzinfo=UTC), NO_STREAM) == 7
    with database.read() as session:
        assert {row[:2] for row in session.scalars(select(Prediction.tweet_id))} == {"00"}
        assert sorted(session.scalars(select(Prediction.tweet_id)))[0] == "0010"


def test_new_tweets_come_first_and_a_stream_that_is_never_empty_only_slows(
    sqlite: Database, settings: Settings, promote: Promote, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = promote(sqlite, model_store(settings).folder)
    keep(sqlite, 4)
    looks = iter([Depth(9, 9, 0), Depth(3, 0, 3)])
    waited: list[bool] = []
    rescore(sqlite, settings, version, None, lambda: next(looks, Depth(0, 0, 0)),
            lambda done, total, waiting: waited.append(waiting))  # fmt: skip
    assert waited == [False, True, True, False]
    keep(sqlite, 4, first=100)
    monkeypatch.setattr(backfill, "MAX_WAIT_SECONDS", 0.3)
    began = time.monotonic()
    assert rescore(sqlite, settings, version, None, lambda: Depth(9, 9, 0)) == 4
    assert time.monotonic() - began >= 0.6  # once before the chunk, once before it sees there is none

    def away() -> Depth:
        raise StreamError("the server is away")

    keep(sqlite, 4, first=200)
    assert rescore(sqlite, settings, version, None, away) == 4


# --- the command


@pytest.fixture
def home(tmp_path: Path, promote: Promote, monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """A home with a champion, thirty tweets and no server."""
    monkeypatch.setenv("TWEETSCORE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TWEETSCORE_ENGINE", "torch-float32")
    settings = load_settings()
    database = open_sql(settings)
    version = promote(database, model_store(settings).folder)
    keep(database, 30)
    yield SimpleNamespace(settings=settings, database=database, version=version)
    database.close()


def test_the_command_rescores_rolls_back_compares_and_deletes(home: SimpleNamespace, tweetscore: Run) -> None:
    first = home.version
    done = tweetscore("rescore", "--model", str(first), "--since", "2020-01-01", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) | {"seconds": 0} == {"model_version_id": first, "scored": 30, "seconds": 0}
    assert "scored 0 stored tweets" in tweetscore("rescore", "--model", str(first)).stdout
    assert count(home.database, first) == 30

    with home.database.begin() as session:
        old = registry.get(session, first)
        folder = shutil.copytree(
            model_store(home.settings).folder / "tiny", model_store(home.settings).folder / "second"
        )
        second = registry.add_version(
            session,
            ModelVersion(base_model="tiny", artifact_url=folder.as_uri(), sha256=old.sha256, labels=LABELS,
                         cleaner_version="1"),
            [{"metric": "accuracy", "label": "", "value": 0.75}], [], [],
        ).id  # fmt: skip
    assert tweetscore("models", "promote", str(second)).returncode == 0
    back = tweetscore("models", "rollback", "--json")
    assert json.loads(back.stdout) == {"alias": "champion", "model_version_id": first}
    compared = json.loads(tweetscore("models", "compare", str(first), str(second), "--json").stdout)
    assert compared["metrics"] == [{"metric": "accuracy", "label": "", "values": [None, 0.75]}]
    assert compared["shared_test_rows"]["rows"] == 0
    assert "no test row in common" in tweetscore("models", "compare", str(first), str(second)).stdout

    refused = tweetscore("models", "delete", str(first))
    assert (refused.returncode, "is the champion" in refused.stderr) == (2, True)
    assert tweetscore("models", "delete", str(second)).returncode == 0
    assert not folder.exists()
    assert (model_store(home.settings).folder / "tiny").is_dir()
    assert f"model {second} was deleted" in tweetscore("rescore", "--model", str(second)).stderr
    listed = json.loads(tweetscore("models", "list", "--deleted", "--json").stdout)
    assert [(row["id"], row["deleted_at"] is not None) for row in listed] == [(second, True), (first, False)]
    assert len(json.loads(tweetscore("models", "list", "--json").stdout)) == 1
    shown = tweetscore("models", "show", str(first)).stdout
    assert shown.count("champion since") == 2


def test_a_model_at_the_store_itself_does_not_take_the_store_with_it(home: SimpleNamespace, tweetscore: Run) -> None:
    version = version_of(home.database)
    with home.database.begin() as session:
        registry.get(session, version).artifact_url = model_store(home.settings).folder.as_uri()
    assert tweetscore("models", "delete", str(version)).returncode == 2
    assert (model_store(home.settings).folder / "tiny").is_dir()


@pytest.mark.slow
def test_tensorboard_opens_on_the_folder_of_the_runs(home: SimpleNamespace, tweetscore: Run) -> None:
    refused = tweetscore("tensorboard", "--job", "1")
    assert (refused.returncode, "there is no run in" in refused.stderr) == (2, True)
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(home.settings.boards / "job-3")) as writer:
        writer.add_scalar("training loss", 0.5, 1)
    process = subprocess.Popen(
        [sys.executable, "-m", "worker.cli", "tensorboard", "--port", "0"], env=os.environ.copy(),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        url = next(found[0] for line in process.stdout if (found := re.search(r"http://127\.0\.0\.1:\d+/", line)))

        def runs() -> list[str]:
            with urllib.request.urlopen(f"{url}data/runs", timeout=PATIENCE_SECONDS) as answer:
                return json.load(answer)

        wait_until(lambda: runs() == ["job-3"])
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(PATIENCE_SECONDS)


# --- watching a job


def running_job(**fields: Any) -> TrainingJob:
    values: dict[str, Any] = {
        "request_id": "r", "dataset": "d", "config": {"epochs": 4}, "state": "running", "attempts": 1, "step": 100,
        "total_steps": 400, "loss": 0.5, "samples_per_second": 30.0, "data_report": {"sizes": {"train": 1000}},
    }  # fmt: skip
    return TrainingJob(**values | fields)


def test_the_pace_of_a_job_is_loss_rate_and_time_left_as_far_as_they_are_known() -> None:
    assert job_output.pace(running_job()) == "loss 0.500, 30 samples/s, 0:01:40 left"
    assert job_output.pace(running_job(samples_per_second=None)) == "loss 0.500"
    assert job_output.pace(running_job(state="queued", loss=None)) == ""


def test_a_job_is_followed_from_its_rows_alone_with_bar_epochs_rate_and_time_left(
    database: Database, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(output, "console", Console(file=screen, force_terminal=True, width=120))
    monkeypatch.setattr(job_output, "POLL_SECONDS", 0.02)
    with database.begin() as session:
        session.add(running_job(lease_expires_at=utc_now() + timedelta(minutes=5)))
        session.flush()
        job_id = session.scalars(select(TrainingJob.id)).one()
    looks = 0

    def watch() -> None:
        """Write what a trainer on another machine would write."""
        nonlocal looks
        looks += 1
        with database.begin() as session:
            job = jobs.get(session, job_id)
            if looks <= 2:
                session.add(EpochMetric(job_id=job_id, epoch=looks, train_loss=0.5, learning_rate=1e-4, valid_loss=0.25,
                                        valid_accuracy=0.5, valid_f1_macro=0.4375, seconds=3.0))  # fmt: skip
                job.step = 100 * (looks + 1)
            else:
                job.state, job.step = "succeeded", 400

    other = open_database(database_url)
    assert job_output.follow(other, job_id, watch).state == "succeeded"
    other.close()
    written = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    for wanted in ("running", "75%", "30 samples/s, 0:00:33 left", "0.4375", "100%"):
        assert wanted in written, wanted
    with database.read() as session:
        assert session.scalar(select(func.count()).select_from(Tweet)) == 0
