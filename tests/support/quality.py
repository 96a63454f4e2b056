"""Live tweets of the last days with predictions and labels, and model versions with test rows."""

from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import insert

from db import registry
from db.models import Label, ModelVersion, ReviewTweet, utc_now
from db.session import Database
from tests.support.rows import prediction_row, tweet_row, write

LABELS = ["negative", "positive"]


def days_ago(days: int) -> datetime:
    return utc_now() - timedelta(days=days)


def version_tested(
    database: Database, rows: list[dict[str, Any]], figures: dict[str, float] | None = None, job_id: int | None = None
) -> int:
    """A version with rows of `test_predictions`, of which each names what matters."""
    version = ModelVersion(
        job_id=job_id, base_model="base", artifact_url="file:///models/1", sha256="0" * 64, labels=LABELS,
        cleaner_version="2",
    )  # fmt: skip
    given = {"text": "雨", "actual": "positive", "predicted": "positive", "probability": 0.75, "probabilities": {}}
    metrics = [{"metric": name, "label": "", "value": value} for name, value in (figures or {}).items()]
    with database.begin() as session:
        tested = [
            {**given, "row_number": number, "unknown_share": None, **row} for number, row in enumerate(rows, start=1)
        ]
        return registry.add_version(session, version, metrics, [], tested).id


def scored(
    database: Database, version: int, days: int, labels: list[str], prefix: str = "", **values: Any
) -> list[str]:
    """Tweets that arrived so many days ago, one for each label that the version predicted. Returns the ids."""
    ids = [f"{prefix or days}-{number:03}" for number in range(len(labels))]
    write(
        database,
        [tweet_row(id_, received_at=days_ago(days)) for id_ in ids],
        [prediction_row(id_, version, label=label, **values) for id_, label in zip(ids, labels, strict=True)],
    )
    return ids


def label(
    database: Database, labels: dict[str, str], reason: str | None = "random", source: str = "review", version: int = 1
) -> None:
    """Labels of tweets by id; with a reason, the tweets were picked for it."""
    with database.begin() as session:
        for place, id_ in enumerate(labels if reason else ()):
            session.execute(
                insert(ReviewTweet),
                {"tweet_id": id_, "reason": reason, "readers": 1, "place": place, "model_version_id": version},
            )
        session.add_all(
            Label(tweet_id=id_, label=given, annotator="ann", source=source) for id_, given in labels.items()
        )
