"""What a worker's log may say: that something failed, where, and of what kind, but nothing anybody wrote.

An exception's message may quote a row, a message's body is somebody's words, and logs are read and kept by others
than the database is.
"""

import logging
import sys
import traceback
from types import TracebackType
from typing import TextIO

import structlog
from celery.worker.consumer.consumer import INVALID_TASK_ERROR, MESSAGE_DECODE_ERROR, UNKNOWN_FORMAT, UNKNOWN_TASK_ERROR
from sqlalchemy.exc import DBAPIError

from worker.errors import StreamError

QUOTING = (INVALID_TASK_ERROR, MESSAGE_DECODE_ERROR, UNKNOWN_FORMAT, UNKNOWN_TASK_ERROR)
# What the system, the database's first line and the device say of themselves quotes no row.
PLAIN_ERRORS = (OSError, DBAPIError, RuntimeError, StreamError)
LONGEST_LINE = 300


def set_up() -> None:
    """Every handler of the root logger passes on only what may be said."""
    logging.basicConfig(level="INFO", handlers=[handler(sys.stderr)])
    for each in logging.getLogger().handlers:
        each.addFilter(discreet)


def handler(output: TextIO) -> logging.Handler:
    """Lines for a terminal, a JSON object a line for anything else, with what is bound: job, window, model version."""
    renderer: structlog.typing.Processor = structlog.processors.JSONRenderer(ensure_ascii=False)
    if output.isatty():
        renderer = structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)
    made = logging.StreamHandler(output)
    made.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[
                structlog.contextvars.merge_contextvars,
                structlog.stdlib.add_log_level,
                structlog.stdlib.add_logger_name,
                structlog.processors.TimeStamper("iso", utc=True),
                _tell_exception,
            ],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    return made


def _tell_exception(_logger: object, _method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """What `discreet` left of a traceback."""
    if event["_record"].exc_text:
        event["exception"] = event["_record"].exc_text
    return event


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
