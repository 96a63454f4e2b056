"""Retry database transactions while the database is unavailable, until the worker shuts down."""

import logging
import threading
from collections.abc import Callable
from typing import TypeVar

from sqlalchemy.exc import SQLAlchemyError

from db.session import is_away
from training.errors import StopRequested

log = logging.getLogger(__name__)

Value = TypeVar("Value")

FIRST_PAUSE_SECONDS = 0.25
LONGEST_PAUSE_SECONDS = 10.0


def retry_while_database_away(do: Callable[[], Value], stopping: threading.Event) -> Value:
    """Return `do()`, retried with increasing pauses while the database is unavailable (see `db.session.is_away`).

    `do` must be a transaction that is safe to repeat. Raises `StopRequested` when `stopping` is set during a pause, and
    any other error of `do`.
    """
    pause = FIRST_PAUSE_SECONDS
    while True:
        try:
            return do()
        except SQLAlchemyError as error:
            if not is_away(error):
                raise
            if pause == FIRST_PAUSE_SECONDS:
                log.warning("the database does not answer, retrying: %s", driver_message(error))
        if stopping.wait(pause):
            raise StopRequested
        pause = min(2 * pause, LONGEST_PAUSE_SECONDS)


def driver_message(error: SQLAlchemyError) -> str:
    """Return the driver's error message on one line, without the SQL statement and its parameters."""
    return " ".join(str(getattr(error, "orig", None) or error).split())
