"""Export predictions to CSV, JSON lines or Parquet, in chunks."""

import csv
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq
from sqlalchemy import func, select

from db import registry
from db.errors import NotFound
from db.models import Prediction, Tweet
from db.session import Database

CHUNK_ROWS = 5_000
COLUMNS = (
    Tweet.tweet_id, Tweet.text, Tweet.author_id, Tweet.lang, Tweet.topic, Tweet.tweet_created_at, Tweet.received_at,
    Prediction.model_version_id, Prediction.label, Prediction.probability, Prediction.score_signed,
    Prediction.scored_at, Prediction.decided_by,
)  # fmt: skip
TIME, TEXT = pa.timestamp("us", "UTC"), pa.string()
TYPES = {
    "tweet_created_at": TIME, "received_at": TIME, "scored_at": TIME, "model_version_id": pa.int64(),
    "probability": pa.float64(), "score_signed": pa.float64(), "decided_by": pa.int64(),
}  # fmt: skip
SCHEMA = pa.schema([(column.key, TYPES.get(column.key, TEXT)) for column in COLUMNS])
# Spreadsheets run a cell that begins with one of these as a formula: https://owasp.org/www-community/attacks/CSV_Injection
FORMULA = ("=", "+", "-", "@", "\t", "\r", "＝", "＋", "－", "＠")

Rows = list[tuple[Any, ...]]


def export(
    database: Database,
    place: str,
    form: str,
    *,
    model: int | None = None,
    since: datetime | None = None,
    topic: str | None = None,
    excel: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Write the predictions of a model (None: the champion) in the order of scoring. Returns the number of rows.

    `place` is a file, replaced atomically at the end, or `-`. `since` filters by the time a tweet was written, or
    received when it has no time. Raises `NotFound` when the model does not exist. `progress` gets (rows, total).
    """
    with database.read() as session:
        version_id = model if model is not None else registry.assigned(session, registry.CHAMPION)
        if version_id is None:
            raise NotFound("there is no champion yet; train a model and promote it, or name one with --model")
        registry.get(session, version_id)
        query = _query(version_id, since, topic)
        total, done = session.scalar(select(func.count()).select_from(query.subquery())) or 0, 0
        # The database also sends the rows in chunks: neither side holds all of them.
        result = session.execute(query.execution_options(yield_per=CHUNK_ROWS))
        progress(0, total)
        with WRITERS[form](place, excel) as write:
            for chunk in result.partitions(CHUNK_ROWS):
                write([tuple(row) for row in chunk])
                done += len(chunk)
                progress(done, max(total, done))
    return done


def _query(version_id: int, since: datetime | None, topic: str | None) -> Any:
    query: Any = select(*COLUMNS).join(Tweet, Tweet.tweet_id == Prediction.tweet_id)
    query = query.where(Prediction.model_version_id == version_id)
    if since is not None:
        query = query.where(func.coalesce(Tweet.tweet_created_at, Tweet.received_at) >= since)
    if topic is not None:
        query = query.where(Tweet.topic == topic)
    return query.order_by(Prediction.scored_at, Prediction.tweet_id)


@contextmanager
def _csv(place: str, excel: bool) -> Iterator[Callable[[Rows], None]]:
    with text_file(place, "utf-8-sig" if excel else "utf-8") as file:
        writer = csv.writer(file, lineterminator="\r\n" if excel else "\n")
        writer.writerow(SCHEMA.names)
        yield lambda rows: writer.writerows([[cell(value) for value in row] for row in rows])


@contextmanager
def _jsonl(place: str, excel: bool) -> Iterator[Callable[[Rows], None]]:
    def write(rows: Rows) -> None:
        for row in rows:
            values = dict(zip(SCHEMA.names, row, strict=True))
            file.write(json.dumps(values, ensure_ascii=False, default=datetime.isoformat) + "\n")

    with text_file(place, "utf-8") as file:
        yield write


@contextmanager
def _parquet(place: str, excel: bool) -> Iterator[Callable[[Rows], None]]:
    def write(rows: Rows) -> None:
        columns = zip(*rows, strict=True)
        writer.write_table(pa.table([pa.array(c, t.type) for c, t in zip(columns, SCHEMA, strict=True)], schema=SCHEMA))

    with _draft(place) as path, pq.ParquetWriter(path, SCHEMA) as writer:
        yield write


WRITERS = {"csv": _csv, "jsonl": _jsonl, "parquet": _parquet}


def cell(value: Any) -> Any:
    """Return a value for a CSV file, so that a spreadsheet does not run it as a formula."""
    if isinstance(value, datetime):
        return value.isoformat()
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value


def text_of_cell(text: str) -> str:
    """Return the text for which `cell` wrote this cell."""
    return text[1:] if text.startswith("'") and text[1:].startswith(FORMULA) else text


@contextmanager
def text_file(place: str, encoding: str) -> Iterator[TextIO]:
    """Open a file that replaces `place` when it is complete, or standard output for `-`."""
    if place == "-":
        sys.stdout.reconfigure(encoding=encoding, newline="")  # type: ignore[union-attr]
        yield sys.stdout
        return
    with _draft(place) as path, path.open("w", encoding=encoding, newline="") as file:
        yield file


@contextmanager
def _draft(place: str) -> Iterator[Path]:
    """Provide a temporary file that replaces `place` when it is complete."""
    target = Path(place)
    draft = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        yield draft
        os.replace(draft, target)
    finally:
        draft.unlink(missing_ok=True)
