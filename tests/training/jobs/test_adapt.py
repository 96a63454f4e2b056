"""A job that adapts a base model to stored tweets: what it reads, how it can end, and what is trained on its result."""

import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

from db import jobs, predictions, registry
from db.models import BaseModel, ModelVersion, Tweet, utc_now
from db.session import Database, open_database
from tests.conftest import wait_until
from tests.support.adapting import base_model_of, store_tweets, submit_adapt
from tests.support.lossy import Door
from tests.support.rows import tweet_row
from tests.support.training_jobs import NEVER, count, job_of, left_in, running, submit
from tests.support.world import World, on_postgresql, on_sqlite
from training import failpoint
from training.config import make_config
from training.jobs import stored_tweets
from training.jobs.adapt import held_out_rows
from training.jobs.context import TrainingContext
from training.jobs.lease import Lease
from training.jobs.run import run_next_job
from training.model.artifact import load_artifact
from training.model.base_model import STARTER, STARTER_FOLDER, BaseModelFolder
from training.model.classifier import build_model
from training.store.store import Store
from training.text.tokenizer import load_tokenizer, mecab_dictionary


def weights_of(row: BaseModel) -> dict[str, torch.Tensor]:
    return load_file(Path(row.url) / "model.safetensors")


def assert_same(some: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> None:
    assert some.keys() == others.keys()
    assert [name for name in some if not torch.equal(some[name], others[name])] == []


def test_the_loss_on_held_out_tweets_falls_and_the_job_shows_what_it_read(
    database: Database, context: TrainingContext, tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored_tweets, "PAGE_TWEETS", 30)
    store_tweets(database)
    retweet = "RT @someone: 電車が遅れている。電車 https://t.co/x"  # of the first tweet
    with database.begin() as session:
        predictions.add_tweets(
            session,
            [
                tweet_row("a", text=retweet, lang="ja", received_at=utc_now()),
                tweet_row("b", text="the train is late", lang="en"),
                tweet_row("c", text="この仕事の後で届いた", received_at=utc_now() + timedelta(hours=1)),
            ],
        )
    job_id = submit_adapt(database, tiny_encoder)
    assert run_next_job(database, context, "here", NEVER) == job_id
    job, row = job_of(database, job_id), base_model_of(database, job_id)
    assert (job.state, job.error, job.kind, job.step) == ("succeeded", None, "adapt", job.total_steps)
    assert job.data_report == {
        "read": 71, "duplicates": 1, "rows": 70, "new_head": True,
        "sizes": {"train": row.tweets, "valid": 70 - row.tweets, "test": 0},
    }  # fmt: skip
    assert 60 <= row.tweets < 70
    assert row.base_model == str(tiny_encoder)
    assert row.loss_after < row.loss_before - 0.5
    assert Path(row.url).parent == context.input_store.folder / "encoders"
    assert (count(database, ModelVersion), left_in(context.jobs_folder)) == (0, [])


def test_the_newest_texts_up_to_the_limit_are_read(
    sqlite: Database, context: TrainingContext, tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored_tweets, "PAGE_TWEETS", 8)
    store_tweets(sqlite)
    with sqlite.begin() as session:  # so that pages end between tweets of the same time
        for tweet in session.query(Tweet):
            tweet.received_at = tweet.received_at.replace(second=0, microsecond=0, minute=tweet.received_at.minute // 7)
    with sqlite.read() as session:
        stored = session.query(Tweet).order_by(Tweet.received_at.desc(), Tweet.tweet_id.desc())
        expected = [tweet.text for tweet in stored]
    texts = stored_tweets.StoredTexts(sqlite, Lease(sqlite, 1, 1, 30, NEVER), utc_now(), "1")
    assert [found.text for found in texts] == expected
    job_id = submit_adapt(sqlite, tiny_encoder, tweets=25, epochs=1)
    run_next_job(sqlite, context, "here", NEVER)
    assert job_of(sqlite, job_id).data_report["rows"] == 25


def test_a_text_is_held_out_by_every_job() -> None:
    digests = torch.randint(-(2**63), 2**63 - 1, (3000,), generator=torch.Generator().manual_seed(0)).numpy()
    digests = digests.astype("uint64")
    some, all_ = digests[:1000], digests
    held_of_some, held_of_all = set(some[held_out_rows(some)].tolist()), set(all_[held_out_rows(all_)].tolist())
    assert held_of_some == held_of_all & set(some.tolist())
    assert 30 < len(held_of_some) < 75
    assert held_out_rows(digests.repeat(10)[:20000]).sum() == 500
    assert held_out_rows(digests[:3]).sum() == 1


def test_the_starter_keeps_its_pooler_and_its_dictionary_and_is_adapted_further(
    sqlite: Database, context: TrainingContext
) -> None:
    store_tweets(sqlite, 40)
    first = submit_adapt(sqlite, STARTER, epochs=1, learning_rate=1e-4)
    run_next_job(sqlite, context, "here", NEVER)
    assert (job_of(sqlite, first).state, job_of(sqlite, first).error) == ("succeeded", None)
    row = base_model_of(sqlite, first)
    adapted, info = AutoModel.from_pretrained(row.url, output_loading_info=True)
    starter = load_file(STARTER_FOLDER / "model.safetensors")
    assert (list(info["missing_keys"]), adapted.dtype) == ([], torch.float32)
    assert torch.equal(adapted.pooler.dense.weight, starter["pooler.dense.weight"].float())
    changed = adapted.state_dict()["encoder.layer.0.intermediate.dense.weight"]
    assert not torch.equal(changed, starter["encoder.layer.0.intermediate.dense.weight"].float())
    tokenizer = load_tokenizer(Path(row.url))
    assert mecab_dictionary(tokenizer) == "ipadic"
    assert tokenizer.get_vocab() == load_tokenizer(STARTER_FOLDER).get_vocab()
    model = build_model(BaseModelFolder("adapted", Path(row.url)), 2, make_config("fast"))
    assert model.config.pooling == "native"
    # The head was stored too: the second adaptation begins where the first ended.
    second = submit_adapt(sqlite, f"adapted:{row.id}", epochs=1, learning_rate=1e-4)
    run_next_job(sqlite, context, "here", NEVER)
    again = base_model_of(sqlite, second)
    assert job_of(sqlite, second).data_report["new_head"] is False
    assert again.base_model == f"adapted:{row.id}"
    assert again.loss_before == pytest.approx(row.loss_after, abs=1e-4)


def test_a_job_fine_tunes_the_adapted_base_model(
    sqlite: Database, context: TrainingContext, tiny_encoder: Path, labelled_csv: Path, base: dict[str, Any]
) -> None:
    store_tweets(sqlite)
    adapt = submit_adapt(sqlite, tiny_encoder, epochs=1)
    run_next_job(sqlite, context, "here", NEVER)
    row = base_model_of(sqlite, adapt)
    unchanged = {"epochs": 1, "learning_rate": 1e-12, "weight_decay": 0.0}
    job_id = submit(sqlite, labelled_csv, **{**base, **unchanged, "base_model": f"adapted:{row.id}"})
    run_next_job(sqlite, context, "here", NEVER)
    assert (job_of(sqlite, job_id).state, job_of(sqlite, job_id).error) == ("succeeded", None)
    with sqlite.read() as session:
        version = registry.of_job(session, job_id)
    assert version is not None
    assert version.base_model == f"adapted:{row.id}"
    artifact = load_artifact(context.model_store.place(version.artifact_url, version.sha256), version.sha256)
    fine_tuned, adapted = artifact.model.network.state_dict(), weights_of(row)
    name = "bert.encoder.layer.0.attention.self.query.weight"
    assert torch.allclose(fine_tuned[name], adapted[name], atol=1e-7)
    assert not torch.allclose(fine_tuned[name], load_file(tiny_encoder / "model.safetensors")[name[5:]], atol=1e-4)
    missing = submit(sqlite, labelled_csv, **{**base, "base_model": "adapted:9"})
    run_next_job(sqlite, context, "here", NEVER)
    assert "no base model adapted:9" in (job_of(sqlite, missing).error or "")


def test_an_adapted_base_model_in_a_remote_store_is_found_by_its_name(
    sqlite: Database, context: TrainingContext, tiny_encoder: Path, tmp_path: Path
) -> None:
    store = Store(f"memory://adapted-{tmp_path.name}", context.input_store._cache)
    context = replace(context, input_store=store)
    store_tweets(sqlite)
    first = submit_adapt(sqlite, tiny_encoder, epochs=1)
    run_next_job(sqlite, context, "here", NEVER)
    row = base_model_of(sqlite, first)
    assert row.url.startswith("memory://")
    second = submit_adapt(sqlite, f"adapted:{row.id}", epochs=1)
    run_next_job(sqlite, context, "here", NEVER)
    assert base_model_of(sqlite, second).loss_before == pytest.approx(row.loss_after, abs=1e-4)


@pytest.fixture
def slow_steps() -> Iterator[None]:
    failpoint.arm("stepped=pause:0.05")
    yield
    failpoint.arm("")


def test_a_stopped_job_is_resumed_to_the_result_of_an_unbroken_one(
    sqlite: Database, context: TrainingContext, tiny_encoder: Path, slow_steps: None
) -> None:
    store_tweets(sqlite)
    broken = submit_adapt(sqlite, tiny_encoder)
    stopping = threading.Event()
    with running(sqlite, context, broken, stopping):
        stopping.set()
    stopped = job_of(sqlite, broken)
    assert (stopped.state, stopped.attempts, count(sqlite, BaseModel)) == ("queued", 0, 0)
    assert 0 < stopped.step < stopped.total_steps
    failpoint.arm("")
    assert run_next_job(sqlite, context, "there", NEVER) == broken
    unbroken = submit_adapt(sqlite, tiny_encoder)
    run_next_job(sqlite, context, "here", NEVER)
    rows = [base_model_of(sqlite, job) for job in (broken, unbroken)]
    assert (rows[0].loss_before, rows[0].loss_after) == (rows[1].loss_before, rows[1].loss_after)
    assert_same(weights_of(rows[0]), weights_of(rows[1]))


def test_a_job_goes_on_when_tweets_were_deleted_since_it_was_stopped(
    sqlite: Database, context: TrainingContext, tiny_encoder: Path, slow_steps: None
) -> None:
    store_tweets(sqlite)
    job_id = submit_adapt(sqlite, tiny_encoder)
    stopping = threading.Event()
    with running(sqlite, context, job_id, stopping):
        stopping.set()
    with sqlite.begin() as session:
        predictions.delete_tweets(session, [f"{i:06d}" for i in range(40)], [], None, 100)
    failpoint.arm("")
    run_next_job(sqlite, context, "there", NEVER)
    job = job_of(sqlite, job_id)
    assert (job.state, job.step) == ("succeeded", job.total_steps)
    assert base_model_of(sqlite, job_id).tweets < 30


def test_a_cancelled_job_stops_and_leaves_nothing(
    database: Database, context: TrainingContext, tiny_encoder: Path, slow_steps: None
) -> None:
    store_tweets(database)
    job_id = submit_adapt(database, tiny_encoder, epochs=1000)
    with running(database, context, job_id, threading.Event()), database.begin() as session:
        jobs.request_cancel(session, job_id)
    assert (job_of(database, job_id).state, count(database, BaseModel)) == ("cancelled", 0)
    assert left_in(context.jobs_folder) == []


def test_a_job_that_another_worker_took_over_registers_nothing(
    sqlite: Database, context: TrainingContext, tiny_encoder: Path
) -> None:
    store_tweets(sqlite)
    job_id = submit_adapt(sqlite, tiny_encoder, epochs=1)
    failpoint.arm("artifact=pause:1")
    try:
        thread = threading.Thread(target=run_next_job, args=(sqlite, context, "here", NEVER))
        thread.start()
        wait_until(lambda: left_in(context.input_store.folder / "encoders"))
        with sqlite.begin() as session:
            jobs.get(session, job_id).lease_expires_at = utc_now() - timedelta(seconds=1)
            session.flush()
            assert jobs.claim(session, owner="there", lease_seconds=0, max_attempts=3) is not None
        thread.join()
    finally:
        failpoint.arm("")
    assert (job_of(sqlite, job_id).state, job_of(sqlite, job_id).fencing_token) == ("running", 2)
    assert count(sqlite, BaseModel) == 0
    assert run_next_job(sqlite, context, "there", NEVER) == job_id
    assert Path(base_model_of(sqlite, job_id).url, "config.json").is_file()
    assert len(left_in(context.input_store.folder / "encoders")) == 1  # both stored the same


@on_postgresql
def test_a_base_model_is_registered_once_when_the_answer_to_the_commit_is_lost(
    database: Database, database_url: str, context: TrainingContext, tiny_encoder: Path
) -> None:
    store_tweets(database)
    job_id = submit_adapt(database, tiny_encoder, epochs=1)
    with ExitStack() as stack:
        door = Door(database_url, Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ts", dir="/tmp"))))
        stack.callback(door.end)
        far = open_database(door.url)
        stack.callback(far.close)
        door.lose(b"INSERT INTO base_models", answer=True)
        assert run_next_job(far, context, "here", NEVER) == job_id
        assert door.lost.is_set()
    assert (job_of(database, job_id).state, count(database, BaseModel)) == ("succeeded", 1)


BAD_JOBS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "too few tweets": ({"tweets": 19}, ["19 stored tweets", "at least 20", "tweetscore push"]),
    "outside the roots": ({"base_model": "/etc"}, ["'/etc'", "TWEETSCORE_READ_ROOTS"]),
    "too long for the encoder": ({"max_length": 600}, ["max_length is 600", "512"]),
}


@pytest.mark.parametrize("case", BAD_JOBS)
def test_a_job_that_cannot_run_fails_with_a_sentence(
    sqlite: Database, context: TrainingContext, tiny_encoder: Path, case: str
) -> None:
    change, fragments = BAD_JOBS[case]
    store_tweets(sqlite)
    job_id = submit_adapt(sqlite, **{"base_model": tiny_encoder, **change})
    run_next_job(sqlite, context, "here", NEVER)
    job = job_of(sqlite, job_id)
    assert (job.state, count(sqlite, BaseModel)) == ("failed", 0)
    assert [fragment for fragment in fragments if fragment not in (job.error or "")] == []


@pytest.mark.slow
@on_sqlite
def test_the_job_of_a_killed_worker_is_resumed_by_another(world: World, tiny_encoder: Path) -> None:
    store_tweets(world.database)
    job_id = submit_adapt(world.database, tiny_encoder)
    world.killed_at("stepped=kill@14", "train", lease_seconds=2)
    assert world.finishes(job_id).attempts == 2
    unbroken = submit_adapt(world.database, tiny_encoder)
    world.finishes(unbroken)
    assert_same(weights_of(base_model_of(world.database, job_id)), weights_of(base_model_of(world.database, unbroken)))
