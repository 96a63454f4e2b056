"""Queries of tweets that two model versions scored: where they differ, and what people say. The caller owns the
transaction.
"""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import ColumnElement, Row, and_, func, select
from sqlalchemy.orm import Session, aliased

from db.models import Prediction, ReviewTweet, TestPrediction, Tweet
from db.quality.live import labels_view


def label_pairs(session: Session, one: int, other: int) -> dict[tuple[str, str], int]:
    """Counts of tweets that both versions scored, by the label of each: (label of `one`, label of `other`)."""
    a, b = aliased(Prediction), aliased(Prediction)
    query = select(a.label, b.label, func.count()).join(b, b.tweet_id == a.tweet_id).where(*_both(a, b, one, other))
    return {(first, second): n for first, second, n in session.execute(query.group_by(a.label, b.label))}


def labelled_pairs(session: Session, one: int, other: int) -> Sequence[Row[Any]]:
    """(label of people, label of `one`, label of `other`, whether picked at random) of the labelled tweets of both."""
    a, b, labels = aliased(Prediction), aliased(Prediction), labels_view()
    query = (
        select(labels.c.label, a.label, b.label, and_(ReviewTweet.reason.is_not(None), ReviewTweet.reason == "random"))
        .select_from(labels)
        .join(a, a.tweet_id == labels.c.tweet_id)
        .join(b, b.tweet_id == labels.c.tweet_id)
        .outerjoin(ReviewTweet, ReviewTweet.tweet_id == labels.c.tweet_id)
        .where(*_both(a, b, one, other))
    )
    return session.execute(query).all()


def disagreements(session: Session, one: int, other: int, limit: int) -> Sequence[Row[Any]]:
    """Tweets that two versions label differently, those with a label of people first, then the newest.

    (tweet_id, text, label and probability of `one`, of `other`, label of people or None)
    """
    a, b, labels = aliased(Prediction), aliased(Prediction), labels_view()
    query = (
        select(Tweet.tweet_id, Tweet.text, a.label, a.probability, b.label, b.probability, labels.c.label)
        .join(a, a.tweet_id == Tweet.tweet_id)
        .join(b, b.tweet_id == Tweet.tweet_id)
        .outerjoin(labels, labels.c.tweet_id == Tweet.tweet_id)
        .where(*_both(a, b, one, other), a.label != b.label)
        .order_by(labels.c.label.is_(None), Tweet.received_at.desc(), Tweet.tweet_id)
    )
    return session.execute(query.limit(limit)).all()


def tested(session: Session, version_id: int) -> tuple[int, int]:
    """Number of test rows of a version, and how many of them it labels correctly."""
    right = func.count().filter(TestPrediction.actual == TestPrediction.predicted)
    query = select(func.count(), right).where(TestPrediction.model_version_id == version_id)
    rows, correct = session.execute(query).one()
    return rows, correct


def _both(a: Any, b: Any, one: int, other: int) -> list[ColumnElement[bool]]:
    return [a.model_version_id == one, b.model_version_id == other]
