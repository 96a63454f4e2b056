"""Insert many rows, given by column, where some may exist already. The caller owns the transaction.

SQLAlchemy's own work per row would cost as much as the database's, so the rows go to the driver in one call. PostgreSQL
takes them fastest by COPY, which has no ON CONFLICT: rows that exist are left out first. When another transaction adds
one of them in the same moment, a slower statement inserts the others. COPY is faster still into a partition, by its
name: it then writes many rows at once, as no trigger waits for them.
"""

import time
from bisect import bisect_right
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from operator import itemgetter
from typing import Any

import sqlalchemy as sa
from msgspec.json import encode
from sqlalchemy import Connection, Dialect, Table
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from db.admin.partitions import BOUNDS
from db.base import UtcDateTime
from db.models import Base

# Name of a column -> its values, one per row.
Columns = Mapping[str, Sequence[Any]]
Row = tuple[Any, ...]

# With fewer rows, the statements around COPY take longer than it saves.
COPY_ROWS = 32
# The first byte of a binary jsonb: the version of its form.
JSONB_FORM = b"\x01"
# What a binary timestamptz counts, and from when.
MICROSECOND, YEAR_2000 = timedelta(microseconds=1), datetime(2000, 1, 1, tzinfo=UTC)
SAME_BYTES = {"jsonb": "bytea", "timestamptz": "int8"}
POSTGRESQL_TYPES = {
    sa.Text: "text", sa.Float: "float8", sa.Integer: "int4", UtcDateTime: "timestamptz", sa.JSON: "jsonb",
    sa.LargeBinary: "bytea", sa.Date: "date",
}  # fmt: skip


def add_rows(session: Session, model: type[Base], rows: Sequence[dict[str, Any]]) -> None:
    """`add_columns` for rows that have the same columns."""
    if rows:
        add_columns(session, model, {name: [row[name] for row in rows] for name in rows[0]})


def add_columns(
    session: Session, model: type[Base], columns: Columns, possible: Collection[str] | None = None
) -> Collection[Any]:
    """Insert rows whose key is new. Those that exist cannot be deleted until the transaction ends.

    Rows are locked in the order of their keys, so that two workers with the same tweets wait and do not deadlock. With
    `possible`, only rows whose first key column is one of these can exist. Returns the keys that existed before; SQLite
    does not look for them, and returns all keys.
    """
    table: Any = model.__table__
    connection = session.connection()
    if connection.dialect.name == "sqlite":
        _add_to_sqlite(connection, table, columns)
        return columns[table.primary_key.columns[0].name]
    return _add_to_postgresql(connection, table, columns, possible)


def chosen(columns: Columns, rows: Sequence[int]) -> Columns:
    """The columns of some rows, by their numbers."""
    return {name: [values[row] for row in rows] for name, values in columns.items()}


def _key(table: Table, names: Sequence[str]) -> Callable[[Row], Any]:
    """Takes the primary key from a row of these columns."""
    return itemgetter(*(names.index(column.name) for column in table.primary_key))


# --- SQLite


def _add_to_sqlite(connection: Connection, table: Table, columns: Columns) -> None:
    names = list(columns)
    values = [_for_sqlite(table.c[name].type, columns[name], connection.dialect) for name in names]
    rows = sorted(zip(*values, strict=True), key=_key(table, names))
    if rows:
        marks = ", ".join("?" * len(names))
        statement = f"INSERT INTO {table.name} ({', '.join(names)}) VALUES ({marks}) ON CONFLICT DO NOTHING"  # noqa: S608 - names of the schema
        connection.exec_driver_sql(statement, rows)


def _for_sqlite(kind: Any, values: Sequence[Any], dialect: Dialect) -> Sequence[Any]:
    if isinstance(kind, UtcDateTime):
        # Few distinct ones: a window is scored at one time, and records arrive many in a millisecond.
        times = {value: kind.process_bind_param(value, dialect) for value in set(values)}
        return [times[value] for value in values]
    if isinstance(kind, sa.JSON):
        return [None if value is None else encode(value).decode() for value in values]
    return values


# --- PostgreSQL


def _add_to_postgresql(
    connection: Connection, table: Table, columns: Columns, possible: Collection[str] | None
) -> set[Any]:
    names = _names(table, columns)
    if not names:
        return set()
    known = _known(connection, table, columns, possible)
    rows = _new_rows(table, names, columns, known)
    fast = len(rows) >= COPY_ROWS and _attempt(connection, lambda: _copy(connection, table, table.name, names, rows))
    if rows and not fast:
        _insert(connection, table, names, rows)
    return known


def _names(table: Table, columns: Columns) -> list[str]:
    """The columns with values. Raises `ValueError` for a time without a zone."""
    names = [name for name, values in columns.items() if any(value is not None for value in values)]
    for name in names:
        if isinstance(table.c[name].type, UtcDateTime):
            for value in columns[name]:
                if value is not None and value.tzinfo is None:
                    raise ValueError(f"{name}: {value!r} has no time zone; use an aware datetime in UTC")
    return names


def _new_rows(table: Table, names: list[str], columns: Columns, known: Collection[Any]) -> list[Row]:
    """In the order of their keys, the first of rows with the same key, without those whose key is known."""
    key = _key(table, names)
    new: dict[Any, Row] = {}
    for row in zip(*(columns[name] for name in names), strict=True):
        if key(row) not in known:
            new.setdefault(key(row), row)
    return [new[key] for key in sorted(new)]


def _known(connection: Connection, table: Table, columns: Columns, possible: Collection[str] | None) -> set[Any]:
    """The keys that exist, locked against deletion. A key of one column is its value, others are tuples."""
    keys = [column.name for column in table.primary_key]
    values = {name: list(set(columns[name])) for name in keys}
    if possible is not None:
        values[keys[0]] = [value for value in values[keys[0]] if value in possible]
    if not values[keys[0]]:
        return set()
    # As JSON, since the driver takes longer to write an array.
    array = "ARRAY(SELECT CAST(value AS {kind}) FROM json_array_elements_text(CAST(%({name})s AS json)) AS value)"
    arrays = {name: array.format(kind=postgresql_type(table.c[name].type), name=name) for name in keys}
    conditions = [f"{name} = ANY ({given})" for name, given in arrays.items()]
    # A range as well: it is known to the plan, which then reads the partitions of these ids alone.
    where = " AND ".join([*conditions, f"{keys[0]} BETWEEN %(first)s AND %(last)s"])
    given = {name: encode(listed).decode() for name, listed in values.items()}
    given |= {"first": min(values[keys[0]]), "last": max(values[keys[0]])}
    select = f"SELECT {', '.join(keys)} FROM {table.name} WHERE {where} ORDER BY {keys[0]} FOR KEY SHARE"  # noqa: S608 - names of the schema
    found = connection.exec_driver_sql(select, given).all()
    return {row[0] for row in found} if len(keys) == 1 else set(map(tuple, found))


def _attempt(connection: Connection, work: Callable[[], None]) -> bool:
    """Returns False, and leaves nothing of the work, when a row exists by now or has a value that is refused."""
    import psycopg  # imported here, since it loads slowly and SQLite does not need it

    connection.exec_driver_sql("SAVEPOINT copying")
    try:
        work()
    except (psycopg.Error, DBAPIError):
        # The message would contain the row. What is wrong with it, or with the server, the next statement says.
        connection.exec_driver_sql("ROLLBACK TO SAVEPOINT copying")
        return False
    return True


def _copy(connection: Connection, table: Table, target: str, names: list[str], rows: list[Row]) -> None:
    """Insert by COPY into `target`, the table or a partition of it."""
    kinds = [postgresql_type(table.c[name].type) for name in names]
    columns = [_for_copy(kind, column) for kind, column in zip(kinds, zip(*rows, strict=True), strict=True)]
    raw: Any = connection.connection.driver_connection
    with raw.cursor().copy(f"COPY {target} ({', '.join(names)}) FROM STDIN (FORMAT BINARY)") as copy:
        copy.set_types([SAME_BYTES.get(kind, kind) for kind in kinds])
        for row in zip(*columns, strict=True):
            copy.write_row(row)


def _for_copy(kind: str, values: Sequence[Any]) -> Sequence[Any]:
    """As a type that the driver writes faster, with the same bytes: see `SAME_BYTES`."""
    if kind == "jsonb":
        return [None if value is None else JSONB_FORM + encode(value) for value in values]
    if kind == "timestamptz":
        return [None if value is None else (value - YEAR_2000) // MICROSECOND for value in values]
    return values


def postgresql_type(kind: Any) -> str:
    return next(name for base, name in POSTGRESQL_TYPES.items() if isinstance(kind, base))


def _insert(connection: Connection, table: Table, names: list[str], rows: list[Row]) -> None:
    """One statement with one parameter; the statement triggers run once."""
    binary = [index for index, name in enumerate(names) if isinstance(table.c[name].type, sa.LargeBinary)]
    if binary:
        rows = [tuple(f"\\x{v.hex()}" if i in binary and v is not None else v for i, v in enumerate(r)) for r in rows]
    source = f"json_populate_recordset(NULL::{table.name}, CAST(%(rows)s AS json))"
    chosen = f"SELECT {', '.join(names)} FROM {source} ON CONFLICT DO NOTHING"  # noqa: S608 - names of the schema
    given = encode([dict(zip(names, row, strict=True)) for row in rows]).decode()
    connection.exec_driver_sql(f"INSERT INTO {table.name} ({', '.join(names)}) {chosen}", {"rows": given})


# --- PostgreSQL's partitions of tweets and predictions

# How long a connection relies on what it knows of them. A partition that is gone by then is noticed by its COPY.
PARTITIONS_SECONDS = 60.0
PARTITIONS = """
    SELECT c.relname, pg_get_expr(c.relpartbound, c.oid)
    FROM pg_inherits AS i JOIN pg_class AS c ON c.oid = i.inhrelid WHERE i.inhparent = to_regclass('tweets')"""


def partition_of(session: Session, ids: Sequence[str]) -> str | None:
    """The end of the name of the partition that all these tweets belong to.

    None when they are few, belong to several, or to none with bounds, and on SQLite.
    """
    connection = session.connection()
    if connection.dialect.name == "sqlite" or len(ids) < COPY_ROWS:
        return None
    read_at, partitions = connection.info.get("partitions", (-PARTITIONS_SECONDS, []))
    if time.monotonic() - read_at > PARTITIONS_SECONDS:
        # Without bounds: one that is dropped in this moment.
        found = [(name, BOUNDS.fullmatch(bounds or "")) for name, bounds in connection.exec_driver_sql(PARTITIONS)]
        partitions = sorted((match[2] or "", match[3], name[len("tweets_") :]) for name, match in found if match)
        connection.info["partitions"] = time.monotonic(), partitions
    place = bisect_right(partitions, min(ids), key=itemgetter(0)) - 1
    if place < 0:
        return None
    _, end, suffix = partitions[place]
    return suffix if max(ids) < end else None


def known(session: Session, model: type[Base], columns: Columns) -> set[Any]:
    """The keys among these rows that exist, locked against deletion until the transaction ends. PostgreSQL only."""
    table: Any = model.__table__
    return _known(session.connection(), table, columns, None)


def copied_to(
    session: Session, partition: str, added: Mapping[type[Base], Columns], afterwards: Callable[[], None]
) -> bool:
    """Insert new rows into the partitions of their tables, where no trigger of the tables runs, and call `afterwards`.

    Returns False, and leaves nothing, when that is not possible: `partition_of` is asked anew then.
    """
    connection = session.connection()

    def work() -> None:
        for model, columns in added.items():
            table: Any = model.__table__
            names = _names(table, columns)
            rows = sorted(zip(*(columns[name] for name in names), strict=True), key=_key(table, names))
            _copy(connection, table, f"{table.name}_{partition}", names, rows)
        afterwards()

    done = _attempt(connection, work)
    if not done:
        connection.info.pop("partitions", None)
    return done
