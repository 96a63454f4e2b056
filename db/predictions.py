"""Queries of tweets, predictions, scoring windows and dead letters. The caller owns the transaction."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Row, Select, delete, func, or_, select, text
from sqlalchemy.orm import Session

from db import insert
from db.admin import sums
from db.errors import NotFound
from db.insert import Columns
from db.models import UNCERTAIN, DeadLetter, Prediction, ScoringWindow, Tweet


def add_tweets(session: Session, rows: Sequence[dict[str, Any]]) -> None:
    """Insert tweets whose id is new. A tweet that exists keeps its first text and time of arrival."""
    insert.add_rows(session, Tweet, rows)


def add_predictions(session: Session, rows: Sequence[dict[str, Any]]) -> None:
    """Insert predictions whose (tweet, model version) is new, so that a replay changes nothing."""
    insert.add_rows(session, Prediction, rows)


def add_scored(session: Session, tweets: Columns, scored: Columns) -> None:
    """`add_tweets` and `add_predictions` for a window, given by column; `scored` are predictions of `tweets`."""
    if not _added_to_a_partition(session, tweets, scored):
        known = insert.add_columns(session, Tweet, tweets)
        insert.add_columns(session, Prediction, scored, possible=known)  # a tweet that is new has no predictions


def _added_to_a_partition(session: Session, tweets: Columns, scored: Columns) -> bool:
    """Add the tweets that are new, with their predictions, straight to their partition, and the predictions of others
    as always. Returns False, and has done nothing, when that is not possible."""
    ids = tweets["tweet_id"]
    partition = insert.partition_of(session, ids)
    if partition is None or scored["tweet_id"] != ids or len(set(ids)) < len(ids):
        return False
    known = insert.known(session, Tweet, tweets)
    if len(ids) - len(known) < insert.COPY_ROWS:
        return False
    new_tweets, new_scored = tweets, scored
    if known:
        new = [i for i, id_ in enumerate(ids) if id_ not in known]
        new_tweets, new_scored = insert.chosen(tweets, new), insert.chosen(scored, new)
    rows = {Tweet: new_tweets, Prediction: new_scored}
    if not insert.copied_to(session, partition, rows, lambda: sums.count(session, new_tweets, new_scored)):
        return False
    if known:
        old = [i for i, id_ in enumerate(ids) if id_ in known]
        insert.add_columns(session, Prediction, insert.chosen(scored, old), possible=known)
    return True


def unscored(
    session: Session, model_version_id: int, since: datetime | None, until: datetime, after: str, limit: int
) -> list[tuple[str, str]]:
    """(id, text) of tweets without a prediction of this model version, in order of id and after `after`."""
    query = select(Tweet.tweet_id, Tweet.text).where(*_unscored(model_version_id, since, until), Tweet.tweet_id > after)
    return [(id_, text) for id_, text in session.execute(query.order_by(Tweet.tweet_id).limit(limit))]


def present(session: Session, tweet_ids: Sequence[str]) -> set[str]:
    """The ids that exist. Their rows cannot be deleted until the transaction ends."""
    query = select(Tweet.tweet_id).where(Tweet.tweet_id.in_(tweet_ids)).order_by(Tweet.tweet_id)
    return set(session.scalars(query.with_for_update(read=True, key_share=True)))


def newest_texts(
    session: Session, language: str, until: datetime, before: tuple[datetime, str] | None, limit: int
) -> list[tuple[datetime, str, str]]:
    """(time of arrival, id, text) of tweets in `language` or without one that arrived by `until`, the newest first.

    `before` is the time and id of the last tweet of the page before.
    """
    conditions = [or_(Tweet.lang == language, Tweet.lang.is_(None)), Tweet.received_at <= until]
    if before is not None:
        at, id_ = before
        # Instead of a comparison of pairs: both databases then use the index on the time.
        conditions += [Tweet.received_at <= at, or_(Tweet.received_at < at, Tweet.tweet_id < id_)]
    query = select(Tweet.received_at, Tweet.tweet_id, Tweet.text).where(*conditions)
    order = (Tweet.received_at.desc(), Tweet.tweet_id.desc())
    return [(at, id_, text) for at, id_, text in session.execute(query.order_by(*order).limit(limit))]


def unscored_count(session: Session, model_version_id: int, since: datetime | None, until: datetime) -> int:
    query = select(func.count()).select_from(Tweet).where(*_unscored(model_version_id, since, until))
    return session.scalar(query) or 0


def _unscored(model_version_id: int, since: datetime | None, until: datetime) -> list[ColumnElement[bool]]:
    """Conditions: no prediction, received by `until`, and written (or else received) at `since` or later."""
    scored = select(Prediction.tweet_id).where(
        Prediction.tweet_id == Tweet.tweet_id, Prediction.model_version_id == model_version_id
    )
    conditions = [~scored.exists(), Tweet.received_at <= until]
    if since is not None:
        conditions.append(func.coalesce(Tweet.tweet_created_at, Tweet.received_at) >= since)
    return conditions


def bury(session: Session, rows: Sequence[dict[str, Any]]) -> None:
    """Insert dead letters whose record id is new."""
    insert.add_rows(session, DeadLetter, rows)


def add_window(session: Session, row: dict[str, Any]) -> None:
    session.add(ScoringWindow(**row))


def dead_count(session: Session) -> int:
    return session.scalar(select(func.count()).select_from(DeadLetter)) or 0


def recent_dead(session: Session, limit: int) -> list[DeadLetter]:
    return list(session.scalars(select(DeadLetter).order_by(DeadLetter.buried_at.desc()).limit(limit)))


def dead_letter(session: Session, record_id: str) -> DeadLetter:
    letter = session.get(DeadLetter, record_id)
    if letter is None:
        raise NotFound(f"there is no dead letter {record_id!r}; `tweetscore dead list` shows the existing ones")
    return letter


def newest_dead(session: Session) -> str | None:
    """The last record id in the order of `dead_after`; None without dead letters."""
    return session.scalar(select(func.max(DeadLetter.record_id)))


def dead_after(session: Session, after: str, last: str, limit: int) -> list[DeadLetter]:
    """Dead letters with ids above `after` and up to `last`, in order of id."""
    within = (DeadLetter.record_id > after, DeadLetter.record_id <= last)
    return list(session.scalars(select(DeadLetter).where(*within).order_by(DeadLetter.record_id).limit(limit)))


def drop_dead(session: Session, record_ids: Sequence[str]) -> None:
    session.execute(delete(DeadLetter).where(DeadLetter.record_id.in_(record_ids)))


def least_certain(session: Session, model_version_id: int, limit: int) -> Sequence[Row[Any]]:
    """(tweet_id, text, label, probability, probabilities) of a model's predictions by rising probability."""
    columns = (Tweet.tweet_id, Tweet.text, Prediction.label, Prediction.probability, Prediction.probabilities)
    query = select(*columns).join(Tweet, Tweet.tweet_id == Prediction.tweet_id)
    query = query.where(Prediction.model_version_id == model_version_id)
    return least_certain_of(session, query, limit)


def least_certain_of(session: Session, query: Select[Any], limit: int) -> Sequence[Row[Any]]:
    """The rows of a query of predictions by rising probability. PostgreSQL sorts all of them only when those below 0.6,
    of which it has an index, are fewer than `limit`."""
    query = query.order_by(Prediction.probability).limit(limit)
    rows = session.execute(query.where(text(f"predictions.{UNCERTAIN}"))).all()
    return rows if len(rows) == limit else session.execute(query).all()


def prediction_count(session: Session, model_version_id: int | None = None) -> int:
    query = select(func.count()).select_from(Prediction)
    if model_version_id is not None:
        query = query.where(Prediction.model_version_id == model_version_id)
    return session.scalar(query) or 0


def delete_tweets(
    session: Session,
    tweet_ids: Sequence[str],
    authors: Sequence[str],
    before: datetime | None,
    limit: int,
    after: str = "",
) -> list[str]:
    """Delete up to `limit` tweets and their predictions, in order of id and after `after`. Returns the ids in order.

    A tweet is deleted when its id or author is listed, or when it was written (or else received) before `before`.
    """
    conditions: list[ColumnElement[bool]] = [Tweet.tweet_id.in_(tweet_ids), Tweet.author_id.in_(authors)]
    if before is not None:
        conditions.append(func.coalesce(Tweet.tweet_created_at, Tweet.received_at) < before)
    query = select(Tweet.tweet_id).where(or_(*conditions), Tweet.tweet_id > after).order_by(Tweet.tweet_id).limit(limit)
    ids = list(session.scalars(query.with_for_update()))
    session.execute(delete(Prediction).where(Prediction.tweet_id.in_(ids)))
    session.execute(delete(Tweet).where(Tweet.tweet_id.in_(ids)))
    return ids
