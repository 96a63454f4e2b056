"""Queries of the periodic maintenance: delete old tweets, dead letters and windows.

Each call handles up to `limit` rows and returns their number; fewer than `limit` means that there are no more. The
caller owns the transaction. Several workers may run them at once, since rows that another transaction has locked are
skipped.
"""

from datetime import datetime
from typing import Any

from sqlalchemy import column, delete, select, table
from sqlalchemy.orm import InstrumentedAttribute, Session

from db.admin import sums
from db.models import Base, DeadLetter, Prediction, ScoringWindow, Tweet

# SQLite's mode in which a file becomes shorter only when asked.
INCREMENTAL = 2


def delete_received_before(session: Session, before: datetime, limit: int, source: str = "tweets") -> int:
    """Delete tweets received before a time, oldest first, with their predictions. The sums stay.

    `source` is `tweets` or one of its partitions.
    """
    stored = table(source, column("tweet_id"), column("received_at"))
    query = select(stored.c.tweet_id).where(stored.c.received_at < before).order_by(stored.c.received_at).limit(limit)
    ids = list(session.scalars(query.with_for_update(skip_locked=True)))
    if ids:
        sums.count_again(session, ids)
        # Before the tweets, in one statement: SQLite's trigger on tweets would delete them tweet by tweet.
        session.execute(delete(Prediction).where(Prediction.tweet_id.in_(ids)))
        session.execute(delete(Tweet).where(Tweet.tweet_id.in_(ids)))
    return len(ids)


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
