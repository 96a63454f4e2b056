"""Queries of the labels that people, or a model, gave to stored tweets. The caller owns the transaction.

An annotator's newest label of a tweet counts. What a model proposed (source `model`) is never mixed with what people
gave: `labelled` returns the one, `proposed` the other.
"""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import BigInteger, ColumnElement, Row, Select, column, exists, func, insert, or_, select, table
from sqlalchemy.orm import Session, aliased

from db.base import UtcDateTime
from db.models import Label, Prediction, Tweet

PROPOSED = "model"
COLUMNS = (
    column("tweet_id", Label.tweet_id.type),
    column("label", Label.label.type),
    column("annotators", BigInteger()),
    column("agreeing", BigInteger()),
    column("labelled_at", UtcDateTime()),
)
LABELLED = table("v_labels", *COLUMNS)
# SQLite allows 32,766 parameters in a statement.
CHUNK_ROWS = 1_000


def add(session: Session, rows: Sequence[dict[str, Any]]) -> None:
    """Add labels: dictionaries with `tweet_id`, `label`, `annotator`, `source` and `at`. Their tweets must exist."""
    if rows:
        session.execute(insert(Label), list(rows))


def withdraw(session: Session, tweet_id: str, annotator: str) -> Label | None:
    """Delete the newest label that an annotator gave to a tweet, and return it; None when there is none.

    The label before it, if there is one, counts again. What a model proposed is not withdrawn.
    """
    theirs = (Label.tweet_id == tweet_id, Label.annotator == annotator, Label.source != PROPOSED)
    query = select(Label).where(*theirs).order_by(Label.at.desc(), Label.id.desc()).limit(1)
    newest = session.scalar(query.with_for_update())
    if newest is not None:
        session.delete(newest)
        session.flush()
    return newest


def labelled(session: Session, since: datetime | None = None, topic: str | None = None) -> Sequence[Row[Any]]:
    """(tweet_id, text, label, annotators, agreeing, labelled_at) of tweets that people labelled, in order of id.

    The label is the one that most annotators gave. `since` is the time a tweet was written, or else received.
    """
    return session.execute(_with_texts(LABELLED, since, topic)).all()


def proposed(session: Session, since: datetime | None = None, topic: str | None = None) -> Sequence[Row[Any]]:
    """The same as `labelled` for labels that models proposed."""
    newest = select(Label).where(Label.source == PROPOSED, _is_newest()).subquery()
    counted = (
        select(
            newest.c.tweet_id,
            newest.c.label,
            func.count().label("agreeing"),
            func.max(newest.c.at).label("labelled_at"),
            func.max(newest.c.id).label("newest_id"),
        )
        .group_by(newest.c.tweet_id, newest.c.label)
        .subquery()
    )
    order = (counted.c.agreeing.desc(), counted.c.labelled_at.desc(), counted.c.newest_id.desc())
    ranked = select(
        counted,
        func.sum(counted.c.agreeing).over(partition_by=counted.c.tweet_id).label("annotators"),
        func.row_number().over(partition_by=counted.c.tweet_id, order_by=order).label("place"),
    ).subquery()
    first = select(*(ranked.c[name.name] for name in COLUMNS)).where(ranked.c.place == 1).subquery()
    return session.execute(_with_texts(first, since, topic)).all()


def of_tweets(session: Session, tweet_ids: Sequence[str]) -> list[Label]:
    """The labels that count of up to `CHUNK_ROWS` tweets, one for each annotator, oldest first."""
    query = select(Label).where(Label.tweet_id.in_(tweet_ids), _is_newest())
    return list(session.scalars(query.order_by(Label.at, Label.id)))


def known(session: Session, tweet_ids: Sequence[str]) -> Sequence[Row[Any]]:
    """(id, tweet_id, annotator, source, label, at) of every label of up to `CHUNK_ROWS` tweets, oldest first."""
    columns = (Label.id, Label.tweet_id, Label.annotator, Label.source, Label.label, Label.at)
    query: Any = select(*columns).where(Label.tweet_id.in_(tweet_ids)).order_by(Label.at, Label.id)
    found: Sequence[Row[Any]] = session.execute(query).all()
    return found


def counts(session: Session) -> Sequence[Row[Any]]:
    """(source, annotator, label, labels): numbers of the labels that count."""
    keys = (Label.source, Label.annotator, Label.label)
    query: Any = select(*keys, func.count().label("labels")).where(_is_newest()).group_by(*keys).order_by(*keys)
    found: Sequence[Row[Any]] = session.execute(query).all()
    return found


def labelled_count(session: Session) -> int:
    """Number of tweets that people labelled."""
    people = select(func.count(Label.tweet_id.distinct())).where(Label.source != PROPOSED)
    return session.scalar(people) or 0


def with_predictions(
    model_version_id: int | None, since: datetime | None, topic: str | None, has_label: bool | None, limit: int | None
) -> Any:
    """Query of (tweet_id, text, topic, predicted, probability) of tweets, the newest first.

    The prediction is that of a model version, NULL without one. `has_label` selects tweets that people did or did not
    label.
    """
    scored = (Prediction.tweet_id == Tweet.tweet_id, Prediction.model_version_id == model_version_id)
    columns = (Tweet.tweet_id, Tweet.text, Tweet.topic, Prediction.label.label("predicted"), Prediction.probability)
    query: Any = select(*columns).outerjoin_from(Tweet, Prediction, scored[0] & scored[1]).where(*_of(since, topic))
    if has_label is not None:
        given = exists().where(Label.tweet_id == Tweet.tweet_id, Label.source != PROPOSED)
        query = query.where(given if has_label else ~given)
    return query.order_by(Tweet.received_at.desc(), Tweet.tweet_id.desc()).limit(limit)


def _is_newest() -> ColumnElement[bool]:
    """Whether the annotator gave no later label to the tweet. Proposed labels are compared with proposed ones only."""
    later = aliased(Label)
    newer = or_(later.at > Label.at, (later.at == Label.at) & (later.id > Label.id))
    same_kind = (later.source == PROPOSED) == (Label.source == PROPOSED)
    same = (later.tweet_id == Label.tweet_id) & (later.annotator == Label.annotator) & same_kind
    return ~select(later.id).where(same, newer).exists()


def _with_texts(labels: Any, since: datetime | None, topic: str | None) -> Select[Any]:
    _, *others = (labels.c[name.name] for name in COLUMNS)
    query = select(Tweet.tweet_id, Tweet.text, *others).join_from(labels, Tweet, labels.c.tweet_id == Tweet.tweet_id)
    return query.where(*_of(since, topic)).order_by(Tweet.tweet_id)


def _of(since: datetime | None, topic: str | None) -> list[ColumnElement[bool]]:
    """Conditions: the topic, and written (or else received) at `since` or later."""
    conditions: list[ColumnElement[bool]] = []
    if since is not None:
        conditions.append(func.coalesce(Tweet.tweet_created_at, Tweet.received_at) >= since)
    if topic is not None:
        conditions.append(Tweet.topic == topic)
    return conditions
