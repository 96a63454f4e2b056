"""The event-driven side: stream, scoring, Celery tasks, command line. Two functions for those who write Python:

worker.submit_training("data.csv", preset="guide", epochs=3)   -> job id
worker.publish([{"id": "1", "text": "最高の一日"}])              -> how many were published
"""

from collections.abc import Iterable, Mapping
from typing import Any


def submit_training(dataset: str, preset: str | None = None, **options: Any) -> int:
    """Queue a fine-tuning job and nudge a training worker. Returns the job's id.

    `options` are fields of `training.config.TrainConfig`. The row alone is enough: without a broker the job waits for
    the next worker. Raises `TweetscoreError` when the job could only fail.
    """
    from worker import doors  # the package stays light until it is used

    return doors.submit_training(dataset, preset, **options)


def publish(tweets: Iterable[Mapping[str, Any]]) -> int:
    """Append tweets to the stream and nudge a scoring worker. Returns how many.

    A tweet is {"id", "text", ...}, or what the X API gives: one of its tweets or a page of them.

    A server that is started again, or loads its data, is waited for. It may then have some of them twice, and each gets
    one row all the same. Raises `BadRecord`, and publishes nothing, when one of them is no tweet; `StreamError` or
    `ServerFailed` when the broker is away.
    """
    from worker import doors

    return doors.publish(tweets)
