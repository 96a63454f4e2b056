"""What can go wrong in training, each with a message a user can act on."""

from db.errors import TweetscoreError


class BadConfig(TweetscoreError):
    """Raised when a hyper-parameter is unknown, out of range, or does not fit another."""


class BadDataset(TweetscoreError):
    """Raised when a dataset cannot be read, or cannot be split into training, validation and test rows."""


class BadSource(TweetscoreError):
    """Raised when a file or URL of rows is not there, is empty, or cannot be unpacked."""


class ModelUnavailable(TweetscoreError):
    """Raised when a base model cannot be found, fetched or loaded."""


class BadArtifact(TweetscoreError):
    """Raised when a stored model or checkpoint is missing a part or does not match its digest."""


class CannotSave(TweetscoreError):
    """Raised when a checkpoint or a model cannot be written, for want of space above all."""


class StoreAway(TweetscoreError):
    """Raised when a remote store does not answer, or not to us; nothing is wrong with what lies there."""


class Cancelled(Exception):
    """Raised inside the loop when the job was asked to stop for good."""


class StopRequested(Exception):
    """Raised inside the loop when the worker must end; the job goes on elsewhere from its checkpoint."""
