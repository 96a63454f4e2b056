"""Queries of what is cleared away by the clock: old tweets, dead letters and windows, and the sums of old connections.

Each deletes one portion of up to `limit` rows and returns how many; fewer than `limit` were the last. The caller owns
the transaction, and several may do it at once: a row that somebody else holds is passed over.
"""

from datetime import datetime
from typing import Any

from sqlalchemy import delete, select, text
from sqlalchemy.orm import InstrumentedAttribute, Session

from db.models import Base, DeadLetter, Prediction, ScoringWindow, Tweet

KEY = ("model_version_id", "hour", "topic", "label")
COUNTED = ("tweets", "probability_sum", "score_sum", "with_score")
KEY_NAMES = ", ".join(KEY)

# One statement: a reader sees the rows of the connections, or the sum they went into. Nobody writes to shard 0 besides,
# and rows that a scorer's transaction holds are passed over, so this waits for no scorer.
FOLD = f"""
    WITH gone AS (
        DELETE FROM sentiment_rollup WHERE ctid = ANY (ARRAY(
            SELECT ctid FROM sentiment_rollup WHERE shard <> 0 LIMIT :limit FOR UPDATE SKIP LOCKED))
        RETURNING {KEY_NAMES}, {", ".join(COUNTED)}
    ), folded AS (
        INSERT INTO sentiment_rollup ({KEY_NAMES}, shard, {", ".join(COUNTED)})
        SELECT {KEY_NAMES}, 0, {", ".join(f"sum({name})" for name in COUNTED)} FROM gone
        GROUP BY {KEY_NAMES} ORDER BY {KEY_NAMES}
        ON CONFLICT ({KEY_NAMES}, shard) DO UPDATE SET
            {", ".join(f"{name} = sentiment_rollup.{name} + excluded.{name}" for name in COUNTED)}
    )
    SELECT count(*) FROM gone"""  # noqa: S608 - names of the schema
# Sums of a key that no prediction is left of. While connections have rows of it, only all of them together tell.
DROP_EMPTY = f"""
    DELETE FROM sentiment_rollup AS sums WHERE shard = 0 AND tweets = 0 AND NOT EXISTS (
        SELECT 1 FROM sentiment_rollup AS other WHERE other.shard <> 0
        AND {" AND ".join(f"other.{name} = sums.{name}" for name in KEY)})"""  # noqa: S608 - names of the schema


def delete_received_before(session: Session, before: datetime, limit: int) -> int:
    """Tweets that came in before a time, the oldest first, with their predictions."""
    ids = _oldest(session, Tweet.tweet_id, Tweet.received_at, before, limit)
    # In one statement, which the triggers count at once; a tweet that goes takes its predictions one by one.
    session.execute(delete(Prediction).where(Prediction.tweet_id.in_(ids)))
    return _delete(session, Tweet, Tweet.tweet_id, ids)


def delete_buried_before(session: Session, before: datetime, limit: int) -> int:
    """Dead letters that were buried before a time, the oldest first."""
    ids = _oldest(session, DeadLetter.record_id, DeadLetter.buried_at, before, limit)
    return _delete(session, DeadLetter, DeadLetter.record_id, ids)


def delete_windows_before(session: Session, before: datetime, limit: int) -> int:
    """Windows that began before a time, the oldest first."""
    ids = _oldest(session, ScoringWindow.id, ScoringWindow.started_at, before, limit)
    return _delete(session, ScoringWindow, ScoringWindow.id, ids)


def fold_sums(session: Session, limit: int) -> int:
    """Add the rows that PostgreSQL's connections have in `sentiment_rollup` to shard 0; SQLite has no other."""
    if session.get_bind().dialect.name == "sqlite":
        return 0
    return session.scalar(text(FOLD), {"limit": limit}) or 0


def drop_empty_sums(session: Session) -> None:
    """Take keys out of `sentiment_rollup` whose predictions are gone."""
    session.execute(text(DROP_EMPTY))


def _oldest(
    session: Session,
    key: InstrumentedAttribute[Any],
    time: InstrumentedAttribute[datetime],
    before: datetime,
    limit: int,
) -> list[Any]:
    """Keys in the order of an index on `time`: nothing is sorted, and nothing younger is looked at."""
    query = select(key).where(time < before).order_by(time).limit(limit)
    return list(session.scalars(query.with_for_update(skip_locked=True)))


def _delete(session: Session, table: type[Base], key: InstrumentedAttribute[Any], ids: list[Any]) -> int:
    session.execute(delete(table).where(key.in_(ids)))
    return len(ids)
