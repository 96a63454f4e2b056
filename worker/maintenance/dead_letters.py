"""Retry or drop dead letters."""

from collections.abc import Iterator, Sequence

from celery import Celery

from db import predictions
from db.models import DeadLetter
from db.session import Database
from worker.app import SCORING, nudge
from worker.stream.sharded_stream import TweetStream
from worker.stream.tweet_record import unpack_fields

CHUNK_LETTERS = 250


def retry(database: Database, stream: TweetStream, app: Celery, ids: Sequence[str] | None) -> int:
    """Put dead letters back into the stream, all of them when `ids` is None. Returns how many.

    Raises `NotFound`, and does nothing, when one of `ids` does not exist.
    """
    done = 0
    for letters in chunks(database, ids):
        stream.add([unpack_fields(letter.payload, letter.other_fields) for letter in letters])
        # Delete after the records are in the stream. A crash in between leaves both, and a tweet that is scored twice
        # still has one row.
        with database.begin() as session:
            predictions.drop_dead(session, [letter.record_id for letter in letters])
        nudge(app, SCORING)
        done += len(letters)
    return done


def drop(database: Database, ids: Sequence[str] | None) -> int:
    """Delete dead letters, all of them when `ids` is None. Returns how many; raises `NotFound` as `retry` does."""
    done = 0
    for letters in chunks(database, ids):
        with database.begin() as session:
            predictions.drop_dead(session, [letter.record_id for letter in letters])
        done += len(letters)
    return done


def chunks(database: Database, ids: Sequence[str] | None) -> Iterator[list[DeadLetter]]:
    """Yield dead letters in chunks, so that any number of them fits into memory.

    When `ids` is None, these are all that exist at the first chunk; later ones are not included.
    """
    if ids is not None:
        with database.read() as session:
            yield [predictions.dead_letter(session, id_) for id_ in dict.fromkeys(ids)]
        return
    with database.read() as session:
        last = predictions.newest_dead(session)
    after = ""
    while last is not None:
        with database.read() as session:
            letters = predictions.dead_after(session, after, last, CHUNK_LETTERS)
        if not letters:
            return
        after = letters[-1].record_id
        yield letters
