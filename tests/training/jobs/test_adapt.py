"""A job that adapts a base model to stored tweets: what it reads, how it can end, and what trains on its result."""

import threading
import uuid
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, DistilBertConfig, DistilBertModel, GPT2Config, GPT2Model

from db import jobs, predictions, registry
from db.models import BaseModel, ModelVersion, TrainingJob, utc_now
from db.session import Database
from tests.conftest import PATIENCE_SECONDS, wait_until
from tests.support.rows import tweet_row
from tests.support.training_jobs import NEVER, count, job_of, left_in, running, submit
from training import failpoint
from training.config import make_adapt_config
from training.jobs.context import TrainingContext
from training.jobs.run import run_next_job
from training.model.base_model import STARTER_FOLDER, resolve_base_model
from training.text.tokenizer import load_tokenizer, mecab_dictionary

SUBJECTS = ("電車", "会議", "猫", "天気", "映画", "試験", "夕飯", "荷物", "仕事", "布団")
ENDINGS = ("が遅れている", "がやっと終わった", "を見た", "のことを考えている", "が楽しみ", "は明日らしい", "をまた忘れた")


def store_tweets(database: Database, number: int = 70, start: int = 0) -> None:
    """Tweets of different texts, one a minute, the last a minute ago."""
    rows = [
        tweet_row(
            f"{start + i:06d}",
            text=f"{SUBJECTS[i % 10]}{ENDINGS[i // 10 % 7]}。{SUBJECTS[i * 3 % 10]}{i // 70 or ''}",
            received_at=utc_now() - timedelta(minutes=number - i),
        )
        for i in range(number)
    ]
    with database.begin() as session:
        predictions.add_tweets(session, rows)


def submit_adapt(database: Database, base_model: Path | str, **settings: Any) -> int:
    small = {"epochs": 3, "train_batch_size": 8, "learning_rate": 3e-3, "max_length": 32, **settings}
    config = make_adapt_config(base_model=str(base_model), **small).model_dump(mode="json")
    with database.begin() as session:
        return jobs.submit(
            session, request_id=uuid.uuid4().hex, kind="adapt", dataset="stored tweets", dataset_sha256=None,
            config=config,
        ).id  # fmt: skip


def base_model_of(database: Database, job_id: int) -> BaseModel:
    with database.read() as session:
        found = registry.base_model_of_job(session, job_id)
    assert found is not None
    return found


def weights_of(row: BaseModel) -> dict[str, torch.Tensor]:
    return load_file(Path(row.url) / "model.safetensors")


def test_the_loss_on_held_out_tweets_falls_and_the_job_shows_what_it_read(
    database: Database, context: TrainingContext, tiny_encoder: Path
) -> None:
    store_tweets(database)
    with database.begin() as session:
        predictions.add_tweets(
            session,
            [
                tweet_row("a", text="RT @someone: 電車が遅れている。電車 https://t.co/x"),  # a retweet of 000000
                tweet_row("b", text="the train is late", lang="en"),
                tweet_row("c", text="まだ届いていない", received_at=utc_now() + timedelta(hours=1)),
            ],
        )
    job_id = submit_adapt(database, tiny_encoder)
    assert run_next_job(database, context, "here", NEVER) == job_id
    job, row = job_of(database, job_id), base_model_of(database, job_id)
    assert (job.state, job.error, job.kind) == ("succeeded", None, "adapt")
    assert job.step == job.total_steps
    assert job.data_report is not None
    sizes = job.data_report["sizes"]
    assert job.data_report == {
        "read": 71, "duplicates": 1, "rows": 70, "new_head": True,
        "sizes": {"train": row.tweets, "valid": 70 - row.tweets, "test": 0},
    }  # fmt: skip
    assert 1 <= sizes["valid"] <= 10
    assert row.base_model == str(tiny_encoder)
    assert row.loss_after < row.loss_before - 0.5
    assert Path(row.url).parent == context.input_store.folder / "encoders"
    assert (count(database, ModelVersion), left_in(context.jobs_folder)) == (0, [])
