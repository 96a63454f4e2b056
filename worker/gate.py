"""Whether a worker can work with its database: asked now and then, said when it changes.

A worker whose database is away when it starts, or has a schema older or newer than it can work with, holds nothing and
waits. It goes on by itself.
"""

import logging
import threading
import time

from db import migrate
from db.errors import DatabaseError, SchemaMismatch
from db.session import Database

log = logging.getLogger(__name__)


class Gate:
    """Asks at most every `every_seconds`, whoever wants to know. `opened` is set once it was open for the first time.

    `why` is the sentence that says what is waited for, None while the gate is open or nobody has asked.
    """

    def __init__(self, database: Database, every_seconds: float) -> None:
        self.opened = threading.Event()
        self.why: str | None = None
        self._database = database
        self._every_seconds = every_seconds
        self._asked_at = -float("inf")
        self._asking = threading.Lock()

    def is_open(self, now: bool = False) -> bool:
        """Whether there may be work; with `now` the database is asked at once."""
        with self._asking:
            if now or time.monotonic() - self._asked_at >= self._every_seconds:
                self._ask()
                self._asked_at = time.monotonic()
            return self.why is None

    def wait(self, stopping: threading.Event) -> bool:
        """Return True when it is open, False when `stopping` is set before."""
        while not self.is_open():
            if stopping.wait(self._every_seconds):
                return False
        return True

    def _ask(self) -> None:
        try:
            migrate.prepare(self._database)
        except SchemaMismatch as error:
            self._shut(str(error))
        except DatabaseError as error:
            # One that goes away later is waited for with the work in hand.
            if not self.opened.is_set():
                self._shut(str(error))
        else:
            self._open()

    def _shut(self, why: str) -> None:
        if why != self.why:
            log.error("waiting, and taking no work: %s", why)
        self.why = why

    def _open(self) -> None:
        if self.why is not None:
            log.info("the database can be worked with now")
        self.why = None
        self.opened.set()
