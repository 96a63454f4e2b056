"""What is cleared away by the clock, in a thread of its own: beside the work, a portion at a time.

Every chore may be cut off, repeated, and done by several workers. On PostgreSQL one worker of all keeps house at a
time, on SQLite one of this home.
"""

import fcntl
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path

from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session, sessionmaker

from db import upkeep
from db.errors import TweetscoreError
from db.models import utc_now
from db.session import Database
from training.leftovers import remove_expired_checkpoints
from training.orphans import remove_unregistered_artifacts
from training.workshop import TrainingContext
from worker.forget import Gone
from worker.settings import Settings

log = logging.getLogger(__name__)

EVERY_SECONDS = 3600.0
# After a failure, and when another worker is at it, which may end before it is done.
AGAIN_SECONDS = 60.0
# A portion holds SQLite's write lock; a scorer that waits for it looks every tenth of a second at the most.
PORTION = 500
PAUSE_SECONDS = 0.2
LOCK_NUMBER = 7413953

# Opens a transaction.
Begin = Callable[[], AbstractContextManager[Session]]
# Clears something away; False when that is to be tried again soon.
Chore = Callable[[], bool]


class Housekeeper:
    """Does each chore at once and then every hour, until `stopping`. One that fails is said and tried again, and so is
    one that is not `allowed`: the database may have a schema that this release cannot work with."""

    def __init__(
        self, chores: list[Chore], stopping: threading.Event, allowed: Callable[[], bool] = lambda: True
    ) -> None:
        self._due = [(chore, time.monotonic()) for chore in chores]
        self._stopping = stopping
        self._allowed = allowed
        self._thread = threading.Thread(target=self._keep_house, name="housekeeper", daemon=True)

    def start(self) -> None:
        if self._due:
            self._thread.start()

    def _keep_house(self) -> None:
        while not self._stopping.is_set():
            self._due = [(chore, self._done(chore) if at <= time.monotonic() else at) for chore, at in self._due]
            self._stopping.wait(max(0.0, min(at for _, at in self._due) - time.monotonic()))

    def _done(self, chore: Chore) -> float:
        """Returns when the chore is due next."""
        try:
            done = not self._stopping.is_set() and self._allowed() and chore()
        except (TweetscoreError, SQLAlchemyError, OSError) as error:
            done = False
            log.warning("housekeeping failed, trying again in %g s: %s", AGAIN_SECONDS, error)
        except Exception:
            done = False
            log.exception("housekeeping failed, trying again in %g s", AGAIN_SECONDS)
        return time.monotonic() + (EVERY_SECONDS if done else AGAIN_SECONDS)


def scoring_chores(database: Database, settings: Settings, stopping: threading.Event) -> list[Chore]:
    """What scoring workers clear away: old tweets, dead letters and windows, and the sums of old connections."""
    days, window_days = settings.retention_days, settings.window_days

    def keep_house() -> bool:
        with alone(database, settings.run) as begin:
            if begin is None:
                return False
            if days is not None:
                apply_retention(begin, days, stopping)
            forget_windows(begin, window_days, stopping)
            tidy_sums(begin, stopping)
        return True

    return [keep_house]


def training_chores(
    database: Database, workshop: TrainingContext, days: float, stopping: threading.Event
) -> list[Chore]:
    """What training workers clear away: checkpoints that no job goes on from, of failed ones after so many days, and
    artifacts that were never registered."""

    def clear_checkpoints() -> bool:
        remove_expired_checkpoints(database, workshop.jobs_folder, workshop.checkpoint_store, days, stopping)
        return True

    def clear_artifacts() -> bool:
        remove_unregistered_artifacts(database, workshop.model_store)
        return True

    return [clear_checkpoints, clear_artifacts]


def apply_retention(begin: Begin, days: float, stopping: threading.Event) -> Gone:
    """Delete what came in more than `days` days ago, whenever it was written."""
    before = utc_now() - timedelta(days=days)
    tweets = _in_portions(begin, partial(upkeep.delete_received_before, before=before), stopping)
    letters = _in_portions(begin, partial(upkeep.delete_buried_before, before=before), stopping)
    if tweets or letters:
        log.info("retention of %g days: %d tweets and %d dead letters are gone", days, tweets, letters)
    return Gone(0, tweets, letters)


def forget_windows(begin: Begin, days: float, stopping: threading.Event) -> int:
    """Delete the rows of windows that began more than `days` days ago."""
    gone = _in_portions(begin, partial(upkeep.delete_windows_before, before=utc_now() - timedelta(days=days)), stopping)
    if gone:
        log.info("%d windows of more than %g days ago are forgotten", gone, days)
    return gone


def tidy_sums(begin: Begin, stopping: threading.Event) -> None:
    """Leave one row a key in `sentiment_rollup`, besides what connections count meanwhile, and none of what is gone."""
    _in_portions(begin, upkeep.fold_sums, stopping)
    with begin() as session:
        upkeep.drop_empty_sums(session)


@contextmanager
def alone(database: Database, folder: Path) -> Iterator[Begin | None]:
    """Opens transactions for the one worker that keeps house; None while another one does. Ends with the process."""
    if database.engine.dialect.name == "sqlite":
        with _locked(folder / "housekeeping.lock") as mine:
            yield database.begin if mine else None
        return
    with database.engine.connect() as connection:
        mine = connection.scalar(text(f"SELECT pg_try_advisory_lock({LOCK_NUMBER})"))
        connection.commit()
        try:
            yield sessionmaker(connection).begin if mine else None
        finally:
            if mine:
                connection.invalidate()  # the lock goes with the connection, whatever state that is in


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield True
    except BlockingIOError:
        yield False
    finally:
        os.close(descriptor)


def _in_portions(begin: Begin, delete: Callable[..., int], stopping: threading.Event) -> int:
    """Call `delete(session, limit=)` until it finds less than a portion, and give others as long as it took between."""
    done = 0
    while not stopping.is_set():
        began = time.monotonic()
        with begin() as session:
            portion = delete(session, limit=PORTION)
        done += portion
        if portion < PORTION:
            break
        stopping.wait(max(PAUSE_SECONDS, time.monotonic() - began))
    return done
