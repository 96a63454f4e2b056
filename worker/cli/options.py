"""Parse option values such as `a=b,c=d` from the command line."""

import json
from collections.abc import Sequence
from typing import Any

from db.errors import shown
from training.errors import BadConfig


def label_map(text: str | None) -> dict[str, str] | None:
    """Parse `--labels`: `negative,positive` allows these labels, `0=negative,1=positive` also renames them."""
    if text is None:
        return None
    names = {}
    for part in _parts("--labels", text):
        raw, equals, name = part.partition("=")
        names[raw.strip()] = name.strip() if equals else raw.strip()
        if not names[raw.strip()]:
            raise BadConfig(f"--labels has {shown(part)}; write a=b, or a alone")
    return names


def numbers(option: str, text: str | None) -> dict[str, float] | None:
    """Parse `good=1,bad=-1`."""
    if text is None:
        return None
    values = {}
    for part in _parts(f"--{option}", text):
        name, _, value = part.partition("=")
        try:
            values[name.strip()] = float(value)
        except ValueError as error:
            raise BadConfig(f"--{option} has {shown(part)}; write label=number") from error
    return values


def pairs(option: str, texts: Sequence[str]) -> dict[str, Any]:
    """Parse `name=value` items; a value that is valid JSON is decoded, any other is text."""
    values: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise BadConfig(f"{option} has {shown(text)}; write name=value")
        try:
            values[name.strip()] = json.loads(value)
        except (ValueError, RecursionError):
            values[name.strip()] = value
    return values


def _parts(option: str, text: str) -> list[str]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise BadConfig(f"{option} is empty; name at least one label")
    return parts
