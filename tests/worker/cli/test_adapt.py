"""`tweetscore adapt` and what the other commands show of its jobs and of the base models that they make."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from db.session import Database
from tests.support.adapting import store_tweets
from tests.support.training_jobs import NEVER
from training.jobs.run import run_next_job
from worker.connections import training_context
from worker.settings import Settings

Run = Callable[..., subprocess.CompletedProcess[str]]


def test_stored_tweets_make_a_base_model_that_train_takes(
    tweetscore: Run, home_database: Database, settings: Settings, tiny_encoder: Path, labelled_csv: Path
) -> None:
    store_tweets(home_database)
    queued = tweetscore("adapt", "--base-model", str(tiny_encoder), "--epochs", "2", "--set", "learning_rate=0.003")
    assert (queued.returncode, "job 1 queued" in queued.stdout) == (0, True), queued.stderr
    run_next_job(home_database, training_context(settings), "here", NEVER)
    [listed] = json.loads(tweetscore("jobs", "list", "--json").stdout)
    assert (listed["kind"], listed["state"], listed["dataset"]) == ("adapt", "succeeded", "stored tweets")
    assert "adapt" in tweetscore("jobs", "list").stdout
    shown = tweetscore("jobs", "show", "1").stdout
    assert "70 different texts of 70 read, 0 copies or blank left out; training 6" in shown
    assert "a new one is trained too" in shown
    assert "next: tweetscore train FILE --base-model adapted:1" in shown
    [base] = json.loads(tweetscore("models", "bases", "--json").stdout)
    assert json.loads(tweetscore("jobs", "show", "1", "--json").stdout)["base_model"] == {
        key: value for key, value in base.items() if key != "name"
    }
    assert (base["name"], base["job_id"], base["loss_after"] < base["loss_before"]) == ("adapted:1", 1, True)
    assert f"{base['loss_before']:.4g} to {base['loss_after']:.4g}" in tweetscore("models", "bases").stdout
    trains = tweetscore("train", str(labelled_csv), "--base-model", "adapted:1", "--json")
    assert json.loads(trains.stdout)["config"]["base_model"] == "adapted:1"
    again = tweetscore("adapt", "--base-model", "adapted:1", "--json")
    assert json.loads(again.stdout)["config"]["base_model"] == "adapted:1"
    checked = tweetscore("data", "check", str(labelled_csv), "--json", TWEETSCORE_BASE_MODEL="adapted:1")
    assert checked.returncode == 0, checked.stderr
    examined = {
        c["name"]: c for c in json.loads(tweetscore("doctor", "--json", TWEETSCORE_BASE_MODEL="adapted:1").stdout)
    }
    assert examined["base model"] == {"name": "base model", "ok": True, "finding": f"adapted:1: {base['url']}"}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["adapt"], "there are 0 stored tweets in Japanese with different texts"),
        (["adapt", "--epochs", "0"], "epochs is 0"),
        (["adapt", "--set", "head=guide"], "head is not a setting; use one of base_model, base_revision, tweets"),
        (["train", "labelled.csv", "--base-model", "adapted:9"], "there is no base model adapted:9"),
    ],
)
def test_a_job_that_cannot_succeed_is_refused(
    tweetscore: Run, labelled_csv: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], sentence: str
) -> None:
    monkeypatch.chdir(labelled_csv.parent)
    refused = tweetscore(*arguments)
    assert (refused.returncode, len(refused.stderr.splitlines())) == (2, 1)
    assert sentence in refused.stderr
    assert json.loads(tweetscore("jobs", "list", "--json").stdout) == []
