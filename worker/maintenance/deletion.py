"""Delete tweets from the stream, from every table, and from the files that store them."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from functools import partial

from db import predictions
from db.admin.rewrite import rewrite
from db.errors import DatabaseError
from db.session import Database
from worker.errors import BadRecord, StreamError
from worker.maintenance import dead_letters
from worker.stream.sharded_stream import TweetStream
from worker.stream.tweet_record import parse_payload

CHUNK_ROWS = 1_000
# A window that was read before its records were removed is still stored, so wait until its worker has committed it.
WAIT_SECONDS = 60.0
POLL_SECONDS = 0.1


@dataclass(frozen=True)
class TweetFilter:
    """Matches a tweet by its id, by its author, or by its time: the time it was written, else when it was received."""

    tweet_ids: tuple[str, ...] = ()
    authors: tuple[str, ...] = ()
    before: datetime | None = None

    def matches(self, payload: bytes | None, received_at: datetime) -> bool:
        """Whether a record matches; a record that is not a valid tweet is matched by the fields that can be read."""
        id_, author, written_at = _readable_fields(payload)
        written_at = written_at or received_at
        return id_ in self.tweet_ids or author in self.authors or (self.before is not None and written_at < self.before)


@dataclass(frozen=True)
class DeletedCounts:
    records: int
    tweets: int
    dead_letters: int


def delete_tweets(
    database: Database,
    stream: TweetStream,
    tweets: TweetFilter,
    progress: Callable[[str, int], None] = lambda what, count: None,
) -> DeletedCounts:
    """Delete tweets with their predictions, dead letters and stream records; `progress` gets (what, count).

    The stream comes first, so that no waiting tweet is scored after its row is deleted. Raises `StreamError` when a
    worker still holds a record after `WAIT_SECONDS`; run it again then.
    """
    records = _delete_records(stream, tweets, progress)
    rows = _delete_rows(database, tweets, progress)
    letters = 0
    for chunk in dead_letters.chunks(database, None):
        matching = [letter.record_id for letter in chunk if tweets.matches(letter.payload, letter.buried_at)]
        with database.begin() as session:
            predictions.drop_dead(session, matching)
        letters += len(matching)
        progress("dead letters", letters)
    return DeletedCounts(records, rows, letters)


def compact(database: Database, stream: TweetStream) -> list[str]:
    """Rewrite the files, so that they contain no deleted data. Other clients are blocked for seconds.

    Returns one sentence for each that could not be rewritten, with the remedy.
    """
    failures = []
    for rewriting in (partial(rewrite, database), stream.rewrite_log):
        try:
            rewriting()
        except (DatabaseError, StreamError) as error:
            failures.append(str(error))
    return failures


def _delete_rows(database: Database, tweets: TweetFilter, progress: Callable[[str, int], None]) -> int:
    done, last = 0, ""
    while True:
        with database.begin() as session:
            deleted = predictions.delete_tweets(
                session, tweets.tweet_ids, tweets.authors, tweets.before, CHUNK_ROWS, after=last
            )
        if not deleted:
            return done
        done, last = done + len(deleted), deleted[-1]
        progress("tweets", done)


def _delete_records(stream: TweetStream, tweets: TweetFilter, progress: Callable[[str, int], None]) -> int:
    matching = []
    for chunk in stream.scan(CHUNK_ROWS):
        matching += [record.id for record in chunk if tweets.matches(record.payload, record.received_at)]
        progress("records", len(matching))
    stream.remove(matching)
    # Wait for all records that are held now: some may have been removed earlier, so that they cannot be matched here.
    deadline, held = time.monotonic() + WAIT_SECONDS, stream.pending_ids()
    while held := held & stream.pending_ids():
        if time.monotonic() > deadline:
            raise StreamError(
                f"a worker still holds {len(held)} records; run the command again when its window is finished, or stop "
                "the worker"
            )
        time.sleep(POLL_SECONDS)
    return len(matching)


def _readable_fields(payload: bytes | None) -> tuple[str | None, str | None, datetime | None]:
    """Id, author and time of a record; of an invalid tweet, the id and author that can be read."""
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
