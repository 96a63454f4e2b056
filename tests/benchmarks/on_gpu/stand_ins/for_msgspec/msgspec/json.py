"""JSON as bytes."""

import json
from typing import Any


def encode(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def decode(payload: bytes) -> Any:
    return json.loads(payload.decode())
