"""`tweetscore tune`, with a tiny encoder and a few rows."""

import json
import random
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from db import jobs
from db.session import Database
from training.config import make_config
from training.data.dataset import read_rows, split_rows
from worker.settings import Settings

Run = Callable[..., subprocess.CompletedProcess[str]]

pytestmark = pytest.mark.usefixtures("home_database")


@pytest.fixture
def tune(tweetscore: Run, tiny_encoder: Path) -> Callable[..., Any]:
    """The document of a run with one split."""

    def run(dataset: Path, *arguments: str) -> Any:
        ended = tweetscore(
            "tune", str(dataset), "--base-model", str(tiny_encoder), "--splits", "1", "--json", *arguments
        )
        assert ended.returncode == 0, ended.stderr
        return json.loads(ended.stdout)

    return run


def noisy(path: Path) -> Path:
    """60 rows whose words do not always tell the label, so that figures differ with what is trained on."""
    choose = random.Random(3)
    words = {"positive": ["嬉しい", "楽しい", "最高"], "negative": ["悲しい", "最悪", "辛い"]}
    lines = ["label,text"]
    for i in range(60):
        label = ("positive", "negative")[i % 2]
        others = words[label] if choose.random() < 0.8 else words["positive"] + words["negative"]
        lines.append(f"{label},今日は{choose.choice(others)}日{i}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_a_job_with_the_best_values_is_queued_and_the_printed_command_gives_the_same(
    tune: Callable[..., Any], tweetscore: Run, settings: Settings, home_database: Database, tmp_path: Path
) -> None:
    dataset = noisy(tmp_path / "noisy.csv")
    fixed = ["--seed", "7", "--set", "epochs=2", "--set", "max_length=64"]
    first = tune(dataset, *fixed, "--trials", "2")
    assert [(trial["number"], trial["preset"]) for trial in sorted(first["trials"], key=lambda t: t["number"])] == [
        (0, True), (1, False),
    ]  # fmt: skip
    found = tune(dataset, *fixed, "--trials", "3", "--train")
    assert found["study"] == first["study"]
    assert [trial for trial in found["trials"] if trial["number"] < 2] == first["trials"]
    assert len(found["trials"]) == 3
    # Only the study is left: no weights and no checkpoints.
    assert sorted(path.name for path in (settings.home / "tune" / found["study"]).iterdir()) == ["lock", "study.db"]
    assert "epochs" not in found["best"]["parameters"]
    assert found["best"]["value"] == max(t["value"] for t in found["trials"] if t["state"] == "complete")
    assert found["best"]["value"] >= found["preset_value"]

    with home_database.read() as session:
        queued = jobs.get(session, found["job_id"])
    wanted = {"seed": 7, "epochs": 2, "max_length": 64, **found["best"]["parameters"]}
    assert wanted.items() <= queued.config.items()
    printed = tweetscore(*shlex.split(found["command"])[1:])
    assert printed.returncode == 0, printed.stderr
    with home_database.read() as session:
        again = jobs.recent(session)[0]
    assert (again.id, again.config, again.dataset_sha256) == (2, queued.config, queued.dataset_sha256)


def test_the_texts_of_test_rows_change_no_figure(tune: Callable[..., Any], tmp_path: Path) -> None:
    dataset = noisy(tmp_path / "noisy.csv")
    test_rows = split_rows(read_rows(dataset), make_config("fast")).test.row_numbers
    lines = dataset.read_text(encoding="utf-8").splitlines()
    for number in test_rows:
        label, _ = lines[number - 1].split(",")
        lines[number - 1] = f"{label},全く別の文{number}"
    other = tmp_path / "other.csv"
    other.write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert len(test_rows) == 6
    fixed = ["--set", "pooling=mean"]
    studies = [tune(path, "--trials", "5", *fixed) for path in (dataset, other)]
    figures = [[(trial["parameters"], trial["value"]) for trial in study["trials"]] for study in studies]
    assert figures[0] == figures[1]
    assert len({value for _, value in figures[0]}) > 1
    assert studies[0]["study"] != studies[1]["study"]


def test_the_time_limit_ends_a_trial_that_takes_longer(tweetscore: Run, labelled_csv: Path, tiny_encoder: Path) -> None:
    arguments = ["--base-model", str(tiny_encoder), "--minutes", "0.02", "--set", "epochs=1000"]
    ended = tweetscore("tune", str(labelled_csv), *arguments)
    assert ended.returncode == 2
    assert "no trial has finished yet; allow more --minutes" in ended.stderr
    assert len(ended.stderr.splitlines()) == 1


def test_results_are_shown_as_a_table_with_the_command_to_train(
    tweetscore: Run, labelled_csv: Path, tiny_encoder: Path
) -> None:
    arguments = ["--base-model", str(tiny_encoder), "--trials", "1", "--splits", "2", "--set", "epochs=1"]
    ended = tweetscore("tune", str(labelled_csv), *arguments)
    assert ended.returncode == 0, ended.stderr
    assert "2 trainings a trial, 12 validation rows; the test rows were not used" in ended.stdout
    assert "complete, preset" in ended.stdout
    assert "no values were better than the preset's" in ended.stdout
    assert f"tweetscore train {labelled_csv} --preset fast --base-model {tiny_encoder}" in ended.stdout
    assert ended.stderr.startswith("trial 0, the preset's values: complete, validation ")


def test_what_a_trial_does_not_train_on_is_refused(tweetscore: Run, labelled_csv: Path) -> None:
    refused = tweetscore("tune", str(labelled_csv), "--set", "folds=5")
    assert (refused.returncode, "give it to `tweetscore train`" in refused.stderr) == (2, True)


def test_without_optuna_it_names_the_extra(
    tweetscore: Run, labelled_csv: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    refused = tweetscore("tune", str(labelled_csv))
    assert (refused.returncode, refused.stderr) == (
        2,
        "error: tuning needs Optuna, which is not installed; `pip install 'tweetscore[tune]'`\n",
    )
