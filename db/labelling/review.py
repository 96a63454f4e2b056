"""Queries of the tweets that are picked to be labelled, and of who is asked about them.

The caller owns the transaction. Whether a tweet is labelled is read from `labels`, so that imported labels count as
those of a review.
"""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Row, and_, func, or_, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session, aliased

from db.labelling.labels import PROPOSED
from db.models import Label, Prediction, ReviewAsk, ReviewTweet, Tweet
from db.predictions import least_certain_of, present

# Disagreements are looked for among this many of the challenger's newest predictions.
NEWEST_CHALLENGED = 20_000
# SQLite allows 32,766 parameters in a statement; a pick has six.
CHUNK_ROWS = 1_000
RANDOM = "random"

# --- picking


def draw(session: Session, model_version_id: int, since: datetime, limit: int) -> list[str]:
    """Ids of up to `limit` tweets that arrived at `since` or later, scored by the model and not yet picked at random.

    They are a uniform sample in random order. Both databases keep the smallest random numbers only, so that a million
    tweets take 0.7 s.
    """
    drawn = select(ReviewTweet.tweet_id).where(ReviewTweet.tweet_id == Tweet.tweet_id, ReviewTweet.reason == RANDOM)
    scored = (Prediction.tweet_id == Tweet.tweet_id) & (Prediction.model_version_id == model_version_id)
    query = select(Tweet.tweet_id).join(Prediction, scored).where(Tweet.received_at >= since, ~drawn.exists())
    return list(session.scalars(query.order_by(func.random()).limit(limit)))


def known(session: Session, tweet_ids: Sequence[str]) -> set[str]:
    """The ids of tweets that are picked, or that people labelled."""
    found: set[str] = set()
    for start in range(0, len(tweet_ids), CHUNK_ROWS):
        chunk = tweet_ids[start : start + CHUNK_ROWS]
        found |= set(session.scalars(select(ReviewTweet.tweet_id).where(ReviewTweet.tweet_id.in_(chunk))))
        found |= set(session.scalars(select(Label.tweet_id).where(Label.tweet_id.in_(chunk), Label.source != PROPOSED)))
    return found


def texts(session: Session, tweet_ids: Sequence[str]) -> Sequence[Row[Any]]:
    """(tweet_id, text, topic) of the tweets that exist, in no order."""
    rows: list[Any] = []
    for start in range(0, len(tweet_ids), CHUNK_ROWS):
        query = select(Tweet.tweet_id, Tweet.text, Tweet.topic)
        rows += session.execute(query.where(Tweet.tweet_id.in_(tweet_ids[start : start + CHUNK_ROWS]))).all()
    return rows


def least_certain(session: Session, model_version_id: int, limit: int) -> Sequence[Row[Any]]:
    """(tweet_id, text, probabilities) by rising probability, of tweets that are neither picked nor labelled."""
    query = select(Tweet.tweet_id, Tweet.text, Prediction.probabilities).join_from(
        Prediction, Tweet, Tweet.tweet_id == Prediction.tweet_id
    )
    query = query.where(Prediction.model_version_id == model_version_id, *_unknown(Prediction.tweet_id))
    return least_certain_of(session, query, limit)


def disagreements(session: Session, champion: int, challenger: int, limit: int) -> Sequence[Row[Any]]:
    """(tweet_id, text, probabilities, challenged) of the newest tweets for which the two predict different labels.

    `challenged` are the probabilities of the challenger. Only tweets that are neither picked nor labelled.
    """
    columns = (Prediction.tweet_id, Prediction.label, Prediction.probabilities, Prediction.scored_at)
    newest = (
        select(*columns)
        .where(Prediction.model_version_id == challenger)
        .order_by(Prediction.scored_at.desc())
        .limit(NEWEST_CHALLENGED)
        .subquery()
    )
    same = and_(Prediction.tweet_id == newest.c.tweet_id, Prediction.model_version_id == champion)
    query: Any = (
        select(Tweet.tweet_id, Tweet.text, Prediction.probabilities, newest.c.probabilities.label("challenged"))
        .join_from(newest, Prediction, same)
        .join(Tweet, Tweet.tweet_id == newest.c.tweet_id)
        .where(Prediction.label != newest.c.label, *_unknown(newest.c.tweet_id))
        .order_by(newest.c.scored_at.desc(), newest.c.tweet_id)
    )
    found: Sequence[Row[Any]] = session.execute(query.limit(limit)).all()
    return found


def add_picks(session: Session, rows: Sequence[dict[str, Any]]) -> None:
    """Add picks with all columns. Of tweets that are picked already, only those drawn at random are changed.

    They count as random from now on, at their new place.
    """
    insert = sqlite.insert if session.get_bind().dialect.name == "sqlite" else postgresql.insert
    ordered = sorted(rows, key=lambda row: str(row["tweet_id"]))  # two picks at once wait, and do not deadlock
    for start in range(0, len(ordered), CHUNK_ROWS):
        statement = insert(ReviewTweet).values(ordered[start : start + CHUNK_ROWS])
        new = statement.excluded
        session.execute(
            statement.on_conflict_do_update(
                index_elements=[ReviewTweet.tweet_id],
                set_={"reason": new.reason, "place": new.place, "picked_at": new.picked_at},
                where=(new.reason == RANDOM) & (ReviewTweet.reason != RANDOM),
            )
        )


def last_place(session: Session) -> int:
    return session.scalar(select(func.max(ReviewTweet.place))) or 0


# --- asking


def next_free(session: Session, annotator: str, asked_since: datetime) -> ReviewTweet | None:
    """The first pick that may be asked of an annotator, locked: the one asked last, or else by place.

    It needs more readers and is not being asked of another annotator, which an ask before `asked_since` no longer is.
    Picks that another transaction has locked are left out. On PostgreSQL the pick may have been taken just before it
    was locked, so ask `is_free` afterwards.
    """
    pending = _asks(annotator, "asked").exists()
    query = select(ReviewTweet).where(*_free(annotator, asked_since)).order_by(pending.desc(), ReviewTweet.place)
    return session.scalar(query.limit(1).with_for_update(of=ReviewTweet, skip_locked=True))


def is_free(session: Session, tweet_id: str, annotator: str, asked_since: datetime) -> bool:
    query = select(ReviewTweet.tweet_id).where(ReviewTweet.tweet_id == tweet_id, *_free(annotator, asked_since))
    return session.scalar(query) is not None


def ask(session: Session, tweet_id: str, annotator: str, at: datetime) -> None:
    """Note that the tweet is asked of the annotator now, for the first time or again."""
    session.merge(ReviewAsk(tweet_id=tweet_id, annotator=annotator, state="asked", at=at))


def asked(session: Session, tweet_id: str, annotator: str) -> ReviewAsk | None:
    """The question that was asked of the annotator, locked. So is the tweet, since a deletion begins with it."""
    present(session, [tweet_id])
    key = {"tweet_id": tweet_id, "annotator": annotator}
    return session.get(ReviewAsk, key, with_for_update=True)


def last_closed(session: Session, annotator: str) -> str | None:
    """The tweet that the annotator labelled or skipped last; None when there is none."""
    closed = (ReviewAsk.annotator == annotator, ReviewAsk.state != "asked")
    return session.scalar(select(ReviewAsk.tweet_id).where(*closed).order_by(ReviewAsk.at.desc()).limit(1))


def question(session: Session, tweet_id: str) -> Row[Any]:
    """(tweet_id, text, topic, author_id, tweet_created_at, reason, place) of a pick."""
    columns = (Tweet.tweet_id, Tweet.text, Tweet.topic, Tweet.author_id, Tweet.tweet_created_at)
    query: Any = select(*columns, ReviewTweet.reason, ReviewTweet.place).join(
        ReviewTweet, ReviewTweet.tweet_id == Tweet.tweet_id
    )
    found: Row[Any] = session.execute(query.where(Tweet.tweet_id == tweet_id)).one()
    return found


# --- counting


def counts(session: Session, annotator: str) -> tuple[int, int, int, int, int]:
    """Numbers of picks: (all, labelled, only skipped, left for the annotator, labelled by the annotator)."""
    labelled = _labels().exists()
    skipped = select(ReviewAsk.tweet_id).where(ReviewAsk.tweet_id == ReviewTweet.tweet_id, ReviewAsk.state == "skipped")
    left = and_(*_unread(annotator))
    query: Any = select(
        func.count(),
        func.count().filter(labelled),
        func.count().filter(~labelled, skipped.exists()),
        func.count().filter(left),
        func.count().filter(_asks(annotator, "labelled").exists()),
    ).select_from(ReviewTweet)
    picked, with_label, only_skipped, open_, mine = session.execute(query).one()
    return picked, with_label, only_skipped, open_, mine


def pairs(session: Session) -> list[tuple[str, str]]:
    """The labels of the first two annotators, by name, of every tweet that two or more people labelled."""
    newest = (Label.at.desc(), Label.id.desc())
    each = (
        select(
            Label.tweet_id,
            Label.annotator,
            Label.label,
            func.row_number().over(partition_by=(Label.tweet_id, Label.annotator), order_by=newest).label("age"),
        )
        .where(Label.source != PROPOSED)
        .subquery()
    )
    place = func.row_number().over(partition_by=each.c.tweet_id, order_by=each.c.annotator).label("place")
    ordered = select(each.c.tweet_id, each.c.label, place).where(each.c.age == 1).subquery()
    one, other = aliased(ordered), aliased(ordered)
    both = and_(one.c.tweet_id == other.c.tweet_id, one.c.place == 1, other.c.place == 2)
    rows = session.execute(select(one.c.label, other.c.label).join_from(one, other, both).order_by(one.c.tweet_id))
    return [(first, second) for first, second in rows]


# --- conditions


def _unknown(tweet_id: Any) -> list[ColumnElement[bool]]:
    """Conditions: neither picked nor labelled by people."""
    picked = select(ReviewTweet.tweet_id).where(ReviewTweet.tweet_id == tweet_id)
    labelled = select(Label.tweet_id).where(Label.tweet_id == tweet_id, Label.source != PROPOSED)
    return [~picked.exists(), ~labelled.exists()]


def _labels(*conditions: ColumnElement[bool]) -> Any:
    """Labels that people gave to a pick."""
    return select(Label.id).where(Label.tweet_id == ReviewTweet.tweet_id, Label.source != PROPOSED, *conditions)


def _asks(annotator: str, *states: str) -> Any:
    mine = (ReviewAsk.tweet_id == ReviewTweet.tweet_id, ReviewAsk.annotator == annotator)
    return select(ReviewAsk.tweet_id).where(*mine, ReviewAsk.state.in_(states))


def _unread(annotator: str) -> list[ColumnElement[bool]]:
    """Conditions: needs more readers, and the annotator has neither labelled nor skipped it."""
    readers = (
        select(func.count(Label.annotator.distinct()))
        .where(Label.tweet_id == ReviewTweet.tweet_id, Label.source != PROPOSED)
        .scalar_subquery()
    )
    return [
        ~_asks(annotator, "labelled", "skipped").exists(),
        ~_labels(Label.annotator == annotator).exists(),
        or_(~_labels().exists(), readers < ReviewTweet.readers),
    ]


def _free(annotator: str, asked_since: datetime) -> list[ColumnElement[bool]]:
    """Conditions: left for the annotator, and not being asked of another one."""
    others = select(ReviewAsk.tweet_id).where(
        ReviewAsk.tweet_id == ReviewTweet.tweet_id,
        ReviewAsk.annotator != annotator,
        ReviewAsk.state == "asked",
        ReviewAsk.at > asked_since,
    )
    return [*_unread(annotator), ~others.exists()]
