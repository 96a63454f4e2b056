"""Turn the rows of a table into tweets. Handles rows and responses of the X API."""

from collections.abc import Iterator
from typing import Any

from training.data.columns import ID_COLUMNS, INTEGER, TEXT_COLUMNS
from training.data.table_file import TableFile
from training.errors import BadRow
from worker.errors import BadRecord
from worker.intake.x_api import flat_tweets
from worker.stream.tweet_record import Tweet, parse_object


def read_tweets(
    table: TableFile, *, need_id: bool = True, topic: str | None = None
) -> Iterator[tuple[int, Tweet | BadRecord]]:
    """Yield the number of each line or row with its tweet, or with the reason why it is not a tweet.

    JSON is one object a line or one document, flat or as the X API returns it. Other formats have named columns; CSV
    and TSV may have the guide's two, an integer label and a text. Without `need_id`, a tweet that has no id takes its
    number as the id. `topic` applies to tweets that have none.
    """
    for number, values in read_objects(table):
        if isinstance(values, dict):
            if not need_id and not any(values.get(key) for key in ID_COLUMNS):
                values = {**values, "id": str(number)}
            if topic is not None and not values.get("topic"):
                values = {**values, "topic": topic}
        try:
            if isinstance(values, BadRecord):
                raise values
            yield number, parse_object(values)
        except BadRecord as fault:
            yield number, fault


def read_objects(table: TableFile) -> Iterator[tuple[int, Any]]:
    """Yield the number of each line or row with its flat objects before they are checked, or with a `BadRecord`."""
    for number, value in table.rows():
        if isinstance(value, BadRow):
            yield number, BadRecord(str(value))
            continue
        try:
            for flat in flat_tweets(_with_text(value) if table.format in ("csv", "tsv") else value):
                yield number, flat
        except BadRecord as fault:
            yield number, fault
        except RecursionError:
            yield number, BadRecord("the line is nested too deeply; write flat objects")


def _with_text(row: dict[str, str]) -> dict[str, str]:
    """Add `text` to a row of the guide's form, whose columns are an integer label and a text under any name."""
    if len(row) > 1 and not any(name in row for name in TEXT_COLUMNS):
        label, text, *_ = row.values()
        if INTEGER.fullmatch(label.strip()):
            return {**row, "text": text}
    return row
