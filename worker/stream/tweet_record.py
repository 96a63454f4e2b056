"""Validate tweets, read and write the wire format, and store a record's fields in a dead letter.

Handles flat objects only; `tweet_file` and `x_api` produce them.
"""

import base64
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec

from training.data.columns import ID_COLUMNS, TEXT_COLUMNS, has_surrogates
from worker.errors import BadRecord
from worker.stream.stream import FIELD, WIRE_VERSION

MAX_ID_CHARS = 64
OPTIONAL = ("author_id", "lang", "topic", "retweeted_id", "quoted_id", "replied_to_id")
# X's longest posts have 25,000 characters.
MAX_TEXT_CHARS = 25_000
TIME_KEYS = ("created_at", "tweet_created_at")
# v1.1: Wed Oct 10 20:19:24 +0000 2018
V1_TIME = "%a %b %d %H:%M:%S %z %Y"


class Tweet(msgspec.Struct, frozen=True):
    """A valid tweet, which every database can store. `created_at` is an aware datetime."""

    id: str
    text: str
    author_id: str | None = None
    lang: str | None = None
    topic: str | None = None
    created_at: datetime | None = None
    retweeted_id: str | None = None
    quoted_id: str | None = None
    replied_to_id: str | None = None

    def payload(self) -> bytes:
        """The public wire format, version 1: one JSON object in UTF-8."""
        wire: dict[str, Any] = {"v": WIRE_VERSION, "id": self.id, "text": self.text}
        for key in OPTIONAL:
            if getattr(self, key) is not None:
                wire[key] = getattr(self, key)
        if self.created_at is not None:
            wire["created_at"] = self.created_at.isoformat()
        return msgspec.json.encode(wire)


def parse_payload(payload: bytes | None) -> Tweet:
    """Parse a wire record. Raises `BadRecord` with the reason, never with the tweet's text."""
    if payload is None:
        raise BadRecord("the record has no field 'tweet'")
    try:
        wire = _decoded(payload)
    except UnicodeDecodeError as error:
        raise BadRecord(f"the record is not UTF-8 (byte {error.start})") from error
    except (json.JSONDecodeError, RecursionError, ValueError) as error:
        raise BadRecord("the record is not JSON") from error
    if isinstance(wire, dict) and wire.get("v", WIRE_VERSION) != WIRE_VERSION:
        raise BadRecord(f"the record has wire version {str(wire['v'])[:20]!r}; this version reads {WIRE_VERSION}")
    return parse_object(wire)


def _decoded(payload: bytes) -> Any:
    """Four times as fast as `json`, which reads what msgspec refuses: NaN, and half a surrogate pair. Its errors have
    the reasons."""
    try:
        return msgspec.json.decode(payload)
    except (msgspec.DecodeError, ValueError, RecursionError):
        return json.loads(payload.decode("utf-8"))


def parse_object(value: Any) -> Tweet:
    """Parse a flat JSON object; unknown keys are ignored. Raises `BadRecord`."""
    if not isinstance(value, dict):
        raise BadRecord(f"a tweet is a JSON object, not {_kind(value)}")
    id_ = _first(value, ID_COLUMNS)
    if id_ is None:
        raise BadRecord("the tweet has no id")
    text = value.get("text")
    if text is None:
        text = next((value[key] for key in TEXT_COLUMNS if value.get(key) is not None), None)
    if text is None:
        raise BadRecord("the tweet has no text")
    return Tweet(
        id=_id(id_),
        text=_text(text),
        **{key: _optional(value, key) for key in OPTIONAL if key in value},
        created_at=_time(_first(value, TIME_KEYS)),
    )


def _first(value: dict[str, Any], keys: Sequence[str]) -> Any:
    """The first of some keys' values that is not empty."""
    for key in keys:
        if (found := value.get(key)) is not None and found != "":
            return found
    return None


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
                # Times without a zone are UTC, as in the X API.
                return (parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)).astimezone(UTC)
            except (ValueError, OverflowError):
                continue
    raise BadRecord("the tweet's created_at is not a time; write it as 2026-01-31T12:00:00Z")


def _storable(text: str, what: str) -> str:
    if "\x00" in text:
        raise BadRecord(f"the tweet's {what} contains a NUL character, which databases cannot store")
    if has_surrogates(text):
        raise BadRecord(f"the tweet's {what} contains half a surrogate pair, which is not a character")
    return text


def _kind(value: Any) -> str:
    return {
        dict: "an object", list: "a list", str: "a string", bool: "true or false", int: "a number", float: "a number"
    }.get(type(value), "null")  # fmt: skip


def pack_fields(fields: dict[bytes, bytes]) -> list[Any] | None:
    """The fields that a dead letter stores in addition to its payload: see `DeadLetter`."""
    if list(fields) == [FIELD]:
        return None
    return [[_pack(name), None if name == FIELD else _pack(value)] for name, value in fields.items()]


def unpack_fields(payload: bytes, other_fields: list[Any] | None) -> dict[bytes, bytes]:
    """The fields of the original record."""
    if other_fields is None:
        return {FIELD: payload}
    return {_unpack(name): payload if value is None else _unpack(value) for name, value in other_fields}


def _pack(value: bytes) -> Any:
    """Text when a database can store it, else base64."""
    try:
        text = value.decode()
    except UnicodeDecodeError:
        text = "\x00"
    return {"base64": base64.b64encode(value).decode()} if "\x00" in text else text


def _unpack(value: Any) -> bytes:
    return base64.b64decode(value["base64"]) if isinstance(value, dict) else str(value).encode()
