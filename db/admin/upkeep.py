"""Queries of the periodic maintenance: delete old tweets, dead letters and windows, and fold the rollup shards.

Each call handles up to `limit` rows and returns their number; fewer than `limit` means that there are no more. The
caller owns the transaction. Several workers may run them at once, since rows that another transaction has locked are
skipped.
"""

from datetime import datetime
from typing import Any

from sqlalchemy import column, delete, func, literal, select, table, text
from sqlalchemy.dialects.postgresql import insert as postgresql_insert
from sqlalchemy.dialects.sqlite import insert as sqlite_insert
from sqlalchemy.orm import InstrumentedAttribute, Session

from db.models import Base, DeadLetter, Prediction, ScoringWindow, SentimentRollup, Tweet

KEY = ("model_version_id", "hour", "topic", "label")
COUNTED = ("tweets", "probability_sum", "score_sum", "with_score")
KEY_NAMES = ", ".join(KEY)
ADD_UP = f"""
        ON CONFLICT ({KEY_NAMES}, shard) DO UPDATE SET
            {", ".join(f"{name} = sentiment_rollup.{name} + excluded.{name}" for name in COUNTED)}"""

# SQLite's mode in which a file becomes shorter only when asked.
INCREMENTAL = 2

# One statement, so that a reader sees either the rows of the shards or their sum. Only this statement writes to shard
# 0, and it skips rows that the transaction of a scoring worker has locked, so it never waits for one.
FOLD = f"""
    WITH gone AS (
        DELETE FROM sentiment_rollup WHERE ctid = ANY (ARRAY(
            SELECT ctid FROM sentiment_rollup WHERE shard <> 0 LIMIT :limit FOR UPDATE SKIP LOCKED))
        RETURNING {KEY_NAMES}, {", ".join(COUNTED)}
    ), folded AS (
        INSERT INTO sentiment_rollup ({KEY_NAMES}, shard, {", ".join(COUNTED)})
        SELECT {KEY_NAMES}, 0, {", ".join(f"sum({name})" for name in COUNTED)} FROM gone
        GROUP BY {KEY_NAMES} ORDER BY {KEY_NAMES} {ADD_UP}
    )
    SELECT count(*) FROM gone"""  # noqa: S608 - names of the schema
# Keys without predictions. A key with rows in other shards is kept: only the sum of all shards shows that it is empty.
DROP_EMPTY = f"""
    DELETE FROM sentiment_rollup AS sums WHERE shard = 0 AND tweets = 0 AND NOT EXISTS (
        SELECT 1 FROM sentiment_rollup AS other WHERE other.shard <> 0
        AND {" AND ".join(f"other.{name} = sums.{name}" for name in KEY)})"""  # noqa: S608 - names of the schema


def delete_received_before(session: Session, before: datetime, limit: int, source: str = "tweets") -> int:
    """Delete tweets received before a time, oldest first, with their predictions. The sums of `sentiment_rollup` stay.

    `source` is `tweets` or one of its partitions.
    """
    stored = table(source, column("tweet_id"), column("received_at"))
    query = select(stored.c.tweet_id).where(stored.c.received_at < before).order_by(stored.c.received_at).limit(limit)
    ids = list(session.scalars(query.with_for_update(skip_locked=True)))
    if ids:
        _count_again(session, ids)
        # Before the tweets, in one statement: SQLite's trigger on tweets would delete them tweet by tweet.
        session.execute(delete(Prediction).where(Prediction.tweet_id.in_(ids)))
        session.execute(delete(Tweet).where(Tweet.tweet_id.in_(ids)))
    return len(ids)


def _count_again(session: Session, ids: list[str]) -> None:
    """Add the predictions of tweets to the sums, from which the deletion subtracts them."""
    sqlite = session.get_bind().dialect.name == "sqlite"
    written = func.coalesce(Tweet.tweet_created_at, Tweet.received_at)
    hour = func.substr(written, 1, 13).op("||")(":00:00.000000Z") if sqlite else func.date_trunc("hour", written, "UTC")
    shard = literal(0) if sqlite else func.pg_backend_pid()
    counted = (func.count(), func.sum(Prediction.probability), func.sum(func.coalesce(Prediction.score_signed, 0)))
    key = (Prediction.model_version_id, hour, func.coalesce(Tweet.topic, ""), Prediction.label)
    sums = select(*key, shard, *counted, func.count(Prediction.score_signed)).join_from(
        Prediction, Tweet, Tweet.tweet_id == Prediction.tweet_id
    )
    sums = sums.where(Tweet.tweet_id.in_(ids), Prediction.tweet_id.in_(ids)).group_by(text("1, 2, 3, 4"))
    insert = (sqlite_insert if sqlite else postgresql_insert)(SentimentRollup).from_select(
        [*KEY, "shard", *COUNTED], sums
    )
    more = {name: SentimentRollup.__table__.c[name] + insert.excluded[name] for name in COUNTED}
    session.execute(insert.on_conflict_do_update(index_elements=[*KEY, "shard"], set_=more))


def delete_buried_before(session: Session, before: datetime, limit: int) -> int:
    """Delete dead letters buried before a time, oldest first."""
    ids = _oldest(session, DeadLetter.record_id, DeadLetter.buried_at, before, limit)
    return _delete(session, DeadLetter, DeadLetter.record_id, ids)


def delete_windows_before(session: Session, before: datetime, limit: int) -> int:
    """Delete windows that began before a time, oldest first."""
    ids = _oldest(session, ScoringWindow.id, ScoringWindow.started_at, before, limit)
    return _delete(session, ScoringWindow, ScoringWindow.id, ids)


def give_back_pages(session: Session, limit: int) -> int:
    """Shorten a SQLite file by up to `limit` pages that deleted rows left.

    A file of before version 0.2 keeps them for new rows, until `tweetscore delete` rewrites it.
    """
    if session.get_bind().dialect.name != "sqlite":
        return 0
    connection = session.connection()
    if connection.exec_driver_sql("PRAGMA auto_vacuum").scalar_one() != INCREMENTAL:
        return 0
    pages = min(limit, connection.exec_driver_sql("PRAGMA freelist_count").scalar_one())
    for _ in range(pages):
        connection.exec_driver_sql("PRAGMA incremental_vacuum(1)")  # Python's driver frees one page a call at most
    return int(pages)


def fold_sums(session: Session, limit: int) -> int:
    """Add the rows of other shards of `sentiment_rollup` to shard 0. SQLite has only shard 0."""
    if session.get_bind().dialect.name == "sqlite":
        return 0
    return session.scalar(text(FOLD), {"limit": limit}) or 0


def drop_empty_sums(session: Session) -> None:
    """Delete the keys of `sentiment_rollup` that have no predictions."""
    session.execute(text(DROP_EMPTY))


def _oldest(
    session: Session,
    key: InstrumentedAttribute[Any],
    time: InstrumentedAttribute[datetime],
    before: datetime,
    limit: int,
) -> list[Any]:
    """The oldest keys, read in the order of the index on `time`, without a sort or a scan of newer rows."""
    query = select(key).where(time < before).order_by(time).limit(limit)
    return list(session.scalars(query.with_for_update(skip_locked=True)))


def _delete(session: Session, table: type[Base], key: InstrumentedAttribute[Any], ids: list[Any]) -> int:
    session.execute(delete(table).where(key.in_(ids)))
    return len(ids)
