"""A text that must not be left in any file once it is deleted."""

import json
from pathlib import Path

SECRET = "誰にも言えない秘密の話"


def found_in(home: Path) -> list[str]:
    """The files below `home` that hold the text as UTF-8, as JSON escapes or as UTF-16."""
    spellings = [SECRET.encode(), json.dumps(SECRET).strip('"').encode(), SECRET.encode("utf-16-le")]
    return [
        str(path.relative_to(home))
        for path in home.rglob("*")
        if path.is_file() and any(spelling in path.read_bytes() for spelling in spellings)
    ]
