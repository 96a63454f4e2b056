"""Tweets that must go: from the stream, from every table, and from the files behind them. Knows no command line."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from functools import partial

from db import predictions
from db.errors import DatabaseError
from db.rewrite import rewrite
from db.session import Database
from worker import dead
from worker.errors import BadRecord, StreamError
from worker.records import parse_payload
from worker.stream import Stream

PORTION = 1_000
# A window that was read before its records went is stored after all: its reader is waited for.
WAIT_SECONDS = 60.0
LOOK_SECONDS = 0.1


@dataclass(frozen=True)
class Wish:
    """Which tweets: by id, by author, or written (come in, when they do not say) before a time; any of them will do."""

    tweet_ids: tuple[str, ...] = ()
    authors: tuple[str, ...] = ()
    before: datetime | None = None

    def covers(self, payload: bytes | None, came_in: datetime) -> bool:
        """Whether a record is meant: one that is no tweet by whatever of it can be read."""
        id_, author, written = _told(payload)
        written = written or came_in
        return id_ in self.tweet_ids or author in self.authors or (self.before is not None and written < self.before)


@dataclass(frozen=True)
class Gone:
    records: int
    tweets: int
    dead_letters: int


def forget(
    database: Database, stream: Stream, wish: Wish, progress: Callable[[str, int], None] = lambda what, n: None
) -> Gone:
    """Delete tweets with their predictions, their dead letters and their records. `progress` is told (of what, count).

    The stream comes first, so that no tweet that waits there is scored after its row is gone. Raises `StreamError` when
    a worker still holds what it held a minute ago: then it is to be said again.
    """
    records = _from_stream(stream, wish, progress)
    tweets = _tweets(database, wish, progress)
    letters = 0
    for portion in dead.chunks(database, None):
        going = [letter.record_id for letter in portion if wish.covers(letter.payload, letter.buried_at)]
        with database.begin() as session:
            predictions.drop_dead(session, going)
        letters += len(going)
        progress("dead letters", letters)
    return Gone(records, tweets, letters)


def compact(database: Database, stream: Stream) -> list[str]:
    """Rewrite the files, so that nothing of what was deleted is left in them. Others wait meanwhile, for seconds.

    Returns a sentence on each that could not be rewritten, and what to do about it.
    """
    left = []
    for rewriting in (partial(rewrite, database), stream.rewrite_log):
        try:
            rewriting()
        except (DatabaseError, StreamError) as error:
            left.append(str(error))
    return left


def _tweets(database: Database, wish: Wish, progress: Callable[[str, int], None]) -> int:
    done, last = 0, ""
    while True:
        with database.begin() as session:
            gone = predictions.delete_tweets(session, wish.tweet_ids, wish.authors, wish.before, PORTION, after=last)
        if not gone:
            return done
        done, last = done + len(gone), gone[-1]
        progress("tweets", done)


def _from_stream(stream: Stream, wish: Wish, progress: Callable[[str, int], None]) -> int:
    going = []
    for portion in stream.every(PORTION):
        going += [record.id for record in portion if wish.covers(record.payload, record.came_in)]
        progress("records", len(going))
    stream.remove(going)
    # Whatever is held now: a record that was removed before can no longer be read, and may still be one that is meant.
    ends, held = time.monotonic() + WAIT_SECONDS, stream.held()
    while held := held & stream.held():
        if time.monotonic() > ends:
            raise StreamError(
                f"a worker still holds {len(held)} records; say it again when its window is done, or its worker gone"
            )
        time.sleep(LOOK_SECONDS)
    return len(going)


def _told(payload: bytes | None) -> tuple[str | None, str | None, datetime | None]:
    """Id, author and time of a record; of one that is no tweet, what can be read."""
    try:
        tweet = parse_payload(payload)
        return tweet.id, tweet.author_id, tweet.created_at
    except BadRecord:
        pass
    try:
        value = json.loads(payload or b"")
    except (ValueError, RecursionError):
        return None, None, None
    if not isinstance(value, dict):
        return None, None, None
    id_, author = value.get("id", value.get("tweet_id")), value.get("author_id")
    return None if id_ is None else str(id_), None if author is None else str(author), None
