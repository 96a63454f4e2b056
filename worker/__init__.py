"""The event-driven side: stream, scoring, Celery tasks, command line. Three functions for those who write Python:

worker.submit_training("data.csv", preset="guide", epochs=3)   -> job id
worker.publish([{"id": "1", "text": "最高の一日"}])              -> how many were published
worker.query("SELECT * FROM v_model_leaderboard")              -> a pandas frame
"""

from collections.abc import Generator, Iterable, Mapping
from typing import TYPE_CHECKING, Any, overload

if TYPE_CHECKING:
    from pandas import DataFrame


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


@overload
def query(sql: str, chunksize: None = None) -> "DataFrame": ...
@overload
def query(sql: str, chunksize: int) -> "Generator[DataFrame, None, None]": ...


def query(sql: str, chunksize: int | None = None) -> "DataFrame | Generator[DataFrame, None, None]":
    """The answer to one SELECT as a pandas frame. Nothing can be written this way.

    With `chunksize` a generator of frames of so many rows, read as they are taken; its connection is closed when it is
    exhausted, closed or no longer referred to. Of either database: ids are text, times aware and UTC, JSON is objects,
    integers are nullable where one is NULL, and no rows still have their columns.

    Raises `TweetscoreError` when the database cannot be reached or refuses, or the question gives no row for a minute.
    """
    from db import frames
    from worker.errors import BadRequest
    from worker.settings import load_settings

    url = load_settings().asking_url
    if chunksize is None:
        return frames.whole(url, sql)
    if chunksize < 1:
        raise BadRequest(f"chunksize is {chunksize}; it must be at least 1")
    return frames.in_chunks(url, sql, chunksize)
