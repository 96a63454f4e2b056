"""Partitions of `tweets` and `predictions` on PostgreSQL: which there are, which to add, and which may be dropped.

A partition holds the tweets of a period, since an id of Twitter begins with the time at which its tweet was written.
Rows with other ids, and of periods without a partition, are in the partition `other`. Functions of migration 0006 add
and drop partitions with the rights of the schema's owner.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from sqlalchemy import text
from sqlalchemy.orm import Session

# Milliseconds since this time are the upper bits of an id.
EPOCH = datetime(2010, 11, 4, 1, 42, 54, 657_000, tzinfo=UTC)
OTHER_BITS = 22
OTHER = "other"
# Partitions for at least so many widths and so long are there before their first tweet.
AHEAD_WIDTHS, AHEAD = 4, timedelta(hours=2)
# The period of retention has about so many partitions. Without retention they are longer, since all of them stay.
PARTS = 30
LONGEST, WITHOUT_RETENTION = timedelta(days=7), timedelta(days=30)
# A partition with more tweets that arrived after the period of retention is not dropped as a whole.
MOST_LATE = 100_000

LIST = """
    SELECT c.relname, pg_get_expr(c.relpartbound, c.oid), pg_total_relation_size(c.oid),
           pg_total_relation_size(to_regclass('predictions' || substr(c.relname, 7))),
           greatest(s.n_live_tup, 0), greatest(p.n_live_tup, 0)
    FROM pg_inherits AS i JOIN pg_class AS c ON c.oid = i.inhrelid
    LEFT JOIN pg_stat_all_tables AS s ON s.relid = c.oid
    LEFT JOIN pg_stat_all_tables AS p ON p.relid = to_regclass('predictions' || substr(c.relname, 7))
    WHERE i.inhparent = 'tweets'::regclass ORDER BY c.relname"""
BOUNDS = re.compile(r"FOR VALUES FROM \((MINVALUE|'(\d+)')\) TO \('(\d+)'\)")


@dataclass(frozen=True)
class Partition:
    """`start` and `end` are the times of its first id and of the first id after it.

    `start` is None for the rows of before the upgrade, both are None for the partition `other`. The numbers of rows are
    estimates of the server; bytes include indexes.
    """

    name: str
    start: datetime | None
    end: datetime | None
    tweets: int
    predictions: int
    bytes: int


def first_id(at: datetime) -> str:
    """The smallest id of a tweet that is written at `at` or later, 2018-05-28 at the earliest: 19 digits."""
    return str((at - EPOCH) // timedelta(milliseconds=1) << OTHER_BITS)


def time_of(tweet_id: str) -> datetime:
    return EPOCH + timedelta(milliseconds=int(tweet_id) >> OTHER_BITS)


def listed(session: Session) -> list[Partition]:
    """The partitions by their period, `other` last; none on SQLite and before migration 0006."""
    if session.get_bind().dialect.name == "sqlite":
        return []
    found = []
    for name, bounds, of_tweets, of_predictions, tweets, predictions in session.execute(text(LIST)):
        if bounds is None or of_tweets is None:
            continue  # it is dropped in this moment
        match = BOUNDS.fullmatch(bounds)
        start = time_of(match[2]) if match and match[2] else None
        end = time_of(match[3]) if match else None
        size = of_tweets + (of_predictions or 0)
        found.append(Partition(name.removeprefix("tweets_"), start, end, tweets, predictions or 0, size))
    last = datetime.max.replace(tzinfo=UTC)
    return sorted(found, key=lambda partition: (partition.end or last, partition.name))


def width(retention_days: float | None) -> timedelta:
    """The length of new partitions: whole days, hours or minutes."""
    if retention_days is None:
        return WITHOUT_RETENTION
    wanted = min(LONGEST, timedelta(days=retention_days) / PARTS)
    units = (timedelta(days=1), timedelta(hours=1), timedelta(minutes=1))
    unit = next((unit for unit in units if wanted >= unit), units[-1])
    return max(1, round(wanted / unit)) * unit


def missing(existing: Sequence[Partition], now: datetime, length: timedelta) -> list[tuple[datetime, datetime]]:
    """The periods, from the one before `now` until some time ahead, that no partition covers."""
    start = max((p.end for p in existing if p.end is not None), default=EPOCH)
    start = max(start, _floor(now - length, length))
    periods = []
    while start < now + max(AHEAD, AHEAD_WIDTHS * length):
        # Periods begin at whole multiples of their length, also after one of another length.
        end = _floor(start + length, length)
        periods.append((start, end))
        start = end
    return periods


def add(session: Session, period: tuple[datetime, datetime]) -> int:
    """Add the partition of a period, which no other covers. Returns how many rows move there from `other`.

    Inserts of other ids wait for the transaction. Raises SQLAlchemy's `OperationalError` when the tables stay locked.
    """
    start, end = period
    name = f"{start:%Y%m%d}" if start.time() == datetime.min.time() else f"{start:%Y%m%d_%H%M}"
    given = {"name": name, "first": first_id(start), "end": first_id(end)}
    return session.scalar(text("SELECT add_tweets_partition(:name, :first, :end)"), given) or 0


def to_drop(session: Session, before: datetime) -> list[Partition]:
    """Partitions of periods that ended before a time, with few tweets that were received later."""
    ended = [partition for partition in listed(session) if partition.end is not None and partition.end <= before]
    return [partition for partition in ended if _late(session, partition, before) <= MOST_LATE]


def drop(session: Session, partition: Partition, before: datetime) -> int:
    """Drop a partition with its predictions and labels. Returns how many tweets, received later, move to `other`.

    Everything waits for the transaction. Raises as `add` does.
    """
    given = {"name": partition.name, "before": before}
    return session.scalar(text("SELECT drop_tweets_partition(:name, :before)"), given) or 0


def to_delete_from(session: Session, before: datetime) -> list[str]:
    """The tables whose old tweets are deleted by rows: `other`, the rows of before the upgrade, and partitions that are
    not dropped for tweets that arrived late."""
    found = listed(session)
    if not found:
        return ["tweets"]
    return [f"tweets_{p.name}" for p in found if p.start is None or (p.end is not None and p.end <= before)]


def _late(session: Session, partition: Partition, before: datetime) -> int:
    rows = f"SELECT 1 FROM tweets_{partition.name} WHERE received_at >= :before LIMIT {MOST_LATE + 1}"  # noqa: S608 - a name of the schema
    return session.scalar(text(f"SELECT count(*) FROM ({rows}) AS late"), {"before": before}) or 0  # noqa: S608


def _floor(at: datetime, length: timedelta) -> datetime:
    """The last whole multiple of `length`, counted from a Monday, at or before a time."""
    origin = datetime(2018, 6, 4, tzinfo=UTC)
    return origin + (at - origin) // length * length
