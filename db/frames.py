"""Answers as pandas frames, of the same types from SQLite as from PostgreSQL. Loads pandas when it is asked.

SQLite answers with text and numbers alone. A column that is called as one of the schema's is of that one's type; any
other is a column of times, or of days, when all of its text has exactly the form in which SQLite holds them.
"""

import json
import re
from collections.abc import Generator, Sequence
from datetime import date, datetime
from decimal import Decimal
from itertools import islice
from typing import TYPE_CHECKING, Any

from sqlalchemy import JSON, Boolean, Float, Integer, Text

from db.models import Base, UtcDateTime
from db.readonly import ask

if TYPE_CHECKING:
    import pandas as pd

TIME = "datetime64[us, UTC]"
# By the type of a schema's column: without NULLs, and with them.
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


def whole(url: str, sql: str) -> "pd.DataFrame":
    """The answer to one SELECT. Raises `DatabaseError`."""
    with ask(url, sql) as (columns, rows):
        return _frame(columns, list(rows))


def in_chunks(url: str, sql: str, chunksize: int) -> "Generator[pd.DataFrame, None, None]":
    """The same, `chunksize` rows at a time; of no rows, one empty frame. The question is asked at once.

    The connection is closed with the generator: when that is exhausted, closed or no longer referred to.
    """
    frames = _chunks(url, sql, chunksize)
    next(frames)
    return frames


def _chunks(url: str, sql: str, chunksize: int) -> "Generator[pd.DataFrame, None, None]":
    """First of all an empty frame, when the database has taken the question."""
    with ask(url, sql) as (columns, rows):
        nothing = _frame(columns, [])
        yield nothing
        if not (chunk := list(islice(rows, chunksize))):
            yield nothing
        while chunk:
            yield _frame(columns, chunk)
            chunk = list(islice(rows, chunksize))


def _frame(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> "pd.DataFrame":
    import pandas as pd

    values = list(zip(*rows, strict=True)) if rows else [()] * len(columns)
    series = {place: _series(name, values[place]) for place, name in enumerate(columns)}
    frame = pd.DataFrame(series, index=range(len(rows)))
    frame.columns = pd.Index(columns)  # two may have one name
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
    except (ValueError, OverflowError):  # more than 64 bits; and of text, no JSON or no time after all
        return pd.Series(values, dtype="str" if found is str else "object")


def _common(there: Sequence[Any]) -> type:
    """The type that all values have: float for numbers of several, object for a mixture."""
    types = {type(value) for value in there}
    if types == {Decimal}:  # PostgreSQL's sums of integers are whole, its means have decimals
        return int if all(value.as_tuple().exponent == 0 for value in there) else float
    if len(types) == 1:
        return types.pop()
    return float if types <= {int, float, Decimal} else object


def _of_text(values: Sequence[Any], there: Sequence[str], kind: type | None) -> "pd.Series[Any]":
    """JSON and times as SQLite holds them, or what is text and stays it."""
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
