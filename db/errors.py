"""The root of every error whose message is meant for a user, and the errors of the SQL side."""


class TweetscoreError(Exception):
    """A fault whose message says in one sentence what is wrong and what to do about it."""


class DatabaseError(TweetscoreError):
    """Raised when the database cannot be reached, opened or migrated."""


class NotFound(TweetscoreError):
    """Raised when a job or a model version is named that does not exist."""


class NotFailed(TweetscoreError):
    """Raised when a job is to be tried again that has not failed."""


class LeaseLost(TweetscoreError):
    """Raised when a job is written to by someone who no longer holds its newest fencing token."""
