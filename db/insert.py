"""Insert many rows, given by column, where some may exist already. The caller owns the transaction.

SQLAlchemy's own work per row would cost as much as the database's, so the rows go to the driver in one call. PostgreSQL
takes them fastest by COPY, which has no ON CONFLICT: rows that exist are left out first. When another transaction adds
one of them in the same moment, a slower statement inserts the others.
"""

from collections.abc import Collection, Mapping, Sequence
from operator import itemgetter
from typing import Any

import sqlalchemy as sa
from msgspec.json import encode
from sqlalchemy import Connection, Dialect, Table
from sqlalchemy.orm import Session

from db.base import UtcDateTime
from db.models import Base

# Name of a column -> its values, one per row.
Columns = Mapping[str, Sequence[Any]]
Row = tuple[Any, ...]

# With fewer rows, the statements around COPY take longer than it saves.
COPY_ROWS = 32
POSTGRESQL_TYPES = {
    sa.Text: "text", sa.Float: "float8", sa.Integer: "int4", UtcDateTime: "timestamptz", sa.JSON: "jsonb",
    sa.LargeBinary: "bytea",
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


# --- SQLite


def _add_to_sqlite(connection: Connection, table: Table, columns: Columns) -> None:
    names = list(columns)
    values = [_for_sqlite(table.c[name].type, columns[name], connection.dialect) for name in names]
    key = itemgetter(*(names.index(column.name) for column in table.primary_key))
    rows = sorted(zip(*values, strict=True), key=key)
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
    names = [name for name, values in columns.items() if any(value is not None for value in values)]
    if not names:
        return set()
    for name in names:
        if isinstance(kind := table.c[name].type, UtcDateTime):
            for value in set(columns[name]):
                kind.process_bind_param(value, connection.dialect)  # refuses a time without a zone
    known = _known(connection, table, columns, possible)
    key = itemgetter(*(names.index(column.name) for column in table.primary_key))
    new: dict[Any, Row] = {}  # the first of rows with the same key
    for row in zip(*(columns[name] for name in names), strict=True):
        if key(row) not in known:
            new.setdefault(key(row), row)
    rows = [new[key] for key in sorted(new)]
    if rows and not (len(rows) >= COPY_ROWS and _copied(connection, table, names, rows)):
        _insert(connection, table, names, rows)
    return known


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
    arrays = {name: array.format(kind=_postgresql_type(table.c[name].type), name=name) for name in keys}
    conditions = [f"{name} = ANY ({given})" for name, given in arrays.items()]
    # A range as well: it is known to the plan, which then reads the partitions of these ids alone.
    where = " AND ".join([*conditions, f"{keys[0]} BETWEEN %(first)s AND %(last)s"])
    given = {name: encode(listed).decode() for name, listed in values.items()}
    given |= {"first": min(values[keys[0]]), "last": max(values[keys[0]])}
    select = f"SELECT {', '.join(keys)} FROM {table.name} WHERE {where} ORDER BY {keys[0]} FOR KEY SHARE"  # noqa: S608 - names of the schema
    found = connection.exec_driver_sql(select, given).all()
    return {row[0] for row in found} if len(keys) == 1 else set(map(tuple, found))


def _copied(connection: Connection, table: Table, names: list[str], rows: list[Row]) -> bool:
    """Insert by COPY. Returns False, and leaves nothing, when a row exists by now or has a value that is refused."""
    import psycopg  # imported here, since it loads slowly and SQLite does not need it
    from psycopg.types.json import Jsonb

    kinds = [_postgresql_type(table.c[name].type) for name in names]
    json = [index for index, kind in enumerate(kinds) if kind == "jsonb"]
    raw: Any = connection.connection.driver_connection
    connection.exec_driver_sql("SAVEPOINT copying")
    try:
        with raw.cursor().copy(f"COPY {table.name} ({', '.join(names)}) FROM STDIN (FORMAT BINARY)") as copy:
            copy.set_types(kinds)
            for row in rows:
                if json:
                    values = list(row)
                    for index in json:
                        values[index] = Jsonb(values[index], encode)
                    copy.write_row(values)
                else:
                    copy.write_row(row)
    except psycopg.Error:
        # The message would contain the row. What is wrong with it, or with the server, the next statement says.
        connection.exec_driver_sql("ROLLBACK TO SAVEPOINT copying")
        return False
    return True


def _postgresql_type(kind: Any) -> str:
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
