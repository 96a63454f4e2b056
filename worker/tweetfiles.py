"""Files of tweets, a row or line at a time, whatever shape they are in. Knows sources and shapes, no stream."""

import csv
import json
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from training.columns import ID_COLUMNS, TEXT_COLUMNS
from training.sources import Source, has_bad_bytes
from worker.errors import BadRecord
from worker.records import MAX_TEXT_CHARS, Tweet, parse_object
from worker.xapi import flat_tweets

# A document that is not a line a tweet must be read whole.
MAX_DOCUMENT_CHARS = 256 * 1024 * 1024
PARQUET_ROWS = 4_096

Rows = Iterator[tuple[int, Any]]


def read_tweets(
    source: Source, *, need_id: bool = True, topic: str | None = None
) -> Iterator[tuple[int, Tweet | BadRecord]]:
    """Every tweet of a source with the number of its line or row: the tweet, or what is wrong with it.

    JSON is one object a line or one document, flat or as the X API gives it. CSV, TSV and Parquet have named columns,
    or the guide's two, an integer label and a text. Where `need_id` is false one without an id gets its number for
    one; `topic` is for those that have none.
    """
    for number, flat in read_objects(source):
        yield number, flat if isinstance(flat, BadRecord) else _tweet(flat, number, need_id, topic)


def read_objects(source: Source) -> Rows:
    """The same before it is checked: flat objects, or what is wrong with a line."""
    for number, value in READERS[source.format](source):
        if isinstance(value, BadRecord):
            yield number, value
            continue
        try:
            for flat in flat_tweets(value):
                yield number, flat
        except (BadRecord, RecursionError) as error:
            yield number, error if isinstance(error, BadRecord) else BadRecord("the line is nested too deeply")


def _tweet(flat: Any, number: int, need_id: bool, topic: str | None) -> Tweet | BadRecord:
    if isinstance(flat, dict):
        if not need_id and not any(flat.get(key) for key in ID_COLUMNS):
            flat = {**flat, "id": str(number)}
        if topic is not None and not flat.get("topic"):
            flat = {**flat, "topic": topic}
    try:
        return parse_object(flat)
    except BadRecord as error:
        return error


def _json_values(source: Source) -> Rows:
    """The value of each line; of one document over many lines, its value."""
    filled = ((number, line) for number, line in enumerate(source.text, start=1) if line.strip())
    number, first = next(filled, (0, ""))
    if not first:
        return
    if first.strip() in ("{", "[", "[{") or (source.name.endswith((".json", ".json.gz")) and not _is_json(first)):
        yield from _document(number, first, source.text, source.encoding_name)
    else:
        yield from _lines(number, chain([first], source.text), source.encoding_name)


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _document(number: int, first: str, rest: TextIO, encoding: str) -> Rows:
    text = first + rest.read(MAX_DOCUMENT_CHARS)
    if len(text) >= MAX_DOCUMENT_CHARS:
        yield number, BadRecord("the document is too large to be read whole; write a tweet a line (JSONL)")
        return
    try:
        yield number, json.loads(text)
    except (ValueError, RecursionError):
        yield from _lines(number, text.split("\n"), encoding)  # lines after all, the first of them broken


def _lines(start: int, lines: Iterable[str], encoding: str) -> Rows:
    for number, line in enumerate(lines, start):
        if not line.strip():
            continue
        if has_bad_bytes(line):
            yield number, BadRecord(f"the line is not {encoding}")
            continue
        try:
            yield number, json.loads(line)
        except (ValueError, RecursionError):
            yield number, BadRecord("the line is not JSON")


def _csv_rows(source: Source) -> Rows:
    """Rows by their header, numbered by the line each begins at."""
    csv.field_size_limit(10 * MAX_TEXT_CHARS)
    reader = csv.reader(source.text, delimiter="\t" if source.format == "tsv" else ",")
    header: list[str] | None = None
    begins = 1
    while True:
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield begins, BadRecord(f"the row cannot be read: {error}")
            begins = reader.line_num + 1
            continue
        if header is None:
            header = [name.strip().lower() for name in values] if any(values) else None
        elif any(has_bad_bytes(value) for value in values):
            yield begins, BadRecord(f"the row is not {source.encoding_name}")
        elif values:
            yield begins, _named(header, values)
        begins = reader.line_num + 1


def _named(header: list[str], values: list[str]) -> Any:
    """Values by their column; without a column of texts they are in the guide's form, a label and a text."""
    row = dict(zip(header, values, strict=False))
    if len(values) > len(header):
        return BadRecord(
            f"the row has {len(values)} columns and the header {len(header)}; put quotes around a text with a comma"
        )
    if not any(name in row for name in TEXT_COLUMNS) and len(values) >= 2 and values[0].strip().lstrip("-").isdigit():
        row["text"] = values[1]
    return row


def _parquet_rows(source: Source) -> Rows:
    number = 0
    try:
        file = pq.ParquetFile(source.binary)
        names = [name.strip().lower() for name in file.schema_arrow.names]
        for batch in file.iter_batches(PARQUET_ROWS):
            for values in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                number += 1
                yield number, {name: _plain(value) for name, value in zip(names, values, strict=True)}
    except (pa.ArrowException, OSError, ValueError) as error:
        yield number + 1, BadRecord(f"the file is no Parquet that can be read: {str(error).splitlines()[0][:200]}")


def _plain(value: Any) -> Any:
    return value.isoformat() if hasattr(value, "isoformat") else value


READERS = {"csv": _csv_rows, "tsv": _csv_rows, "parquet": _parquet_rows, "json": _json_values}
