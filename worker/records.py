"""From what people have to tweets: wire records, JSONL lines, CSV rows. Knows shapes, not streams or tables."""

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from training.columns import TEXT_COLUMNS
from worker.errors import BadRecord
from worker.stream import WIRE_VERSION

MAX_ID_CHARS = 64
# X's longest posts have 25,000 characters.
MAX_TEXT_CHARS = 25_000
ID_KEYS = ("id", "tweet_id", "id_str")
TIME_KEYS = ("created_at", "tweet_created_at")
# v1.1: Wed Oct 10 20:19:24 +0000 2018
V1_TIME = "%a %b %d %H:%M:%S %z %Y"


@dataclass(frozen=True)
class Tweet:
    """A tweet that can be stored: its id, its text, and what else was told of it. `created_at` is aware."""

    id: str
    text: str
    author_id: str | None = None
    lang: str | None = None
    topic: str | None = None
    created_at: datetime | None = None

    def payload(self) -> bytes:
        """The public wire format, version 1: one JSON object in UTF-8."""
        wire: dict[str, Any] = {"v": WIRE_VERSION, "id": self.id, "text": self.text}
        for key in ("author_id", "lang", "topic"):
            if getattr(self, key) is not None:
                wire[key] = getattr(self, key)
        if self.created_at is not None:
            wire["created_at"] = self.created_at.isoformat()
        return json.dumps(wire, ensure_ascii=False, separators=(",", ":")).encode()


def parse_payload(payload: bytes | None) -> Tweet:
    """A wire record as a tweet; raises `BadRecord` with the reason, never with the text."""
    if payload is None:
        raise BadRecord("the record has no field 'tweet'")
    try:
        wire = json.loads(payload.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadRecord(f"the record is not UTF-8 (byte {error.start})") from error
    except (json.JSONDecodeError, RecursionError, ValueError) as error:
        raise BadRecord("the record is not JSON") from error
    if isinstance(wire, dict) and wire.get("v", WIRE_VERSION) != WIRE_VERSION:
        raise BadRecord(f"the record has wire version {str(wire['v'])[:20]!r}; this version reads {WIRE_VERSION}")
    return parse_object(wire)


def parse_object(value: Any) -> Tweet:
    """A flat JSON object as a tweet; unknown keys are ignored. Raises `BadRecord`."""
    if not isinstance(value, dict):
        raise BadRecord(f"a tweet is a JSON object, not {_kind(value)}")
    id_ = next((value[key] for key in ID_KEYS if value.get(key) not in (None, "")), None)
    if id_ is None:
        raise BadRecord("the tweet has no id")
    text = next((value[key] for key in TEXT_COLUMNS if value.get(key) is not None), None)
    if text is None:
        raise BadRecord("the tweet has no text")
    return Tweet(
        id=_id(id_),
        text=_text(text),
        author_id=_optional(value, "author_id"),
        lang=_optional(value, "lang"),
        topic=_optional(value, "topic"),
        created_at=_time(next((value[key] for key in TIME_KEYS if value.get(key) not in (None, "")), None)),
    )


def read_tweets(source: TextIO, name: str, *, need_id: bool = True) -> Iterator[tuple[int, Tweet | BadRecord]]:
    """Every line of a JSONL file, or row of a CSV or TSV file, with its number: a tweet, or what is wrong with it.

    The format follows from the ending; anything else is JSONL if it begins with a brace. Where `need_id` is false a
    line without an id gets its number for one.
    """
    rows = (
        _csv_rows(source, "\t" if name.endswith(".tsv") else ",") if name.endswith((".csv", ".tsv")) else _lines(source)
    )
    for number, value in rows:
        if isinstance(value, BadRecord):
            yield number, value
            continue
        if not need_id and isinstance(value, dict) and not any(value.get(key) for key in ID_KEYS):
            value = {**value, "id": str(number)}
        try:
            yield number, parse_object(value)
        except BadRecord as error:
            yield number, error


def open_text(path: str) -> TextIO:
    """A file of UTF-8, with or without a byte-order mark; bytes that are not become one bad line, not a failed run."""
    return Path(path).open(encoding="utf-8-sig", errors="surrogateescape", newline="")


def _lines(source: TextIO) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(source, start=1):
        if not line.strip():
            continue
        if _has_surrogate(line):
            yield number, BadRecord("the line is not UTF-8")
            continue
        try:
            yield number, json.loads(line)
        except (json.JSONDecodeError, RecursionError, ValueError):
            yield number, BadRecord("the line is not JSON")


def _csv_rows(source: TextIO, delimiter: str) -> Iterator[tuple[int, Any]]:
    reader = csv.DictReader(source, delimiter=delimiter)
    number = 1
    while True:
        number += 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield number, BadRecord(f"the row cannot be read: {error}")
            continue
        values = {
            str(key).strip().lower(): value for key, value in row.items() if key is not None and value is not None
        }
        bad = any(_has_surrogate(value) for value in values.values())
        yield number, BadRecord("the row is not UTF-8") if bad else values


def _id(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise BadRecord(f"the tweet's id is {_kind(value)}; it must be a string or a whole number")
    text = str(value).strip()
    if not 0 < len(text) <= MAX_ID_CHARS:
        raise BadRecord(f"the tweet's id has {len(text)} characters; it must have 1 to {MAX_ID_CHARS}")
    return _storable(text, "id")


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise BadRecord(f"the tweet's text is {_kind(value)}; it must be a string")
    if not value.strip():
        raise BadRecord("the tweet's text is blank")
    if len(value) > MAX_TEXT_CHARS:
        raise BadRecord(f"the tweet's text has {len(value):,} characters; at most {MAX_TEXT_CHARS:,} are scored")
    return _storable(value, "text")


def _optional(value: dict[str, Any], key: str) -> str | None:
    found = value.get(key)
    if found is None or found == "":
        return None
    if isinstance(found, bool) or not isinstance(found, str | int):
        raise BadRecord(f"the tweet's {key} is {_kind(found)}; it must be a string")
    return _storable(str(found), key)


def _time(value: Any) -> datetime | None:
    if value is None:
        return None
    if isinstance(value, str):
        for parse in (datetime.fromisoformat, lambda text: datetime.strptime(text, V1_TIME)):  # noqa: DTZ007 - has %z
            try:
                parsed = parse(value.strip())
                # A time without a zone is taken for UTC, as X's are.
                return (parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)).astimezone(UTC)
            except (ValueError, OverflowError):
                continue
    raise BadRecord("the tweet's created_at is no time; write it as 2026-01-31T12:00:00Z")


def _storable(text: str, what: str) -> str:
    if "\x00" in text:
        raise BadRecord(f"the tweet's {what} holds a NUL character, which databases cannot store")
    if _has_surrogate(text):
        raise BadRecord(f"the tweet's {what} holds half a surrogate pair, which is no character")
    return text


def _has_surrogate(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _kind(value: Any) -> str:
    return {
        dict: "an object", list: "a list", str: "a string", bool: "a truth value", int: "a number", float: "a number"
    }.get(type(value), "nothing")  # fmt: skip
