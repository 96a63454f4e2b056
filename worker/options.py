"""From `a=b,c=d` on the command line to what a configuration takes."""

import json
from collections.abc import Sequence
from typing import Any

from db.errors import shown
from training.errors import BadConfig


def label_map(text: str | None) -> dict[str, str] | None:
    """`negative,positive` allows these labels; `0=negative,1=positive` also gives them names."""
    if text is None:
        return None
    named = {}
    for part in _parts("--labels", text):
        raw, equals, name = part.partition("=")
        named[raw.strip()] = name.strip() if equals else raw.strip()
        if not named[raw.strip()]:
            raise BadConfig(f"--labels has {shown(part)}; write a=b, or a alone")
    return named


def numbers(option: str, text: str | None) -> dict[str, float] | None:
    """`good=1,bad=-1`."""
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
    """`name=value` each; a value that is JSON is taken as such, any other as text."""
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
