"""Queries of how right the champion is on live tweets, and of how these differ from its test rows.

The figures are those of the views `v_live_quality` and `v_drift`. The caller owns the transaction.
"""

import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from typing import Any

from sqlalchemy import ColumnElement, Row, column, func, or_, select, table, text, union_all
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session, aliased

from db.errors import DatabaseError
from db.labelling.labels import PROPOSED
from db.models import (
    Cascade,
    Label,
    ModelVersion,
    Prediction,
    ReviewAsk,
    ReviewTweet,
    TestPrediction,
    TrainingJob,
    Tweet,
    utc_now,
)
from db.session import is_away
from db.views import VIEWS

COLUMNS = {view.name: [item.name for item in view.columns] for view in VIEWS}


@dataclass(frozen=True)
class LabelledTweet:
    """A tweet that was picked at random: its day of arrival (UTC), the label of people and that of the model."""

    day: date
    actual: str
    predicted: str


def require_functions(session: Session) -> None:
    """Raise `DatabaseError` when this SQLite was built without the mathematical functions of the views."""
    try:
        session.execute(text("SELECT ln(1.0), sqrt(1.0), ceil(1.0)"))
    except DBAPIError as error:
        if session.get_bind().dialect.name != "sqlite" or is_away(error):
            raise
        raise DatabaseError(
            f"SQLite {sqlite3.sqlite_version} of this Python has no mathematical functions, which v_live_quality and "
            "v_drift need; use a Python whose SQLite has them, or PostgreSQL"
        ) from error


def live_quality(session: Session) -> Sequence[Row[Any]]:
    """The rows of `v_live_quality`, the shorter period first; none for a champion without single labels."""
    view = _view("v_live_quality")
    return session.execute(select(view).order_by(view.c.days)).all()


def drift(session: Session, days: int) -> list[dict[str, Any]]:
    """The rows of `v_drift` of the last days, today included, oldest first. `day` is a date."""
    view = _view("v_drift")
    rows = session.execute(select(view).order_by(view.c.day)).mappings()
    # SQLite returns a day as text.
    found = [{**row, "day": date.fromisoformat(str(row["day"]))} for row in rows]
    return [row for row in found if row["day"] >= first_day(days)]


def labelled(session: Session, version_id: int, days: int) -> list[LabelledTweet]:
    """Tweets of the last days that were picked at random, that people labelled and that a version scored.

    As in the view, labels that the version may have been trained on do not count.
    """
    labels = labels_view()
    query = (
        select(Tweet.received_at, labels.c.label, Prediction.label)
        .join(ReviewTweet, ReviewTweet.tweet_id == Tweet.tweet_id)
        .join(labels, labels.c.tweet_id == Tweet.tweet_id)
        .join(Prediction, Prediction.tweet_id == Tweet.tweet_id)
        .where(
            ReviewTweet.reason == "random",
            unseen(Tweet.tweet_id, version_id),
            _fair(labels.c.labelled_at),
            Prediction.model_version_id == version_id,
            Tweet.received_at >= datetime.combine(first_day(days), time(), UTC),
        )
        .order_by(Tweet.received_at, Tweet.tweet_id)
    )
    return [LabelledTweet(at.date(), actual, predicted) for at, actual, predicted in session.execute(query)]


def unseen(tweet_id: Any, *version_ids: int) -> ColumnElement[bool]:
    """Whether the labels of a tweet were given after the jobs of these versions had read labels to train on.

    The jobs of a cascade are those of its student and its teacher. Nothing tells which labels are in a file that a
    version was trained on.
    """
    parts = (
        select(part).where(Cascade.model_version_id.in_(version_ids))
        for part in (Cascade.student_id, Cascade.teacher_id)
    )
    versions = union_all(select(ModelVersion.id).where(ModelVersion.id.in_(version_ids)), *parts)
    query = (
        select(Label.id)
        .join(TrainingJob, Label.at <= TrainingJob.labels_until)
        .join(ModelVersion, ModelVersion.job_id == TrainingJob.id)
        .where(Label.tweet_id == tweet_id, Label.source != PROPOSED, ModelVersion.id.in_(versions))
    )
    return ~query.exists()


def _fair(labelled_at: Any) -> ColumnElement[bool]:
    """Whether a random pick counts: one that was labelled before it was picked has to wait for its place.

    Counted before the other tweets of the draw, such tweets would be too many.
    """
    other = aliased(ReviewTweet)
    open_ = (
        other.reason == "random",
        ~select(Label.id).where(Label.tweet_id == other.tweet_id, Label.source != PROPOSED).exists(),
        ~select(ReviewAsk.tweet_id).where(ReviewAsk.tweet_id == other.tweet_id, ReviewAsk.state == "skipped").exists(),
    )
    first_open = select(func.min(other.place)).where(*open_).scalar_subquery()
    return or_(
        labelled_at >= ReviewTweet.picked_at, ReviewTweet.place < func.coalesce(first_open, ReviewTweet.place + 1)
    )


def tested_row_count(session: Session, version_id: int) -> int:
    """Number of test rows of a version."""
    query = select(func.count()).select_from(TestPrediction).where(TestPrediction.model_version_id == version_id)
    return session.scalar(query) or 0


def labels_view() -> Any:
    """The view `v_labels`, for other queries."""
    return _view("v_labels")


def first_day(days: int) -> date:
    """The first of so many days (UTC), today included."""
    return utc_now().date() - timedelta(days=days - 1)


def _view(name: str) -> Any:
    return table(name, *map(column, COLUMNS[name]))
