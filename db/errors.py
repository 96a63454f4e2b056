"""The base class of errors with a message for users, the errors of this package, and formatting for messages."""

import re
from collections.abc import Iterable

SHOWN_CHARS = 200
LISTED_CHARS = 300
SECRET = re.compile(r"(?<=password=)[^&]*", re.IGNORECASE)


class TweetscoreError(Exception):
    """Base class: the message states in one sentence what is wrong and what to do."""


class DatabaseError(TweetscoreError):
    """Raised when the database cannot be reached, opened or migrated."""


class SchemaMismatch(DatabaseError):
    """Raised when this code cannot work with the schema of the database."""


class RightsMissing(DatabaseError):
    """Raised when the database role lacks a privilege that the operation needs."""


class NotFound(TweetscoreError):
    """Raised when a job, model version, alias or dead letter does not exist."""


class InUse(TweetscoreError):
    """Raised when deleting a model version that an alias points to or a cascade uses."""


class JobNotRetryable(TweetscoreError):
    """Raised when retrying a job that has not failed."""


class LeaseLost(TweetscoreError):
    """Raised when writing to a job without its newest fencing token."""


def shown(value: object) -> str:
    """A value for a message: its `repr`, which is one line, shortened when it is long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits, a deeply nested list
        text = f"a {type(value).__name__} too large to be shown"
    return text if len(text) <= SHOWN_CHARS else f"{text[:SHOWN_CHARS]}…"


def plain(name: object) -> str:
    """A name for a message: unchanged when it is short and printable, otherwise as in `shown`."""
    text = str(name)
    return text if text.isprintable() and len(text) <= 2 * SHOWN_CHARS else shown(text)


def listed(names: Iterable[object]) -> str:
    """Names for a message, separated by commas; a long list is shortened."""
    shown_names: list[str] = []
    for name in (every := list(names)):
        if sum(map(len, shown_names)) > LISTED_CHARS:
            return f"{', '.join(shown_names)} and {len(every) - len(shown_names)} more"
        shown_names.append(plain(name))
    return ", ".join(shown_names)


def public_url(url: str) -> str:
    """A URL for messages and logs, with the passwords before the host and in the query replaced by ***."""
    scheme, slashes, rest = url.partition("://")
    place, question_mark, query = rest.partition("?")
    credentials, at, host = place.rpartition("@")
    user, colon, _ = credentials.partition(":")
    return f"{scheme}{slashes}{user}{colon and ':***'}{at}{host}{question_mark}{SECRET.sub('***', query)}"
