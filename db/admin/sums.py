"""The sums of predictions: by hour and topic for analysts, by day of arrival for live quality and drift.

Triggers of `predictions` keep them. This module counts what triggers do not, folds the shards, and drops keys without
predictions. The caller owns the transaction.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from functools import cache
from typing import Any

from msgspec.json import encode
from sqlalchemy import select, text
from sqlalchemy.dialects.sqlite import insert as sqlite_insert
from sqlalchemy.orm import Session

from db.insert import Columns, postgresql_type
from db.models import Base, DriftRollup, Prediction, SentimentRollup, Tweet

TABLES: tuple[type[Base], ...] = (SentimentRollup, DriftRollup)
# As in v_drift: the bins of a length in characters end below these, those of a share of unknown tokens at these.
LENGTHS, SHARES = (10, 20, 40, 80, 140), (0.0, 0.02, 0.05, 0.1)
DAY_SECONDS, HOUR_SECONDS = 86_400, 3_600
# What cleaning takes off a length, about.
LINK_CHARS, MENTION_CHARS = 24, 12
OF_TWEET = (Tweet.text, Tweet.topic, Tweet.tweet_created_at, Tweet.received_at)
OF_PREDICTION = (
    Prediction.model_version_id, Prediction.label, Prediction.probability, Prediction.score_signed,
    Prediction.unknown_share,
)  # fmt: skip

# --- rows that no trigger counts


def count(session: Session, tweets: Columns, scored: Columns) -> None:
    """Add predictions to the sums, given by column in the order of their tweets."""
    _add(session, SentimentRollup, _by_hour(tweets, scored))
    _add(session, DriftRollup, _by_day(tweets, scored))


def count_again(session: Session, tweet_ids: Sequence[str]) -> None:
    """Add the predictions of tweets to the sums, from which their deletion then subtracts them."""
    query = select(*OF_TWEET, *OF_PREDICTION).join_from(Prediction, Tweet, Tweet.tweet_id == Prediction.tweet_id)
    found = session.execute(query.where(Tweet.tweet_id.in_(tweet_ids), Prediction.tweet_id.in_(tweet_ids)))
    columns = dict(zip(found.keys(), zip(*found, strict=True), strict=False))
    if columns:
        count(session, columns, columns)


def _by_hour(tweets: Columns, scored: Columns) -> Iterator[tuple[Any, ...]]:
    sums: dict[tuple[Any, ...], list[Any]] = {}
    times = zip(tweets["tweet_created_at"], tweets["received_at"], strict=True)
    hours = [(created or received).timestamp() // HOUR_SECONDS for created, received in times]
    columns = (scored[name] for name in ("model_version_id", "label", "probability", "score_signed"))
    for hour, topic, version, label, probability, score in zip(hours, tweets["topic"], *columns, strict=True):
        found = sums.setdefault((version, hour, topic or "", label), [0, 0.0, 0.0, 0])
        found[0] += 1
        found[1] += probability
        if score is not None:
            found[2] += score
            found[3] += 1
    for (version, hour, *rest), values in sums.items():
        yield version, datetime.fromtimestamp(HOUR_SECONDS * hour, UTC), *rest, *values


def _by_day(tweets: Columns, scored: Columns) -> Iterator[tuple[Any, ...]]:
    sums: dict[tuple[Any, ...], list[Any]] = {}
    days = [received.timestamp() // DAY_SECONDS for received in tweets["received_at"]]
    columns = (scored[name] for name in ("model_version_id", "label", "probability"))
    shares = scored.get("unknown_share", [None] * len(days))
    for day, tweet, version, label, probability, unknown in zip(days, tweets["text"], *columns, shares, strict=True):
        chars = len(tweet) - LINK_CHARS * tweet.count("http") - MENTION_CHARS * tweet.count("@")
        unknown_bin = "" if unknown is None else bisect_left(SHARES, unknown)
        found = sums.setdefault((version, day, label, bisect_right(LENGTHS, chars), unknown_bin), [0, 0.0])
        found[0] += 1
        found[1] += probability
    for (version, day, label, *bins), values in sums.items():
        yield version, datetime.fromtimestamp(DAY_SECONDS * day, UTC).date(), label, *map(str, bins), *values


def _add(session: Session, model: type[Base], rows: Iterator[tuple[Any, ...]]) -> None:
    table: Any = model.__table__
    key, counted = _names(model)
    given = [dict(zip(key + counted, row, strict=True)) for row in rows]
    if session.get_bind().dialect.name == "sqlite":
        insert = sqlite_insert(table)
        more = {name: table.c[name] + insert.excluded[name] for name in counted}
        statement = insert.on_conflict_do_update(index_elements=[*key, "shard"], set_=more)
        session.execute(statement, [row | {"shard": 0} for row in given])
    else:
        session.connection().exec_driver_sql(_add_to_postgresql(model), {"sums": encode(given).decode()})


def _names(model: type[Base]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The columns of the key without the shard, and those that are added up."""
    table: Any = model.__table__
    key = tuple(column.name for column in table.primary_key if column.name != "shard")
    return key, tuple(column.name for column in table.c if not column.primary_key)


@cache
def _add_to_postgresql(model: type[Base]) -> str:
    table: Any = model.__table__
    key, counted = (", ".join(names) for names in _names(model))
    kinds = ", ".join(f"{c.name} {postgresql_type(c.type)}" for c in table.c if c.name != "shard")
    return f"""
        INSERT INTO {table.name} ({key}, shard, {counted})
        SELECT {key}, pg_backend_pid(), {counted} FROM json_to_recordset(CAST(%(sums)s AS json)) AS sums({kinds})
        {_add_up(model)}"""  # noqa: S608 - names of the schema


def _add_up(model: type[Base]) -> str:
    key, counted = _names(model)
    more = ", ".join(f"{name} = {model.__tablename__}.{name} + excluded.{name}" for name in counted)
    return f"ON CONFLICT ({', '.join(key)}, shard) DO UPDATE SET {more}"


# --- shards and empty keys


def fold(session: Session, model: type[Base], limit: int) -> int:
    """Add up to `limit` rows of other shards to shard 0, and return their number. SQLite has only shard 0.

    Rows that another transaction has locked are skipped.
    """
    if session.get_bind().dialect.name == "sqlite":
        return 0
    return session.scalar(text(_fold(model)), {"limit": limit}) or 0


@cache
def _fold(model: type[Base]) -> str:
    """One statement, so that a reader sees either the rows of the shards or their sum. Only this statement writes to
    shard 0, and it skips rows that the transaction of a scoring worker has locked, so it never waits for one."""
    key, counted = (", ".join(names) for names in _names(model))
    summed = ", ".join(f"sum({name})" for name in _names(model)[1])
    return f"""
        WITH gone AS (
            DELETE FROM {model.__tablename__} WHERE ctid = ANY (ARRAY(
                SELECT ctid FROM {model.__tablename__} WHERE shard <> 0 LIMIT :limit FOR UPDATE SKIP LOCKED))
            RETURNING {key}, {counted}
        ), folded AS (
            INSERT INTO {model.__tablename__} ({key}, shard, {counted})
            SELECT {key}, 0, {summed} FROM gone GROUP BY {key} ORDER BY {key} {_add_up(model)}
        )
        SELECT count(*) FROM gone"""  # noqa: S608 - names of the schema


def drop_empty(session: Session, model: type[Base]) -> None:
    """Delete the keys without predictions. A key with rows in other shards is kept: only the sum of all shards shows
    that it is empty."""
    same = " AND ".join(f"other.{name} = sums.{name}" for name in _names(model)[0])
    session.execute(
        text(f"""
            DELETE FROM {model.__tablename__} AS sums WHERE shard = 0 AND tweets = 0 AND NOT EXISTS (
                SELECT 1 FROM {model.__tablename__} AS other WHERE other.shard <> 0 AND {same})""")  # noqa: S608
    )
