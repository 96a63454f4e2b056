"""Training on labels of stored tweets, alone and beside the rows of a file."""

import json
import subprocess
import threading
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

import worker
from db import jobs
from db.session import Database
from tests.db.labelling.test_labels import give, label_row
from tests.support.rows import NOON, tweet_row, write
from training.errors import BadDataset
from training.jobs.run import run_next_job
from worker.connections import training_context
from worker.errors import BadRequest
from worker.labelling.train_from_labels import submit_from_labels
from worker.settings import Settings

Run = Callable[..., subprocess.CompletedProcess[str]]


def labelled_tweets(database: Database, count: int, **values: object) -> None:
    texts = {"positive": "とても嬉しい日だった", "negative": "とても悲しい日だった"}
    given = {str(i): list(texts)[i % 2] for i in range(count)}
    write(database, [tweet_row(id_, text=texts[label] + id_, **values) for id_, label in given.items()], [])
    give(database, *(label_row(id_, label) for id_, label in given.items()))


def rows_of(dataset: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(dataset).read_text(encoding="utf-8").splitlines()]


def test_a_job_trains_on_what_people_labelled_and_on_nothing_a_model_proposed(
    tweetscore: Run, settings: Settings, home_database: Database, tiny_encoder: Path
) -> None:
    labelled_tweets(home_database, 40, topic="映画")
    write(home_database, [tweet_row("p"), tweet_row("old", received_at=NOON - timedelta(days=9)), tweet_row("雨")], [])
    give(
        home_database,
        label_row("p", "positive", source="model"),
        label_row("old", "positive"),
        label_row("雨", "positive"),
        label_row("0", "negative", "b", minute=1), label_row("0", "negative", "c", minute=1),
    )  # fmt: skip
    since = (NOON - timedelta(days=1)).strftime("%Y-%m-%d")
    few = ["--base-model", str(tiny_encoder), "--epochs", "1", "--set", "add_sample=false"]
    queued = tweetscore("train", "--from-labels", "--since", since, "--topic", "映画", *few)
    assert (queued.returncode, "40 labelled tweets" in queued.stderr) == (0, True)
    assert run_next_job(home_database, training_context(settings), "here", threading.Event()) == 1
    with home_database.read() as session:
        job = jobs.get(session, 1)
    assert (job.state, job.error) == ("succeeded", None)
    assert job.data_report is not None
    assert job.data_report["rows"] == 40
    assert job.labels_until is not None
    assert job.labels_until <= job.submitted_at
    rows = rows_of(job.dataset)
    assert {row["tweet_id"] for row in rows} == {str(i) for i in range(40)}
    assert rows[0] == {"label": "negative", "text": "とても嬉しい日だった0", "tweet_id": "0"}  # two of three annotators
    assert job.dataset_sha256


def test_labels_in_the_database_win_over_the_rows_of_a_file(
    settings: Settings, home_database: Database, tmp_path: Path, tiny_encoder: Path
) -> None:
    labelled_tweets(home_database, 10)
    file = tmp_path / "more.csv"
    rows = [f"1,嬉しい{i}" if i % 2 else f"0,悲しい{i}" for i in range(20)]
    # The first tweet is labelled positive; the second row agrees with the label of its tweet.
    rows += ["0,RT @a: とても嬉しい日だった0 https://example.jp", "0,とても悲しい日だった1"]
    file.write_text("label,text\n" + "\n".join(rows) + "\n", encoding="utf-8")
    options: dict[str, Any] = {"base_model": str(tiny_encoder), "labels": {"0": "negative", "1": "positive"}}
    queued = submit_from_labels(settings, home_database, file, "fast", **options)
    assert (queued.tweets, queued.notes) == (
        10, ["1 rows of more.csv were left out: people gave their texts another label in the database"]
    )  # fmt: skip
    assert queued.job.data_report is not None
    sizes = {name: sum(found.values()) for name, found in queued.job.data_report["labels"].items()}
    assert (sizes, queued.job.data_report["duplicates"]) == ({"negative": 15, "positive": 15}, 1)
    assert queued.job.config["labels"] == {"negative": "negative", "positive": "positive"}
    give(home_database, label_row("3", "neutral", minute=5))
    with pytest.raises(BadDataset, match="tweet 3 is labelled 'neutral', which is none of"):
        submit_from_labels(settings, home_database, file, "fast", **options)


def test_it_says_what_is_missing(home_database: Database, tweetscore: Run) -> None:
    with pytest.raises(BadDataset, match="people labelled no stored tweet; label some"):
        worker.submit_training(from_labels=True)
    labelled_tweets(home_database, 6)
    with pytest.raises(BadDataset, match=r"label 'negative' has 3 distinct texts .* at least 4"):
        worker.submit_training(from_labels=True)
    with pytest.raises(BadDataset, match="no stored tweet of this time and topic"):
        worker.submit_training(from_labels=True, since=datetime(2030, 1, 1))  # noqa: DTZ001 - without a zone
    with pytest.raises(BadRequest, match="nothing to train on"):
        worker.submit_training()
    assert "give --from-labels" in tweetscore("train").stderr
    assert "give --from-labels with them" in tweetscore("train", "a.csv", "--topic", "雨").stderr
