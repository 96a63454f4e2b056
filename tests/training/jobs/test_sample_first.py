"""A job with few labels learns the sample first; the next one with the same settings finds it in the cache."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from db import jobs
from db.session import Database
from tests.conftest import wait_until
from tests.support.training_jobs import NEVER, job_of, left_in, running, submit
from training import failpoint
from training.config import make_config
from training.data import sample
from training.data.dataset import Dataset, read_rows, split_rows
from training.jobs.context import TrainingContext
from training.jobs.run import prepare, run_next_job
from training.loop.checkpoints import Checkpoints
from training.loop.fit import Hooks, fit
from training.loop.sample_base import sample_trained
from training.model.base_model import BaseModelFolder
from training.model.classifier import build_model
from training.model.devices import pick_device
from training.store.cache import Cache

LABELS = ("negative", "neutral", "positive")
WORDS = {"negative": "悲しい", "neutral": "普通", "positive": "嬉しい"}


def write(path: Path, rows: int, text: str) -> Path:
    lines = [f"{label},{text}{WORDS[label]}{i}" for i in range(rows) for label in LABELS]
    path.write_text("label,text\n" + "\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def small_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """80 tweets of each label: 228 to train on in 8 steps an epoch, and 12 that are held out."""
    path = write(tmp_path / "small-sample.csv", 80, "今日も")
    monkeypatch.setattr(sample, "LABELLED", path)
    return path


@pytest.fixture
def own(tmp_path: Path) -> Path:
    return write(tmp_path / "own.csv", 10, "自分は")


@pytest.fixture
def settings(tiny_encoder: Path) -> dict[str, Any]:
    return {"base_model": str(tiny_encoder), "epochs": 2, "baseline": False, "learning_rate": 3e-3}


def notes_of(database: Database, job_id: int) -> str:
    return " ".join((job_of(database, job_id).data_report or {}).get("notes", ()))


def steps_of_run(database: Database, context: TrainingContext) -> int:
    failpoint.arm("stepped=pause:0")
    try:
        run_next_job(database, context, "here", NEVER)
        return failpoint._armed["stepped"].passed
    finally:
        failpoint.arm("")


SAMPLE_STEPS, OWN_STEPS = 6 * 15, 4


def test_the_second_job_does_not_learn_the_sample_again(
    sqlite: Database, context: TrainingContext, small_sample: Path, own: Path, settings: dict[str, Any]
) -> None:
    first, second = submit(sqlite, own, **settings), submit(sqlite, own, **settings)
    assert steps_of_run(sqlite, context) == SAMPLE_STEPS + OWN_STEPS
    job = job_of(sqlite, first)
    assert (job.state, job.step, job.total_steps) == (
        "succeeded",
        SAMPLE_STEPS + OWN_STEPS,
        SAMPLE_STEPS + OWN_STEPS,
    ), job.error
    assert job.data_report is not None
    assert (job.data_report["sample_rows"], job.data_report["sample_row_passes"]) == (228, 6 * 228)
    assert "first learned 228 tweets of tweetscore's sample (`add_sample`)" in notes_of(sqlite, first)
    assert steps_of_run(sqlite, context) == OWN_STEPS
    assert "by an earlier job" in notes_of(sqlite, second)
    assert (job_of(sqlite, second).step, job_of(sqlite, second).total_steps) == (4, 4)
    # Other settings give other weights.
    submit(sqlite, own, **{**settings, "seed": 3})
    assert steps_of_run(sqlite, context) == SAMPLE_STEPS + OWN_STEPS
    assert left_in(context.jobs_folder) == []


def test_a_stopped_job_goes_on_within_the_sample(
    sqlite: Database,
    context: TrainingContext,
    small_sample: Path,
    own: Path,
    settings: dict[str, Any],
    request: pytest.FixtureRequest,
) -> None:
    job_id = submit(sqlite, own, **settings)
    stopping = threading.Event()
    failpoint.arm("stepped=pause:0.1")
    request.addfinalizer(lambda: failpoint.arm(""))
    with running(sqlite, context, job_id, stopping):
        stopping.set()
    assert job_of(sqlite, job_id).state == "queued"
    done = job_of(sqlite, job_id).step
    assert any(name.startswith("step-") for name in left_in(context.jobs_folder / str(job_id) / "part0"))
    with running(sqlite, context, job_id, threading.Event()):
        wait_until(lambda: job_of(sqlite, job_id).step > done)
        with sqlite.begin() as session:
            jobs.request_cancel(session, job_id)
    assert job_of(sqlite, job_id).state == "cancelled"
    assert left_in(context.jobs_folder) == []


def trained(
    cache: Cache, encoder: Path, data: Dataset, settings: dict[str, Any], checkpoints: Path
) -> tuple[Path, list[int]]:
    """The folder of the base model that learned the sample, and the row passes that were due."""
    due: list[int] = []
    with sample_trained(
        cache, BaseModelFolder("tiny", encoder), data, make_config("fast", **settings), pick_device("cpu"),
        Checkpoints(checkpoints), lambda step, total, loss, rate: None, lambda rows, passes: due.append(passes),
    ) as base:  # fmt: skip
        return base.folder, due


def test_the_head_is_kept_where_it_can_be(
    small_sample: Path, own: Path, settings: dict[str, Any], tiny_encoder: Path, tmp_path: Path
) -> None:
    cache, data = Cache(tmp_path / "cache", 10**9), split_rows(read_rows(own), make_config("fast", **settings))
    folder, due = trained(cache, tiny_encoder, data, {**settings, "pooling": "native"}, tmp_path / "c")
    assert due == [6 * 228]
    config = make_config("fast", **{**settings, "pooling": "native"})
    heads = [
        build_model(BaseModelFolder("tiny", folder), 3, config.model_copy(update={"seed": seed})).network.classifier
        for seed in (1, 2)
    ]
    assert heads[0].weight.equal(heads[1].weight)
    assert trained(cache, tiny_encoder, data, {**settings, "pooling": "native"}, tmp_path / "c") == (folder, [0])
    # A damaged copy is made again.
    (folder / "model.safetensors").write_bytes(b"torn")
    assert trained(cache, tiny_encoder, data, {**settings, "pooling": "native"}, tmp_path / "c") == (folder, [6 * 228])


@pytest.mark.parametrize("share", [0.0, 0.25])
def test_the_weights_that_are_kept_are_a_mean_of_those_before_and_after_the_own_rows(
    small_sample: Path, own: Path, settings: dict[str, Any], tiny_encoder: Path, tmp_path: Path, share: float
) -> None:
    config = make_config("fast", **{**settings, "pooling": "native"}, sample_share=share)
    data = split_rows(read_rows(own), config)
    with sample_trained(
        Cache(tmp_path / "cache", 10**9), BaseModelFolder("tiny", tiny_encoder), data, config, pick_device("cpu"),
        Checkpoints(tmp_path / "c"), lambda step, total, loss, rate: None, lambda rows, passes: None,
    ) as base:  # fmt: skip
        prepared = prepare(base, data, config, "cpu")
        before = {name: value.clone() for name, value in prepared.model.state_dict().items()}
        checkpoints = Checkpoints(tmp_path / "job")
        for _ in range(2):  # the second time the run only loads its result
            fit(
                prepared.model, prepared.fit_inputs(data), device=prepared.device, checkpoints=checkpoints,
                board_folder=None, hooks=Hooks(),
            )  # fmt: skip
            kept = {name: value.clone() for name, value in prepared.model.state_dict().items()}
            best = max((tmp_path / "job").glob("best-*"))
            checkpoints.load_best(best.name, prepared.model)
            for name, after in prepared.model.state_dict().items():
                torch.testing.assert_close(kept[name], share * before[name] + (1 - share) * after)
            assert not kept["hugging_face.classifier.weight"].equal(before["hugging_face.classifier.weight"])
            prepared.model.load_state_dict(before)


def test_a_dataset_with_other_labels_keeps_its_base_model(
    small_sample: Path, labelled_csv: Path, settings: dict[str, Any], tiny_encoder: Path, tmp_path: Path
) -> None:
    data = split_rows(read_rows(labelled_csv), make_config("fast", **settings))
    cache = Cache(tmp_path / "cache", 10**9)
    assert trained(cache, tiny_encoder, data, settings, tmp_path / "c") == (tiny_encoder, [])
    assert not (tmp_path / "cache").exists()
