"""Exceptions of training. The message of a `TweetscoreError` names the value at fault and the remedy."""

from db.errors import TweetscoreError


class BadConfig(TweetscoreError):
    """Raised when a hyper-parameter is unknown, out of range, or incompatible with another."""


class BadDataset(TweetscoreError):
    """Raised when a dataset cannot be read, or cannot be split into training, validation and test rows."""


class BadSource(TweetscoreError):
    """Raised when a file or URL of rows does not exist, is empty, or cannot be decompressed."""


class BadRow(TweetscoreError):
    """Yielded in place of a row that cannot be read; the message does not contain the row's text."""


class ModelUnavailable(TweetscoreError):
    """Raised when a base model or its tokenizer cannot be found, downloaded or loaded."""


class BadArtifact(TweetscoreError):
    """Raised when a stored model or checkpoint is missing, incomplete, or does not match its digest."""


class CannotSave(TweetscoreError):
    """Raised when a checkpoint or a model cannot be written, usually because the disk is full."""


class TuningUnavailable(TweetscoreError):
    """Raised when Optuna is not installed, or another process runs the same study."""


class NoTrialFinished(TweetscoreError):
    """Raised when tuning ends before its first trial does."""


class OutOfMemory(TweetscoreError):
    """Raised when a single row, or a batch that cannot be divided, does not fit into the memory of its device."""


class StoreUnavailable(TweetscoreError):
    """Raised when a remote store does not answer or refuses access. The job is retried later."""


class LabelCheckUnavailable(TweetscoreError):
    """Raised when the package that finds wrong labels is not installed."""


class Cancelled(Exception):
    """Raised in the training thread when the job was cancelled."""


class StopRequested(Exception):
    """Raised in the training thread when the worker shuts down. The job resumes later from its checkpoint."""
