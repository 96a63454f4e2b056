"""What can go wrong around the stream and its server, each with a message a user can act on."""

from collections.abc import Sequence

from db.errors import TweetscoreError


class BadSettings(TweetscoreError):
    """Raised when a setting has a value that is not allowed."""


class BadRequest(TweetscoreError):
    """Raised when a command's options do not fit together."""


class JobFailed(TweetscoreError):
    """Raised by the Celery task of a job that failed, with the job's sentence."""


class BadRecord(TweetscoreError):
    """Raised when a record or a line is no tweet: the message says why, never the text itself."""


class StreamError(TweetscoreError):
    """Raised when the stream's server cannot be reached or refuses."""


class StreamDenied(StreamError):
    """Raised when the stream's server knows who asks and does not allow it."""


class StreamAway(StreamError):
    """Raised when the stream's server is away or loads its data: it may come back, and may have what was sent."""


class StreamFull(StreamError):
    """Raised when the stream's server has no memory left for another record; `rest` are those it did not take."""

    def __init__(self, message: str, rest: Sequence[bytes] = ()) -> None:
        super().__init__(message)
        self.rest = rest


class ServerRunning(TweetscoreError):
    """Raised when a second embedded server is started on a home that has one."""


class ServerFailed(TweetscoreError):
    """Raised when the embedded server cannot start."""


class DeviceFull(TweetscoreError):
    """Raised when a batch does not fit into the memory of its device."""


class DashboardUnavailable(TweetscoreError):
    """Raised when the packages of the dashboard are not installed."""


class EngineUnavailable(TweetscoreError):
    """Raised when a package that an engine needs is not installed."""


class TrialFailed(TweetscoreError):
    """Raised when engines could not be tried out on a model; the one that serves goes on."""
