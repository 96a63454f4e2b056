"""Checks whether a worker can use its database, and logs when that changes.

When the database is unavailable at the start, or has a schema that this release cannot work with, the worker takes no
work and waits. It continues as soon as a later check succeeds.
"""

import logging
import threading
import time

from db import migrate
from db.errors import DatabaseError, SchemaMismatch
from db.session import Database

log = logging.getLogger(__name__)


class DatabaseGate:
    """Open while the database can be used. Checks at most every `every_seconds`, from any thread.

    `opened` is set when a check succeeds for the first time. `reason` is why the gate is closed; None while it is open
    or before the first check.
    """

    def __init__(self, database: Database, every_seconds: float) -> None:
        self.opened = threading.Event()
        self.reason: str | None = None
        self._database = database
        self._every_seconds = every_seconds
        self._checked_at = -float("inf")
        self._lock = threading.Lock()

    def is_open(self, now: bool = False) -> bool:
        """Whether work may begin; with `now` the database is checked at once."""
        with self._lock:
            if now or time.monotonic() - self._checked_at >= self._every_seconds:
                self._check()
                self._checked_at = time.monotonic()
            return self.reason is None

    def wait(self, stopping: threading.Event) -> bool:
        """Wait until the gate is open; returns False when `stopping` is set first."""
        while not self.is_open():
            if stopping.wait(self._every_seconds):
                return False
        return True

    def _check(self) -> None:
        try:
            migrate.prepare(self._database)
        except SchemaMismatch as error:
            self._close(str(error))
        except DatabaseError as error:
            # After the first success an outage does not close the gate: the pipelines wait for the database themselves.
            if not self.opened.is_set():
                self._close(str(error))
        else:
            self._open()

    def _close(self, reason: str) -> None:
        if reason != self.reason:
            log.error("waiting, and taking no work: %s", reason)
        self.reason = reason

    def _open(self) -> None:
        if self.reason is not None:
            log.info("the database can be used now")
        self.reason = None
        self.opened.set()
