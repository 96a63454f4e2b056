"""Jobs that learn from the probabilities of a teacher, on labelled rows and on stored tweets."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sqlalchemy import select
from transformers import BertConfig, BertModel

from db import registry
from db.models import TestPrediction, TrainingJob
from db.session import Database, open_database
from tests.conftest import LABELS, write_labelled
from tests.support.training_jobs import NEVER, context_in, count, job_of, submit
from tests.support.unlabelled import EASY, easy_tweets, failing, run, same_weights, shown, store_tweets, version_of
from training import failpoint
from training.jobs import run as run_module
from training.jobs.context import TrainingContext
from training.jobs.run import run_next_job
from training.jobs.unlabelled import labels
from training.loop.fit import FitInputs, fit
from training.model.artifact import load_artifact
from training.model.base_model import STARTER_FOLDER
from training.model.batching import pad
from training.store.cache import Cache
from training.store.paths import file_sha256
from training.store.store import RemoteStore, Store
from training.text.cleaning import clean
from training.text.tokenizer import encode, load_tokenizer
from worker.connections import training_context
from worker.settings import Settings


@pytest.fixture
def smaller_encoder(tmp_path: Path) -> Path:
    """Half as wide as the tiny one, with one layer."""
    folder = tmp_path / "smaller"
    tokenizer = load_tokenizer(STARTER_FOLDER)
    torch.manual_seed(3)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory, migrated_file: Path, tiny_encoder: Path) -> Path:
    """A folder with a database and a store of models, in which a job trained a model well."""
    folder = tmp_path_factory.mktemp("taught")
    database = open_database(f"sqlite:///{shutil.copyfile(migrated_file, folder / 'taught.db')}")
    dataset = write_labelled(folder / "labelled.csv")
    context = context_in(folder, tiny_encoder)
    run(database, context, submit(database, dataset, file_sha256(dataset), base_model=str(tiny_encoder), **EASY))
    database.close()
    return folder


@pytest.fixture
def teacher(sqlite: Database, context: TrainingContext, tmp_path: Path, taught: Path) -> int:
    """The version of that model, in this test's database and store."""
    shutil.copyfile(taught / "taught.db", tmp_path / "only.db")  # no connection has opened the file yet
    shutil.copytree(taught / "models", context.model_store.folder)
    with sqlite.begin() as session:
        [version] = registry.versions(session)
        version.artifact_url = context.model_store.url_of(version.artifact_url.rpartition("/")[2])
        return version.id


def test_a_student_learns_from_its_teacher_and_both_are_compared(
    sqlite: Database,
    context: TrainingContext,
    labelled_csv: Path,
    smaller_encoder: Path,
    teacher: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store_tweets(sqlite, easy_tweets(40))
    options = {**EASY, "base_model": str(smaller_encoder), "teacher": teacher, "unlabelled": 40}
    job = run(sqlite, context, submit(sqlite, labelled_csv, file_sha256(labelled_csv), **options))
    report = job.data_report or {}
    assert report["unlabelled"] == {"asked": 40, "found": 40}
    assert "notes" not in report
    found = report["distillation"]
    version = version_of(sqlite, job.id)
    with sqlite.read() as session:
        figures = {
            name: registry.metrics(session, id_) for name, id_ in (("teacher", teacher), ("student", version.id))
        }
    for name, measured in figures.items():
        assert found[name]["accuracy"] == pytest.approx(measured["accuracy", ""])
        assert found[name]["f1_macro"] == pytest.approx(measured["f1_macro", ""])
        assert found[name]["tweets_per_second"] > 0
    assert (found["teacher_model"], found["test_rows"], found["same_test_rows"]) == (teacher, 6, True)
    artifact = load_artifact(Path(version.artifact_url.removeprefix("file://")))
    assert found["student"]["parameters"] == sum(p.numel() for p in artifact.model.parameters())
    assert found["student"]["parameters"] < found["teacher"]["parameters"]
    weights = (artifact.folder / "model.safetensors").stat().st_size
    assert found["student"]["bytes"] == pytest.approx(weights, rel=0.02)
    with sqlite.read() as session:
        tested = [
            {
                row.row_number: row.predicted
                for row in session.scalars(select(TestPrediction).filter_by(model_version_id=id_))
            }
            for id_ in (teacher, version.id)
        ]
    agreement = np.mean([tested[0][row] == tested[1][row] for row in tested[0]])
    assert found["agreement"] == pytest.approx(agreement)
    for text in (shown(sqlite, job, monkeypatch), (artifact.folder / "README.md").read_text(encoding="utf-8")):
        assert f"Teacher (model {teacher}) and student on 6 test rows; they agree on {agreement:.1%}" in text
        assert "Tweets per second (cpu)" in text


def test_the_targets_are_the_teachers_probabilities_in_the_order_of_the_datasets_labels(
    sqlite: Database,
    context: TrainingContext,
    labelled_csv: Path,
    tiny_encoder: Path,
    teacher: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The dataset's labels are in the other order, and its cleaner is another one than the teacher's."""
    store_tweets(sqlite, easy_tweets(20))
    given: list[FitInputs] = []
    monkeypatch.setattr(
        run_module, "fit", lambda model, inputs, **rest: given.append(inputs) or fit(model, inputs, **rest)
    )
    options = {
        **EASY, "base_model": str(tiny_encoder), "teacher": teacher, "unlabelled": 20, "cleaner": "1",
        "labels": {"positive": "positive", "negative": "negative"}, "soft_temperature": 3.0, "teacher_share": 0.25,
        "unlabelled_weight": 0.5,
    }  # fmt: skip
    run(sqlite, context, submit(sqlite, labelled_csv, **options))
    [inputs] = given
    soft = inputs.soft
    assert soft is not None
    assert inputs.labels == ["positive", "negative"]
    assert (len(inputs.train), len(inputs.train_rows), soft.temperature) == (68, 68, 3.0)
    assert soft.shares.tolist() == [0.25] * 48 + [1.0] * 20
    assert list(inputs.train.weights) == [1.0] * 48 + [0.5] * 20
    with sqlite.read() as session:
        version = registry.get(session, teacher)
    artifact = load_artifact(Path(version.artifact_url.removeprefix("file://")))
    assert artifact.spec.labels == ["negative", "positive"]
    for i in (0, 47, 48, 67):
        ids, mask = pad(encode(artifact.tokenizer, [clean(inputs.train.texts[i], "2")], 200), 0)
        with torch.inference_mode():
            expected = (artifact.model(ids, mask)[0] / 3.0).softmax(0).numpy()[::-1]
        assert soft.probabilities[i].numpy() == pytest.approx(expected, abs=2e-3)


def test_a_student_whose_job_failed_is_not_labelled_again_and_ends_the_same(
    sqlite: Database,
    context: TrainingContext,
    labelled_csv: Path,
    smaller_encoder: Path,
    teacher: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(labels, "CHUNK_ROWS", 16)
    store_tweets(sqlite, easy_tweets(40))
    options = {**EASY, "base_model": str(smaller_encoder), "teacher": teacher, "unlabelled": 40}
    whole = run(sqlite, context, submit(sqlite, labelled_csv, **options))
    job_id = submit(sqlite, labelled_csv, **options)
    failing(sqlite, context, job_id, "labelled=fail@3")
    failing(sqlite, context, job_id, "stepped=fail@15, labelled=fail@5")  # six chunks, three of them stored
    failpoint.arm("labelled=fail")
    try:
        job = run(sqlite, context, job_id)
    finally:
        failpoint.arm("")
    assert same_weights(version_of(sqlite, whole.id), version_of(sqlite, job.id))


@pytest.mark.slow
def test_another_machine_uses_the_labels_that_were_mirrored_with_the_checkpoints(
    sqlite: Database, context: TrainingContext, labelled_csv: Path, tiny_encoder: Path, tmp_path: Path, teacher: int
) -> None:
    store = Store(f"memory://{tmp_path.name}", Cache(tmp_path / "far", 1_000_000_000))
    machines = [replace(context, jobs_folder=tmp_path / name, checkpoint_store=store) for name in ("one", "other")]
    job_id = submit(sqlite, labelled_csv, **EASY, base_model=str(tiny_encoder), teacher=teacher)
    failing(sqlite, machines[0], job_id, "evaluated=fail")
    failpoint.arm("labelled=fail, stepped=fail")
    try:
        run(sqlite, machines[1], job_id)
    finally:
        failpoint.arm("")
    assert RemoteStore(store.url_of(str(job_id))).names() == []


@pytest.mark.slow
def test_damaged_labels_are_computed_again(
    sqlite: Database, context: TrainingContext, labelled_csv: Path, tiny_encoder: Path, teacher: int
) -> None:
    options = {**EASY, "base_model": str(tiny_encoder), "teacher": teacher}
    whole = run(sqlite, context, submit(sqlite, labelled_csv, **options))
    job_id = submit(sqlite, labelled_csv, **options)
    failing(sqlite, context, job_id, "evaluated=fail")
    [stored] = (context.jobs_folder / str(job_id)).glob("labels-*/labels.safetensors")
    stored.write_bytes(stored.read_bytes()[:-1] + b"x")
    job = run(sqlite, context, job_id)
    assert same_weights(version_of(sqlite, whole.id), version_of(sqlite, job.id))


@pytest.mark.parametrize("changed", [{"seed": 5}, pytest.param({}, marks=pytest.mark.slow)])
def test_a_teacher_that_may_know_the_test_rows_is_said_to_be_too_good(
    changed: dict[str, Any],
    sqlite: Database,
    context: TrainingContext,
    labelled_csv: Path,
    tiny_encoder: Path,
    teacher: int,
) -> None:
    if not changed:  # the same rows in another file
        labelled_csv.write_text(labelled_csv.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    options = {**EASY, "base_model": str(tiny_encoder), "teacher": teacher, **changed}
    job = run(sqlite, context, submit(sqlite, labelled_csv, **options))
    report = job.data_report or {}
    assert report["distillation"]["same_test_rows"] is False
    assert "may have been trained on some of them" in report["notes"][0]


def test_a_teacher_with_other_labels_or_another_task_is_refused(
    sqlite: Database, context: TrainingContext, labelled_csv: Path, tiny_encoder: Path, teacher: int
) -> None:
    renamed = {"positive": "good", "negative": "bad"}
    cases = {
        "the labels negative, positive, but the dataset has good, bad": {"labels": renamed},
        "there is no model 77": {"teacher": 77},
        "was trained for the task single_label, and this job is for multi_label": {"task": "multi_label"},
    }
    for reason, options in cases.items():
        job_id = submit(
            sqlite, labelled_csv, **{**EASY, "base_model": str(tiny_encoder), "teacher": teacher, **options}
        )
        run_next_job(sqlite, context, "here", NEVER)
        job = job_of(sqlite, job_id)
        assert job.state == "failed"
        assert reason in (job.error or "")


@pytest.mark.slow
def test_an_untrained_teacher_without_a_job_can_teach(
    sqlite: Database,
    context: TrainingContext,
    tmp_path: Path,
    tiny_encoder: Path,
    promote: Callable[..., int],
) -> None:
    version_id = promote(sqlite, context.model_store.folder)
    path = tmp_path / "three.csv"
    rows = [f"{LABELS[i % 3]},今日のこと{i}" for i in range(60)]
    path.write_text("label,text\n" + "\n".join(rows) + "\n", encoding="utf-8")
    job = run(sqlite, context, submit(sqlite, path, **EASY, base_model=str(tiny_encoder), teacher=version_id))
    assert (job.data_report or {})["distillation"]["same_test_rows"] is False


# --- the command


def test_distil_takes_dataset_and_split_from_the_teachers_job(
    tweetscore: Callable[..., Any], settings: Settings, home_database: Database, labelled_csv: Path, tiny_encoder: Path
) -> None:
    arguments = ["--base-model", str(tiny_encoder), "--epochs", "1", "--seed", "7", "--set", "baseline=false"]
    arguments += ["--labels", "negative=bad,positive=good", "--set", "train_size=0.7"]
    assert tweetscore("train", str(labelled_csv), *arguments).returncode == 0
    assert run_next_job(home_database, training_context(settings), "here", NEVER) == 1
    labelled_csv.unlink()
    store_tweets(home_database, easy_tweets(30))
    student = ["--student", str(tiny_encoder), "--epochs", "2", "--tweets", "20", "--temperature", "4"]
    queued = tweetscore("distil", "--teacher", "1", *student, "--set", "baseline=false", "--json")
    assert queued.returncode == 0, queued.stderr
    config = json.loads(queued.stdout)["config"]
    expected = {"teacher": 1, "unlabelled": 20, "soft_temperature": 4, "seed": 7, "train_size": 0.7, "epochs": 2}
    assert expected.items() <= config.items()
    assert run_next_job(home_database, training_context(settings), "here", NEVER) == 2
    told = json.loads(tweetscore("jobs", "show", "2", "--json").stdout)
    assert told["data_report"]["distillation"]["same_test_rows"] is True
    assert "Teacher (model 1) and student on" in tweetscore("models", "show", "2").stdout
    shown = json.loads(tweetscore("models", "show", "2", "--json").stdout)
    assert shown["distillation"] == told["data_report"]["distillation"]


def test_distil_refuses_before_it_queues_a_job(
    tweetscore: Callable[..., Any],
    home_database: Database,
    settings: Settings,
    labelled_csv: Path,
    promote: Callable[..., int],
) -> None:
    version_id = promote(home_database, settings.home / "models")
    cases = {
        ("9",): "there is no model 9",
        (str(version_id),): f"model {version_id} was not trained by a job; name labelled rows with --dataset",
        (str(version_id), "--dataset", str(labelled_csv)): "but the dataset has negative, positive",
    }
    for arguments, reason in cases.items():
        refused = tweetscore("distil", "--teacher", *arguments, "--student", "starter")
        assert (refused.returncode, reason in refused.stderr) == (2, True), refused.stderr
    assert count(home_database, TrainingJob) == 0
