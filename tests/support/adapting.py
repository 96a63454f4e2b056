"""Stored tweets, and jobs that adapt a base model to them."""

import uuid
from datetime import timedelta
from pathlib import Path
from typing import Any

from db import jobs, predictions, registry
from db.models import BaseModel, utc_now
from db.session import Database
from tests.support.rows import tweet_row
from training.config import make_adapt_config

SUBJECTS = ("電車", "会議", "猫", "天気", "映画", "試験", "夕飯", "荷物", "仕事", "布団")
ENDINGS = ("が遅れている", "がやっと終わった", "を見た", "を考えている", "が楽しみ", "は明日らしい", "をまた忘れた")


def store_tweets(database: Database, number: int = 70) -> None:
    """Tweets of different texts, one a minute, the last a minute ago."""
    rows = [
        tweet_row(
            f"{i:06d}",
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
