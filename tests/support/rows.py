"""Rows of the tables for predictions and models, how tests write them, and the sums that triggers keep."""

import random
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import select, text

from db import predictions, registry
from db.models import Cascade, DeadLetter, ModelVersion, Prediction, Tweet
from db.querying.readonly import run_query
from db.session import Database

NOON = datetime(2026, 1, 31, 12, tzinfo=UTC)


def url_of(database: Database) -> str:
    return database.engine.url.render_as_string(hide_password=False)


def tweet_row(tweet_id: str, **values: object) -> dict[str, Any]:
    optional = dict.fromkeys(("author_id", "lang", "topic", "tweet_created_at"))
    return {"tweet_id": tweet_id, "text": f"今日は嬉しい{tweet_id}", **optional, "received_at": NOON, **values}


def prediction_row(tweet_id: str, model_version_id: int, **values: object) -> dict[str, Any]:
    row = {"tweet_id": tweet_id, "model_version_id": model_version_id, "label": "positive", "probability": 0.75}
    return {**row, "score_signed": 0.5, "probabilities": {"positive": 0.75}, "scored_at": NOON, **values}


def letter_row(record_id: str, **values: object) -> dict[str, Any]:
    return {"record_id": record_id, "payload": b"\xff\x00{", "reason": "not JSON", "attempts": 3, "buried_at": NOON} | {
        **values
    }


def make_version(
    database: Database, figures: dict[tuple[str, str], float] | None = None, job_id: int | None = None
) -> int:
    version = ModelVersion(
        job_id=job_id, base_model="base", artifact_url="file:///models/1", sha256="0" * 64,
        labels=["negative", "positive"], cleaner_version="1",
    )  # fmt: skip
    rows = [{"metric": metric, "label": label, "value": value} for (metric, label), value in (figures or {}).items()]
    with database.begin() as session:
        return registry.add_version(session, version, rows, [], []).id


def cascade_row(version_id: int, student_id: int, teacher_id: int) -> Cascade:
    return Cascade(
        model_version_id=version_id, student_id=student_id, teacher_id=teacher_id, threshold=0.5, planned_share=0.2,
        keep=0.9, bound="estimate", rows=100, curve=[],
    )  # fmt: skip


def assign(database: Database, version_id: int, alias: str = registry.CHAMPION) -> None:
    with database.begin() as session:
        registry.assign(session, alias, version_id)


def write(database: Database, tweets: list[dict[str, Any]], scored: list[dict[str, Any]]) -> None:
    with database.begin() as session:
        predictions.add_tweets(session, tweets)
        predictions.add_predictions(session, scored)


def answer(database: Database, sql: str) -> list[tuple[Any, ...]]:
    with run_query(url_of(database), sql) as (_, rows):
        return [tuple(row) for row in rows]


def everything(database: Database) -> dict[str, list[dict[str, Any]]]:
    with database.read() as session:
        return {
            model.__tablename__: sorted(
                (dict(row) for row in session.execute(select(*model.__table__.columns)).mappings()), key=str
            )
            for model in (Tweet, Prediction, DeadLetter)
        }


RECOUNT = """
    SELECT p.model_version_id, coalesce(t.topic, ''), p.label, count(*), sum(p.probability),
           sum(coalesce(p.score_signed, 0)), count(p.score_signed)
    FROM predictions AS p JOIN tweets AS t ON t.tweet_id = p.tweet_id GROUP BY 1, 2, 3 ORDER BY 1, 2, 3"""

SUMS = """
    SELECT model_version_id, topic, label, sum(tweets), sum(probability_sum), sum(score_sum), sum(with_score)
    FROM sentiment_rollup GROUP BY 1, 2, 3 HAVING sum(tweets) <> 0 ORDER BY 1, 2, 3"""
SUMS_BY_DAY = """
    SELECT model_version_id, day, label, length_bin, unknown_bin, sum(tweets), sum(probability_sum)
    FROM drift_rollup GROUP BY 1, 2, 3, 4, 5 HAVING sum(tweets) <> 0"""


def run(database: Database, sql: str) -> None:
    with database.begin() as session:
        session.execute(text(sql))


def close(rows: list[tuple[Any, ...]]) -> list[Any]:
    return [pytest.approx(row[3:], abs=1e-6) for row in rows]


def assert_counted(database: Database) -> None:
    expected, found = answer(database, RECOUNT), answer(database, SUMS)
    assert [row[:3] for row in found] == [row[:3] for row in expected]
    assert [row[3:] for row in found] == close(expected)
    expected_by_day, found_by_day = counted_by_day(database), answer(database, SUMS_BY_DAY)
    assert {tuple(map(str, row[:5])): row[5:] for row in found_by_day} == {
        key: pytest.approx(sums, abs=1e-6) for key, sums in expected_by_day.items()
    }


def counted_by_day(database: Database) -> dict[tuple[str, ...], list[float]]:
    """(model version, day, label, bins of length and share) -> number and sum of probabilities, from the rows."""
    sums: dict[tuple[str, ...], list[float]] = {}
    query = select(Prediction, Tweet).join_from(Prediction, Tweet, Tweet.tweet_id == Prediction.tweet_id)
    with database.read() as session:
        for scored, tweet in session.execute(query):
            cleaned = tweet.text.replace("http", "").replace("@", "")
            chars = len(cleaned) - 20 * tweet.text.count("http") - 11 * tweet.text.count("@")
            length = str(sum(chars >= end for end in (10, 20, 40, 80, 140)))
            share = scored.unknown_share
            unknown = "" if share is None else str(sum(share > end for end in (0, 0.02, 0.05, 0.1)))
            key = (str(scored.model_version_id), f"{tweet.received_at:%Y-%m-%d}", scored.label, length, unknown)
            found = sums.setdefault(key, [0, 0.0])
            found[0] += 1
            found[1] += scored.probability
    return sums


def some_text(rng: random.Random) -> str:
    """Of lengths about the ends of the bins, some with links and mentions, which do not count."""
    length = rng.choice([1, 9, 10, 19, 20, 39, 40, 79, 80, 139, 140])
    return "雨" * length + "".join(rng.choices(["", "https://t.co/0123456789 ", "@01234567890"], k=2))


def some(version: int, numbers: range) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    rng = random.Random(numbers.start)
    tweets = [
        tweet_row(
            f"{i:04d}",
            topic=rng.choice([None, "映画", "雨"]),
            tweet_created_at=rng.choice([None, NOON + timedelta(minutes=7 * i)]),
            text=some_text(rng),
            received_at=NOON + timedelta(hours=rng.randint(0, 40)),
        )
        for i in numbers
    ]
    scored = [
        prediction_row(
            f"{i:04d}",
            version,
            label=rng.choice(["positive", "negative"]),
            probability=rng.random(),
            score_signed=rng.choice([None, rng.uniform(-1, 1)]),
            unknown_share=rng.choice([None, 0.0, 0.02, 0.021, 0.1, 0.5]),
        )
        for i in numbers
    ]
    return tweets, scored
