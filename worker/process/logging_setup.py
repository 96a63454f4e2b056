"""Structured logging for workers, without user data.

An exception's message may quote a row, and Celery's own log lines quote the body of a message. Logs are often kept
longer and read by more people than the database, so the log names the kind of an error and its place in the code only.
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

# Celery's log messages that contain the body of a message.
QUOTING_MESSAGES = (INVALID_TASK_ERROR, MESSAGE_DECODE_ERROR, UNKNOWN_FORMAT, UNKNOWN_TASK_ERROR)
# Errors whose message, or its first line, does not contain row data.
PLAIN_ERRORS = (OSError, DBAPIError, RuntimeError, StreamError)
LONGEST_LINE = 300


def set_up() -> None:
    """Log to standard error, and redact the records of every handler of the root logger."""
    logging.basicConfig(level="INFO", handlers=[handler(sys.stderr)])
    for each in logging.getLogger().handlers:
        each.addFilter(redact)


def handler(output: TextIO) -> logging.Handler:
    """Readable lines on a terminal, otherwise one JSON object a line, with the bound context: job, window, model
    version."""
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
                _add_exception,
            ],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    return made


def _add_exception(_logger: object, _method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """Add the traceback that `redact` prepared."""
    if event["_record"].exc_text:
        event["exception"] = event["_record"].exc_text
    return event


def redact(record: logging.LogRecord) -> bool:
    """Logging filter: replace messages and tracebacks that may contain user data. Drops no record."""
    if record.msg in QUOTING_MESSAGES:
        record.msg, record.args = "dropped a message that is not a task of this worker", ()
        record.exc_info = None
    elif record.name == "celery.app.trace" and isinstance(record.args, dict):
        record.msg, record.args = "%s %s", (record.args.get("name"), record.args.get("description"))
    if isinstance(record.exc_info, tuple) and record.exc_info[1] is not None:
        record.exc_text = describe_error(record.exc_info[1])
        record.exc_info = None
    return True


def describe_error(error: BaseException) -> str:
    """Describe an exception and its causes: the traceback, the type and, for `PLAIN_ERRORS`, the first line of the
    message."""
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return "\n".join(_frames(one.__traceback__) + _line(one) for one in reversed(chain))


def _frames(frames: TracebackType | None) -> str:
    return "".join(traceback.format_tb(frames))


def _line(error: BaseException) -> str:
    message = str(error).splitlines()[:1] if isinstance(error, PLAIN_ERRORS) else []
    return ": ".join([type(error).__qualname__, *(line[:LONGEST_LINE] for line in message)])
