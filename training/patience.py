"""Waiting for a database that is away, for as long as that takes or until the worker must end."""

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


def patiently(do: Callable[[], Value], stopping: threading.Event) -> Value:
    """What `do` returns, tried again, at growing intervals, while the database is away.

    `do` is a transaction that may be made twice. Raises what `do` raises, and `StopRequested`.
    """
    pause = FIRST_PAUSE_SECONDS
    while True:
        try:
            return do()
        except SQLAlchemyError as error:
            if not is_away(error):
                raise
            if pause == FIRST_PAUSE_SECONDS:
                log.warning("the database does not answer, waiting for it: %s", cause(error))
        if stopping.wait(pause):
            raise StopRequested
        pause = min(2 * pause, LONGEST_PAUSE_SECONDS)


def cause(error: SQLAlchemyError) -> str:
    """What the driver had to say, on one line and without the statement."""
    return " ".join(str(getattr(error, "orig", None) or error).split())
