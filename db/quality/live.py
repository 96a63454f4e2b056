"""Queries of how right the champion is on live tweets, and of how these differ from its test rows.

The figures are those of the views `v_live_quality` and `v_drift`. The caller owns the transaction.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from typing import Any

from sqlalchemy import Row, column, func, select, table
from sqlalchemy.orm import Session

from db.models import Prediction, ReviewTweet, TestPrediction, Tweet, utc_now
from db.views import VIEWS

COLUMNS = {view.name: [item.name for item in view.columns] for view in VIEWS}


@dataclass(frozen=True)
class LabelledTweet:
    """A tweet that was picked at random: its day of arrival (UTC), the label of people and that of the model."""

    day: date
    actual: str
    predicted: str


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
    """Tweets of the last days that were picked at random, that people labelled and that a version scored."""
    labels = labels_view()
    query = (
        select(Tweet.received_at, labels.c.label, Prediction.label)
        .join(ReviewTweet, ReviewTweet.tweet_id == Tweet.tweet_id)
        .join(labels, labels.c.tweet_id == Tweet.tweet_id)
        .join(Prediction, Prediction.tweet_id == Tweet.tweet_id)
        .where(
            ReviewTweet.reason == "random",
            Prediction.model_version_id == version_id,
            Tweet.received_at >= datetime.combine(first_day(days), time(), UTC),
        )
        .order_by(Tweet.received_at, Tweet.tweet_id)
    )
    return [LabelledTweet(at.date(), actual, predicted) for at, actual, predicted in session.execute(query)]


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
