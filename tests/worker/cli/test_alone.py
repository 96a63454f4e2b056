"""The command on a machine where nothing runs: it starts what it needs, and stops it again."""

import json
import shutil
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from db import jobs
from db.session import Database, open_database
from training.jobs.run import run_next_job
from worker.connections import input_store, training_context
from worker.settings import Settings
from worker.stream import embedded_valkey
from worker.stream.redis_client import connect
from worker.stream.stream import Stream

Run = Callable[..., subprocess.CompletedProcess[str]]


def running_on(home: Path) -> list[int]:
    return [p.pid for p in psutil.process_iter(["environ"]) if str(home) in str((p.info["environ"] or {}).values())]


@pytest.mark.slow
def test_training_with_wait_runs_a_worker_of_its_own(
    tweetscore: Run, settings: Settings, labelled_csv: Path, tiny_encoder: Path, tmp_path: Path
) -> None:
    encoder = shutil.copytree(tiny_encoder, tmp_path / "my encoder")
    ended = tweetscore("train", str(labelled_csv), "--base-model", str(encoder), "--epochs", "1", "--wait", "--json")
    assert ended.returncode == 0, ended.stderr
    told = json.loads(ended.stdout)
    assert told["state"] == "succeeded"
    assert {"metric": "accuracy", "label": ""}.items() <= next(
        m for m in told["metrics"] if m["metric"] == "accuracy"
    ).items()
    # The job worked on a copy: what the folder becomes later is no concern of its model's.
    assert Path(told["config"]["base_model"]).is_relative_to(input_store(settings).folder)
    assert embedded_valkey.find(settings.home) is None
    assert running_on(settings.home) == []


def test_the_guides_preset_trains_with_its_own_head_and_values(
    tweetscore: Run, settings: Settings, home_database: Database, labelled_csv: Path, tiny_encoder: Path
) -> None:
    """The guide's file: a header row whatever it says, then an integer label and a text."""
    rows = labelled_csv.read_text(encoding="utf-8").replace("positive", "1").replace("negative", "0")
    labelled_csv.write_text(rows.replace("label,text", "class,content"), encoding="utf-8")
    arguments = ["--preset", "guide", "--epochs", "2", "--labels", "0=negative,1=positive"]
    queued = tweetscore("train", str(labelled_csv), "--base-model", str(tiny_encoder), *arguments)
    assert queued.returncode == 0, queued.stderr
    assert run_next_job(home_database, training_context(settings), "here", threading.Event()) == 1
    told = json.loads(tweetscore("jobs", "show", "1", "--json").stdout)
    config = told["config"]
    assert (config["head"], config["loss"], config["max_length"], config["seed"]) == ("guide", "bce", 200, 200)
    assert (config["train_batch_size"], config["valid_batch_size"], config["test_batch_size"]) == (16, 8, 8)
    assert [epoch["learning_rate"] for epoch in told["epochs"]] == pytest.approx([1e-5, 0.75e-5])
    assert told["data_report"]["sizes"] == {"train": 48, "valid": 6, "test": 6}
    shown = json.loads(tweetscore("models", "show", str(told["model_version_id"]), "--json").stdout)
    assert shown["labels"] == ["negative", "positive"]


def test_a_job_without_a_worker_waits_and_says_so(tweetscore: Run, settings: Settings, labelled_csv: Path) -> None:
    ended = tweetscore("train", str(labelled_csv))
    assert ended.stdout.strip() == "job 1 queued; it waits for a worker: `tweetscore up`"
    with open_database(settings.sql_url).read() as session:
        job = jobs.get(session, 1)
    assert job.state == "queued"
    labelled_csv.write_text("label,text\n", encoding="utf-8")
    assert Path(job.dataset).read_text(encoding="utf-8").count("\n") == 61


def test_pushed_tweets_wait_in_the_stream_for_the_next_server(tweetscore: Run, settings: Settings) -> None:
    lines = "".join(json.dumps({"id": str(i), "text": f"{i}番目"}) + "\n" for i in range(1500)) + "{broken\n"
    ended = tweetscore("push", "-", stdin=lines)
    assert ended.returncode == 1
    assert "stdin, line 1501: the line is not JSON" in ended.stderr
    assert embedded_valkey.find(settings.home) is None
    with embedded_valkey.running(settings.home) as server:
        assert Stream(connect(server.url), "tweets", "scorers").length() == 1500


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train", "nothing.csv"], "nothing.csv; name a CSV"),
        (["push", "nothing.jsonl"], "there is no file nothing.jsonl"),
        (["jobs", "show", "9"], "there is no job 9"),
        (["models", "promote", "9"], "there is no model 9"),
        (["score", "-"], "there is no champion yet"),
        (["worker", "score"], "start `tweetscore up`"),
    ],
)
def test_a_users_mistake_is_one_sentence_and_exit_2(tweetscore: Run, arguments: list[str], says: str) -> None:
    ended = tweetscore(*arguments, stdin="")
    assert ended.returncode == 2
    assert says in ended.stderr
    assert "Traceback" not in ended.stderr
    assert len(ended.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("model", ["owner/../model", "../elsewhere", "a b/c"])
def test_a_base_model_that_cannot_be_one_leaves_no_job_behind(
    tweetscore: Run, settings: Settings, labelled_csv: Path, model: str
) -> None:
    ended = tweetscore("train", str(labelled_csv), "--base-model", model)
    assert ended.returncode == 2
    assert repr(model) in ended.stderr
    with open_database(settings.sql_url).read() as session:
        assert jobs.recent(session) == []
    assert not input_store(settings).folder.exists()
