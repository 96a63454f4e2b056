"""Errors of the worker package. Each message names the value and the remedy."""

from collections.abc import Sequence

from db.errors import TweetscoreError


class BadSettings(TweetscoreError):
    """Raised when a setting has a value that is not allowed."""


class BadRequest(TweetscoreError):
    """Raised when the options of a command or call contradict each other or are out of range."""


class JobFailed(TweetscoreError):
    """Raised by the Celery task of a job that failed, with the job's error message."""


class BadRecord(TweetscoreError):
    """Raised when a record or a line is not a tweet. The message gives the reason and never quotes the text."""


class BadLabels(TweetscoreError):
    """Raised when a file of labels cannot be imported. Nothing of it is stored then."""


class StreamError(TweetscoreError):
    """Raised when the stream's server cannot be reached or refuses a command."""


class StreamDenied(StreamError):
    """Raised when the user of the stream's server lacks a permission."""


class StreamAway(StreamError):
    """Raised when the stream's server does not answer or loads its data. The command may still have been executed."""


class StreamFull(StreamError):
    """Raised when the stream's server has no memory left for more records; `rest` holds those it did not accept."""

    def __init__(self, message: str, rest: Sequence[bytes] = ()) -> None:
        super().__init__(message)
        self.rest = rest


class ServerRunning(TweetscoreError):
    """Raised when an embedded server is started on a home that already has one."""


class ServerFailed(TweetscoreError):
    """Raised when the embedded server does not start or does not answer."""


class PromotionRefused(TweetscoreError):
    """Raised when a model that labels show to be worse than the champion is to become the champion."""


class DeviceFull(TweetscoreError):
    """Raised when a batch does not fit into the memory of its device."""


class ConsoleUnavailable(TweetscoreError):
    """Raised when the packages of the console are not installed."""


class EngineUnavailable(TweetscoreError):
    """Raised when a package that an engine needs is not installed."""


class TrialFailed(TweetscoreError):
    """Raised when the engine trial of a model failed; the current engine stays in use."""
