"""What is deleted when it is old: tweets, dead letters and rows of windows; and the partitions that hold tweets.

Everything is done in small transactions, can be interrupted and repeated, and runs in one worker at a time.
"""

import logging
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import datetime, timedelta
from functools import partial

from sqlalchemy.orm import Session

from db.admin import partitions, sums, upkeep
from db.models import utc_now
from worker.maintenance.deletion import DeletedCounts

log = logging.getLogger(__name__)

# Rows deleted in one transaction. It holds SQLite's write lock, which scoring workers wait for.
CHUNK_ROWS = 500
PAUSE_SECONDS = 0.2
# Never set.
NEVER = threading.Event()

# Begins a transaction.
Begin = Callable[[], AbstractContextManager[Session]]


def add_partitions(begin: Begin, days: float | None, stopping: threading.Event = NEVER) -> None:
    """On PostgreSQL, add partitions for the time to come. Without them rows go to the partition `other`."""
    with begin() as session:
        existing = partitions.listed(session)
    if not existing:
        return
    for period in partitions.missing(existing, utc_now(), partitions.width(days)):
        if stopping.is_set():
            return
        with begin() as session:
            moved = partitions.add(session, period)
        log.info(
            "a partition for tweets from %s to %s was added, with %d rows", *map(datetime.isoformat, period), moved
        )


def apply_retention(begin: Begin, days: float, stopping: threading.Event) -> DeletedCounts:
    """Delete tweets and dead letters that were received more than `days` days ago, whenever they were written.

    On PostgreSQL the tweets of a period go at once, as soon as the period is over for all of them. The sums stay.
    """
    before = utc_now() - timedelta(days=days)
    tweets = _drop_partitions(begin, before)
    with begin() as session:
        sources = partitions.to_delete_from(session, before)
    for source in sources:
        tweets += _in_chunks(begin, partial(upkeep.delete_received_before, before=before, source=source), stopping)
    letters = _in_chunks(begin, partial(upkeep.delete_buried_before, before=before), stopping)
    if tweets or letters:
        log.info("retention of %g days: %d tweets and %d dead letters were deleted", days, tweets, letters)
        _in_chunks(begin, upkeep.give_back_pages, stopping)
    return DeletedCounts(0, tweets, letters)


def _drop_partitions(begin: Begin, before: datetime) -> int:
    """Returns about how many tweets they held."""
    with begin() as session:
        ended = partitions.to_drop(session, before)
    tweets = 0
    for partition in ended:
        with begin() as session:
            late = partitions.drop(session, partition, before)
        tweets += max(0, partition.tweets - late)
        log.info("the partition of tweets until %s was dropped, and %d late ones kept", partition.end, late)
    return tweets


def delete_old_windows(begin: Begin, days: float, stopping: threading.Event) -> int:
    """Delete the rows of windows that began more than `days` days ago."""
    deleted = _in_chunks(
        begin, partial(upkeep.delete_windows_before, before=utc_now() - timedelta(days=days)), stopping
    )
    if deleted:
        log.info("%d windows older than %g days were deleted", deleted, days)
    return deleted


def compact_sums(begin: Begin, stopping: threading.Event) -> None:
    """Merge the rows of each key of the sums, and delete rows whose counts are zero."""
    for table in sums.TABLES:
        _in_chunks(begin, partial(sums.fold, model=table), stopping)
        with begin() as session:
            sums.drop_empty(session, table)


def _in_chunks(begin: Begin, delete: Callable[..., int], stopping: threading.Event) -> int:
    """Call `delete(session, limit=)` until it deletes less than a full chunk. Between chunks, pause for as long as the
    last one took, so that other writers get the lock."""
    total = 0
    while not stopping.is_set():
        began = time.monotonic()
        with begin() as session:
            deleted = delete(session, limit=CHUNK_ROWS)
        total += deleted
        if deleted < CHUNK_ROWS:
            break
        stopping.wait(max(PAUSE_SECONDS, time.monotonic() - began))
    return total
