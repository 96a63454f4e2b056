"""Predictions into a file, a portion at a time: CSV, JSON lines or Parquet. Knows rows and formats, no command line."""

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

PORTION = 5_000
COLUMNS = (
    Tweet.tweet_id, Tweet.text, Tweet.author_id, Tweet.lang, Tweet.topic, Tweet.tweet_created_at, Tweet.received_at,
    Prediction.model_version_id, Prediction.label, Prediction.probability, Prediction.score_signed,
    Prediction.scored_at,
)  # fmt: skip
TIME, TEXT = pa.timestamp("us", "UTC"), pa.string()
TYPES = {
    "tweet_created_at": TIME, "received_at": TIME, "scored_at": TIME, "model_version_id": pa.int64(),
    "probability": pa.float64(), "score_signed": pa.float64(),
}  # fmt: skip
SCHEMA = pa.schema([(column.key, TYPES.get(column.key, TEXT)) for column in COLUMNS])
# A cell that begins so is a formula to a spreadsheet: https://owasp.org/www-community/attacks/CSV_Injection
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
    """Write what a model (None: the champion) says of each tweet, in the order it was scored. Returns how many rows.

    `place` is a file, there whole or not at all, or `-`; `since` takes tweets written from then on, or come in when
    they do not say. Raises `NotFound` when there is no such model. `progress` is told (rows, of how many).
    """
    with database.read() as session:
        version_id = model if model is not None else registry.assigned(session, registry.CHAMPION)
        if version_id is None:
            raise NotFound("there is no champion yet; train a model and promote it, or name one with --model")
        registry.get(session, version_id)
        wanted = _wanted(version_id, since, topic)
        total, done = session.scalar(select(func.count()).select_from(wanted.subquery())) or 0, 0
        # In portions from the database too: neither side holds the whole.
        answer = session.execute(wanted.execution_options(yield_per=PORTION))
        progress(0, total)
        with WRITERS[form](place, excel) as write:
            for portion in answer.partitions(PORTION):
                write([tuple(row) for row in portion])
                done += len(portion)
                progress(done, max(total, done))
    return done


def _wanted(version_id: int, since: datetime | None, topic: str | None) -> Any:
    wanted: Any = select(*COLUMNS).join(Tweet, Tweet.tweet_id == Prediction.tweet_id)
    wanted = wanted.where(Prediction.model_version_id == version_id)
    if since is not None:
        wanted = wanted.where(func.coalesce(Tweet.tweet_created_at, Tweet.received_at) >= since)
    if topic is not None:
        wanted = wanted.where(Tweet.topic == topic)
    return wanted.order_by(Prediction.scored_at, Prediction.tweet_id)


@contextmanager
def _csv(place: str, excel: bool) -> Iterator[Callable[[Rows], None]]:
    with _text_file(place, "utf-8-sig" if excel else "utf-8") as file:
        writer = csv.writer(file, lineterminator="\r\n" if excel else "\n")
        writer.writerow(SCHEMA.names)
        yield lambda rows: writer.writerows([[_cell(value) for value in row] for row in rows])


@contextmanager
def _jsonl(place: str, excel: bool) -> Iterator[Callable[[Rows], None]]:
    def write(rows: Rows) -> None:
        for row in rows:
            values = dict(zip(SCHEMA.names, row, strict=True))
            file.write(json.dumps(values, ensure_ascii=False, default=datetime.isoformat) + "\n")

    with _text_file(place, "utf-8") as file:
        yield write


@contextmanager
def _parquet(place: str, excel: bool) -> Iterator[Callable[[Rows], None]]:
    def write(rows: Rows) -> None:
        columns = zip(*rows, strict=True)
        writer.write_table(pa.table([pa.array(c, t.type) for c, t in zip(columns, SCHEMA, strict=True)], schema=SCHEMA))

    with _draft(place) as path, pq.ParquetWriter(path, SCHEMA) as writer:
        yield write


WRITERS = {"csv": _csv, "jsonl": _jsonl, "parquet": _parquet}


def _cell(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.isoformat()
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value


@contextmanager
def _text_file(place: str, encoding: str) -> Iterator[TextIO]:
    if place == "-":
        sys.stdout.reconfigure(encoding=encoding, newline="")  # type: ignore[union-attr]
        yield sys.stdout
        return
    with _draft(place) as path, path.open("w", encoding=encoding, newline="") as file:
        yield file


@contextmanager
def _draft(place: str) -> Iterator[Path]:
    """A file beside the place, which takes it when it is whole."""
    target = Path(place)
    draft = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        yield draft
        os.replace(draft, target)
    finally:
        draft.unlink(missing_ok=True)
