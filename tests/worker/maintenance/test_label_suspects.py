"""`data check --suspects`: flipped labels are found, by a cross-validation or by a model."""

import csv
import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from db.session import Database
from training.errors import LabelCheckUnavailable
from training.evaluation.label_errors import rank_label_errors
from training.jobs.run import run_next_job
from worker.connections import training_context
from worker.intake.submit_job import submit_training
from worker.settings import Settings

Run = Callable[..., subprocess.CompletedProcess[str]]
# Row 2 is the first below the header.
FLIPPED = [5, 14, 31, 40, 58, 67]
WORDS = {"positive": "嬉しい", "negative": "悲しい"}


def write_with_flipped_labels(path: Path) -> Path:
    """72 easy rows of two labels; those in `FLIPPED` have the other one."""
    lines = []
    for number in range(2, 74):
        actual, other = list(WORDS) if number % 2 else list(WORDS)[::-1]
        lines.append(f"{other if number in FLIPPED else actual},とても{WORDS[actual]}日だった{number}\n")
    path.write_text("label,text\n" + "".join(lines), encoding="utf-8")
    return path


@pytest.fixture
def train(settings: Settings, home_database: Database, tiny_encoder: Path) -> Callable[..., None]:
    def run(path: Path, **options: Any) -> None:
        wanted = {"base_model": str(tiny_encoder), "pooling": "mean", "baseline": False, **options}
        submit_training(settings, home_database, path, "fast", **wanted)
        assert run_next_job(home_database, training_context(settings), "here", threading.Event()) is not None

    return run


def listed(said: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert said.returncode == 0, said.stderr
    return json.loads(said.stdout)


def test_flipped_labels_are_found_by_the_cross_validation_of_the_files_own_job(
    train: Callable[..., None], tweetscore: Run, tmp_path: Path
) -> None:
    path = write_with_flipped_labels(tmp_path / "flipped.csv")
    train(path, folds=3, epochs=4, learning_rate=1e-2, train_batch_size=8)
    found = listed(tweetscore("data", "check", str(path), "--suspects", "1", "--json"))
    rows = [suspect["row"] for suspect in found["suspects"]]
    right = len(set(rows) & set(FLIPPED))
    assert right / len(FLIPPED) == 1, rows
    assert right / len(rows) >= 0.8, rows
    assert (found["out_of_fold"], found["rows"], found["found"]) == (True, 72, len(rows))
    assert "the cross-validation of job 1" in found["notes"][0]
    first = found["suspects"][0]
    assert {first["given"], first["suggested"]} == set(WORDS)
    assert WORDS[first["suggested"]] in first["text"]
    assert 0 <= first["given_probability"] < 0.5 < first["suggested_probability"] <= 1

    # A sheet to correct them in.
    sheet = tmp_path / "correct.csv"
    shown = tweetscore("data", "check", str(path), "--suspects", "1", "--limit", "2", "--output", str(sheet))
    assert shown.returncode == 0, shown.stderr
    assert f"{len(rows)} of 72 rows of flipped.csv are probably mislabelled; the first 2" in shown.stdout
    with sheet.open(encoding="utf-8-sig", newline="") as file:
        written = list(csv.DictReader(file))
    assert [(int(row["row"]), row["given"], row["suggested"], row["corrected"], row["text"]) for row in written] == [
        (s["row"], s["given"], s["suggested"], "", s["text"]) for s in found["suspects"][:2]
    ]

    # The model that was kept, on a file that it does not know.
    other = tmp_path / "other.csv"
    lines = ["label,text", *(f"{label},本当に{WORDS[label]}ね{i}" for i in range(8) for label in WORDS)]
    lines += ["negative,本当に嬉しいよ", "positive,", "positive,=本当に嬉しい"]
    other.write_text("\n".join(lines) + "\n", encoding="utf-8")
    found = listed(tweetscore("data", "check", str(other), "--suspects", "1", "--json"))
    assert (found["out_of_fold"], found["rows"], found["notes"]) == (False, 18, ["probabilities of model 1"])
    assert [(s["row"], s["given"], s["suggested"]) for s in found["suspects"]] == [(18, "negative", "positive")]
    other.write_text("label,text\nhappy,嬉しい\n", encoding="utf-8")
    refused = tweetscore("data", "check", str(other), "--suspects", "1")
    assert (refused.returncode, len(refused.stderr.splitlines())) == (2, 1)
    assert "label 'happy' in row 2 is none of negative, positive" in refused.stderr


def test_a_model_that_was_trained_on_the_file_says_that_it_hides_errors(
    train: Callable[..., None], tweetscore: Run, tmp_path: Path
) -> None:
    path = write_with_flipped_labels(tmp_path / "flipped.csv")
    train(path, epochs=1)
    shown = tweetscore("data", "check", str(path), "--suspects", "1")
    assert shown.returncode == 0, shown.stderr
    assert "probabilities of model 1\nthe model was trained on rows of this file" in shown.stdout
    assert "--folds 5" in shown.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--suspects", "9"], "there is no model 9"),
        (["--output", "a.csv"], "--output is for --suspects"),
    ],
)
def test_a_mistake_is_one_sentence(
    tweetscore: Run, home_database: Database, labelled_csv: Path, arguments: list[str], says: str
) -> None:
    refused = tweetscore("data", "check", str(labelled_csv), *arguments)
    assert (refused.returncode, len(refused.stderr.strip().splitlines())) == (2, 1)
    assert says in refused.stderr


def test_a_missing_package_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cleanlab.filter", None)
    with pytest.raises(LabelCheckUnavailable, match=r"`pip install 'tweetscore\[labels\]'`"):
        rank_label_errors(np.eye(2, dtype=np.float32), np.eye(2, dtype=np.float32), "single_label")


@pytest.mark.parametrize("task", ["single_label", "multi_label"])
def test_only_wrong_labels_are_ranked_when_the_probabilities_are_clear(task: str) -> None:
    generator = np.random.default_rng(0)
    truth = np.eye(3, dtype=np.float32)[generator.integers(0, 3, 300)]
    if task == "multi_label":
        truth = (generator.random((300, 3)) < 0.4).astype(np.float32)
    probabilities = (np.where(truth == 1, 0.9, 0.05) + generator.uniform(-0.04, 0.04, truth.shape)).astype(np.float32)
    if task == "single_label":
        probabilities /= probabilities.sum(axis=1, keepdims=True)
    given, wrong = truth.copy(), set(range(5, 300, 12))
    for row in wrong:  # another label, or one more or less
        given[row] = np.roll(truth[row], 1) if task == "single_label" else np.abs(truth[row] - [1, 0, 0])
    ranked = rank_label_errors(given, probabilities, task)
    assert set(ranked) <= wrong
    assert len(ranked) >= 0.8 * len(wrong)
    if task == "single_label":
        assert ranked == sorted(ranked, key=lambda row: (given[row] * probabilities[row]).sum())
    assert rank_label_errors(truth, probabilities, task) == []
