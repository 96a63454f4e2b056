"""The root of every error whose message is meant for a user, those of the SQL side, and values inside sentences."""

import re
from collections.abc import Iterable

SHOWN_CHARS = 200
LISTED_CHARS = 300
SECRET = re.compile(r"(?<=password=)[^&]*", re.IGNORECASE)


class TweetscoreError(Exception):
    """A fault whose message says in one sentence what is wrong and what to do about it."""


class DatabaseError(TweetscoreError):
    """Raised when the database cannot be reached, opened or migrated."""


class SchemaMismatch(DatabaseError):
    """Raised when the database has a schema that this code cannot work with."""


class RightsMissing(DatabaseError):
    """Raised when the database's role may not see or do what is asked of it."""


class NotFound(TweetscoreError):
    """Raised when a job or a model version is named that does not exist."""


class InUse(TweetscoreError):
    """Raised when something that others rely on is to be deleted."""


class NotFailed(TweetscoreError):
    """Raised when a job is to be tried again that has not failed."""


class LeaseLost(TweetscoreError):
    """Raised when a job is written to by someone who no longer holds its newest fencing token."""


def shown(value: object) -> str:
    """A value inside a sentence: as Python writes it, which is one line, and cut where it is long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits, a list in a list in a list
        text = f"a {type(value).__name__} too large to be shown"
    return text if len(text) <= SHOWN_CHARS else f"{text[:SHOWN_CHARS]}…"


def plain(name: object) -> str:
    """A name inside a sentence: as it is when it is short and printable, else as `shown`."""
    text = str(name)
    return text if text.isprintable() and len(text) <= 2 * SHOWN_CHARS else shown(text)


def listed(names: Iterable[object]) -> str:
    """Names inside a sentence; of many, the first."""
    taken: list[str] = []
    for name in (rest := list(names)):
        if sum(map(len, taken)) > LISTED_CHARS:
            return f"{', '.join(taken)} and {len(rest) - len(taken)} more"
        taken.append(plain(name))
    return ", ".join(taken)


def public_url(url: str) -> str:
    """A URL as it may be shown or logged: no password, neither before the host nor in a query field."""
    scheme, there, rest = url.partition("://")
    place, asks, query = rest.partition("?")
    who, at, where = place.rpartition("@")
    user, colon, _ = who.partition(":")
    return f"{scheme}{there}{user}{colon and ':***'}{at}{where}{asks}{SECRET.sub('***', query)}"
