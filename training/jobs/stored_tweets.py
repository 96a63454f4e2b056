"""Read the texts of stored tweets page by page, the newest first, each text once."""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from hashlib import blake2b

from db import predictions
from db.session import Database
from training.errors import BadDataset
from training.jobs.lease import Lease
from training.text.cleaning import RETWEET, clean, same_text_key

LANGUAGE = "ja"
FEWEST_TEXTS = 20
PAGE_TWEETS = 2_000
DIGEST_BYTES = 8


def require_texts(found: int) -> None:
    """Raise `BadDataset` when there are too few different texts to adapt a base model to."""
    if found < FEWEST_TEXTS:
        raise BadDataset(
            f"there are {found} stored tweets in Japanese with different texts, and a base model needs at least "
            f"{FEWEST_TEXTS} to adapt to; store more with `tweetscore push` and a worker"
        )


@dataclass(frozen=True)
class StoredText:
    """A cleaned text without the mark of a retweet. `digest` (0 to 2^64 - 1) is equal for copies of a text."""

    text: str
    digest: int


def digest_of(key: str) -> int:
    """Return the digest of a text by its `same_text_key`."""
    return int.from_bytes(blake2b(key.encode("utf-8", "surrogatepass"), digest_size=DIGEST_BYTES).digest())


class StoredTexts:
    """Iterates over the distinct texts of Japanese tweets, or tweets without a language, that arrived by `until`.

    A tweet, its retweets and its copies with other links or mentions count once. `read` and `duplicates` count the
    tweets so far. Waits while the database does not answer. Raises what `Lease.check` raises.
    """

    def __init__(self, database: Database, lease: Lease, until: datetime, cleaner: str) -> None:
        self.read = 0
        self.duplicates = 0
        self._database = database
        self._lease = lease
        self._until = until
        self._cleaner = cleaner

    def __iter__(self) -> Iterator[StoredText]:
        seen: set[int] = set()
        for text in self._newest():
            self.read += 1
            key = same_text_key(text)
            digest = digest_of(key)
            if not key or digest in seen:
                self.duplicates += 1
                continue
            seen.add(digest)
            yield StoredText(clean(RETWEET.sub("", text), self._cleaner), digest)

    def _newest(self) -> Iterator[str]:
        before: tuple[datetime, str] | None = None
        while True:
            self._lease.check()
            page = self._lease.retry_while_database_away(lambda: self._page(before))  # noqa: B023 - called at once
            yield from (text for _, _, text in page)
            if len(page) < PAGE_TWEETS:
                return
            before = page[-1][:2]

    def _page(self, before: tuple[datetime, str] | None) -> list[tuple[datetime, str, str]]:
        with self._database.read() as session:
            return predictions.newest_texts(session, LANGUAGE, self._until, before, PAGE_TWEETS)
