"""What a worker's log may say: that something failed, where, and of what kind, but nothing anybody wrote.

An exception's message may quote a row, a message's body is somebody's words, and logs are read and kept by others
than the database is.
"""

import logging
import traceback
from types import TracebackType

from celery.worker.consumer.consumer import INVALID_TASK_ERROR, MESSAGE_DECODE_ERROR, UNKNOWN_FORMAT, UNKNOWN_TASK_ERROR
from sqlalchemy.exc import DBAPIError

from worker.errors import StreamError

QUOTING = (INVALID_TASK_ERROR, MESSAGE_DECODE_ERROR, UNKNOWN_FORMAT, UNKNOWN_TASK_ERROR)
# What the system, the database's first line and the device say of themselves quotes no row.
PLAIN_ERRORS = (OSError, DBAPIError, RuntimeError, StreamError)
LONGEST_LINE = 300


def keep_discreet() -> None:
    """Let every handler of the root logger pass on only what may be said."""
    for handler in logging.getLogger().handlers:
        handler.addFilter(discreet)


def discreet(record: logging.LogRecord) -> bool:
    if record.msg in QUOTING:
        record.msg, record.args = "dropped a message that is no task of this worker", ()
        record.exc_info = None
    elif record.name == "celery.app.trace" and isinstance(record.args, dict):
        record.msg, record.args = "%s %s", (record.args.get("name"), record.args.get("description"))
    if isinstance(record.exc_info, tuple) and record.exc_info[1] is not None:
        record.exc_text = described(record.exc_info[1])
        record.exc_info = None
    return True


def described(error: BaseException) -> str:
    """An exception and what led to it: where, of which kind, and of plain errors the first line they say."""
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return "\n".join(_frames(one.__traceback__) + _line(one) for one in reversed(chain))


def _frames(frames: TracebackType | None) -> str:
    return "".join(traceback.format_tb(frames))


def _line(error: BaseException) -> str:
    said = str(error).splitlines()[:1] if isinstance(error, PLAIN_ERRORS) else []
    return ": ".join([type(error).__qualname__, *(line[:LONGEST_LINE] for line in said)])
