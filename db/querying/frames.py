"""Query results as pandas frames, with the same types from SQLite and PostgreSQL. Imports pandas on first use.

SQLite returns only text, bytes and numbers. A column with the name of a column of the schema gets that column's type.
Any other text column becomes a column of times or days when all of its values have the format in which SQLite stores
them.
"""

import json
import re
from collections.abc import Generator, Mapping, Sequence
from datetime import date, datetime
from decimal import Decimal
from itertools import islice
from typing import TYPE_CHECKING, Any

from sqlalchemy import JSON, Boolean, Float, Integer, Text

from db.base import UtcDateTime
from db.models import Base  # with all tables
from db.querying.readonly import run_query

if TYPE_CHECKING:
    import pandas as pd

TIME = "datetime64[us, UTC]"
# pandas dtypes by the type of a schema column: without NULLs, and with NULLs.
DTYPES = {
    UtcDateTime: (TIME, TIME), Boolean: ("bool", "boolean"), Integer: ("int64", "Int64"),
    Float: ("float64", "float64"), Text: ("str", "str"), JSON: ("object", "object"),
}  # fmt: skip
SCHEMA = {
    column.name: kind
    for table in Base.metadata.tables.values()
    for column in table.columns
    for kind in DTYPES
    if isinstance(column.type, kind)
} | {"hour_utc": UtcDateTime}
NUMBERS = {bool: DTYPES[Boolean], int: DTYPES[Integer], float: DTYPES[Float]}
TIME_FORM = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d{6})?Z")
DAY_FORM = re.compile(r"\d{4}-\d\d-\d\d")


def whole(url: str, sql: str, parameters: Mapping[str, Any] | None = None) -> "pd.DataFrame":
    """The result of one SELECT, in which `:name` stands for a parameter. Raises `DatabaseError`."""
    with run_query(url, sql, parameters) as (columns, rows):
        return of_rows(columns, list(rows))


def in_chunks(url: str, sql: str, chunksize: int) -> "Generator[pd.DataFrame, None, None]":
    """The result in frames of up to `chunksize` rows; one empty frame when there are no rows.

    This call executes the query, not the first iteration. The connection closes with the generator: when it is
    exhausted, closed or garbage-collected.
    """
    frames = _chunks(url, sql, chunksize)
    next(frames)
    return frames


def _chunks(url: str, sql: str, chunksize: int) -> "Generator[pd.DataFrame, None, None]":
    """First yields an empty frame once the database has executed the query."""
    with run_query(url, sql) as (columns, rows):
        nothing = of_rows(columns, [])
        yield nothing
        if not (chunk := list(islice(rows, chunksize))):
            yield nothing
        while chunk:
            yield of_rows(columns, chunk)
            chunk = list(islice(rows, chunksize))


def of_rows(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> "pd.DataFrame":
    import pandas as pd

    values = list(zip(*rows, strict=True)) if rows else [()] * len(columns)
    series = {place: _series(name, values[place]) for place, name in enumerate(columns)}
    frame = pd.DataFrame(series, index=range(len(rows)))
    frame.columns = pd.Index(columns)  # two columns may have the same name
    return frame


def _series(name: str, values: Sequence[Any]) -> "pd.Series[Any]":
    import pandas as pd

    there = [value for value in values if value is not None]
    kind, with_nulls = SCHEMA.get(name), len(there) < len(values)
    if not there:
        return pd.Series(values, dtype=DTYPES[kind][with_nulls] if kind else "object")
    found = _common(there)
    if found is int and kind is Boolean and set(there) <= {0, 1}:
        found, values = bool, [None if value is None else bool(value) for value in values]
    try:
        if found is str:
            return _of_text(values, there, kind)
        if found in (datetime, date):
            zoned = found is datetime and there[0].tzinfo is not None
            return _of_times(values, zoned)
        return pd.Series(values, dtype=NUMBERS.get(found, ("object", "object"))[with_nulls])
    except (ValueError, OverflowError):  # integers above 64 bits, or text that is not JSON or not a time
        return pd.Series(values, dtype="str" if found is str else "object")


def _common(there: Sequence[Any]) -> type:
    """The common type of the values: float for mixed numbers, object for anything else that is mixed."""
    types = {type(value) for value in there}
    if types == {Decimal}:  # PostgreSQL: sums of integers have no decimals, means have
        return int if all(value.as_tuple().exponent == 0 for value in there) else float
    if len(types) == 1:
        return types.pop()
    return float if types <= {int, float, Decimal} else object


def _of_text(values: Sequence[Any], there: Sequence[str], kind: type | None) -> "pd.Series[Any]":
    """Parse JSON and times that SQLite stores as text; other text is unchanged."""
    import pandas as pd

    if kind is JSON:
        return pd.Series([None if value is None else json.loads(value) for value in values], dtype="object")
    for form, zoned in ((TIME_FORM, True), (DAY_FORM, False)):
        if kind is not Text and all(map(form.fullmatch, there)):
            return _of_times(values, zoned)
    return pd.Series(values, dtype="str")


def _of_times(values: Sequence[Any], zoned: bool) -> "pd.Series[pd.Timestamp]":
    import pandas as pd

    return pd.to_datetime(pd.Series(values, dtype="object"), format="ISO8601", utc=zoned).dt.as_unit("us")
