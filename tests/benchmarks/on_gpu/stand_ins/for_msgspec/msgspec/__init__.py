"""The part of msgspec that tweetscore uses, in plain Python, for a machine that lacks the package.

Slower than msgspec: a benchmark that uses it says so.
"""

from dataclasses import dataclass, field
from json import JSONDecodeError as DecodeError
from typing import Any

from msgspec import json

__all__ = ["DecodeError", "Struct", "json"]


class Struct:
    def __init_subclass__(cls, **_: Any) -> None:
        """Make the class a data class. It is not frozen: that would cost more than it finds here."""
        for name, value in list(vars(cls).items()):
            if name in cls.__annotations__ and isinstance(value, dict):
                setattr(cls, name, field(default_factory=dict))
        dataclass(cls)
