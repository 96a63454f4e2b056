"""Stream, scoring, Celery tasks and command line. The Python interface is six functions:

worker.submit_training("data.csv", preset="guide", epochs=3)   -> job id
worker.import_model("owner/model", labels={"LABEL_0": "good"}) -> model version id
worker.make_cascade(1, 2, keep=0.995)                          -> model version id
worker.evaluate_model(1, "labelled.csv")                       -> metrics
worker.publish([{"id": "1", "text": "最高の一日"}])              -> number of tweets published
worker.query("SELECT * FROM v_model_leaderboard")              -> a pandas DataFrame
"""

from collections.abc import Generator, Iterable, Mapping
from typing import TYPE_CHECKING, Any, overload

if TYPE_CHECKING:
    from pandas import DataFrame


def submit_training(
    dataset: str | None = None, preset: str | None = None, *, from_labels: bool = False, **options: Any
) -> int:
    """Queue a fine-tuning job and nudge a training worker. Returns the job's id.

    With `from_labels` it trains on the stored tweets that people labelled, besides the rows of `dataset` if there is
    one; `since` (a datetime) and `topic` select tweets. `options` are fields of `training.config.TrainConfig`.
    The nudge is optional: without a broker the job waits in SQL for the next worker. Raises `TweetscoreError` when the
    job cannot succeed.
    """
    if from_labels:
        from worker.labelling.train_from_labels import submit_from_labels_and_nudge

        return submit_from_labels_and_nudge(dataset, preset, **options)
    from worker.errors import BadRequest
    from worker.intake.submit_job import submit_and_nudge  # imported here to keep `import worker` fast

    if dataset is None:
        raise BadRequest("there is nothing to train on; name a file of labelled rows, or set from_labels")
    return submit_and_nudge(dataset, preset, **options)


def import_model(model: str, revision: str | None = None, **options: Any) -> int:
    """Make an existing classifier, a hub name or a folder, a model version. Returns its id.

    `options` are fields of `training.model.imported.ImportOptions`. Raises `TweetscoreError`, and stores nothing, when
    the classifier cannot be used as it is.
    """
    from worker.intake.import_model import import_with_settings

    return import_with_settings(model, revision, **options)


def make_cascade(student: int, teacher: int, keep: float = 0.995, **options: Any) -> int:
    """Make a model version of two: the teacher scores only the tweets that the student is unsure of. Returns its id.

    `keep` is the share of the teacher's macro-F1 to keep. `options` are `bound`, `file` and `labels` of
    `worker.intake.make_cascade`. Raises `TweetscoreError`, and stores nothing, when the models do not fit together or
    no threshold keeps so much.
    """
    from worker.intake.make_cascade import cascade_with_settings

    return cascade_with_settings(student, teacher, keep, **options)


def evaluate_model(model_version_id: int, dataset: str, labels: dict[str, str] | None = None) -> dict[str, float]:
    """Score the rows of a labelled file with a model version and store the figures. Returns the metrics of all rows.

    `labels` maps labels of the file to labels of the model. The metrics of each label are in the table
    `evaluation_metrics`. Raises `TweetscoreError` when the model or the file cannot be read, or a label is unknown.
    """
    from worker.intake.evaluate_model import evaluate_with_settings

    return evaluate_with_settings(model_version_id, dataset, labels)


def publish(tweets: Iterable[Mapping[str, Any]]) -> int:
    """Append tweets to the stream and nudge a scoring worker. Returns the number of tweets.

    A tweet is {"id", "text", ...}, or a tweet or a page of tweets as the X API returns them.

    Waits while the server restarts or loads its data. Tweets may then be in the stream twice; each still gets one
    row. Raises `BadRecord`, and publishes nothing, when an item is not a tweet; `StreamError` or `ServerFailed` when
    the broker is unavailable.
    """
    from worker.intake import publish

    return publish.publish(tweets)


@overload
def query(sql: str, chunksize: None = None) -> "DataFrame": ...
@overload
def query(sql: str, chunksize: int) -> "Generator[DataFrame, None, None]": ...


def query(sql: str, chunksize: int | None = None) -> "DataFrame | Generator[DataFrame, None, None]":
    """Run one SELECT in a read-only transaction and return its rows as a pandas DataFrame.

    With `chunksize` return a generator of frames with that many rows, read on demand. Its connection is closed when the
    generator is exhausted, closed or garbage-collected. On both databases ids are text, times are timezone-aware and in
    UTC, JSON columns are objects, integer columns with a NULL are nullable, and an empty result keeps its columns.

    Raises `TweetscoreError` when the database cannot be reached, refuses the query, or returns no row for a minute.
    """
    from db.querying import frames
    from worker.errors import BadRequest
    from worker.settings import load_settings

    url = load_settings().query_url
    if chunksize is None:
        return frames.whole(url, sql)
    if chunksize < 1:
        raise BadRequest(f"chunksize is {chunksize}; it must be at least 1")
    return frames.in_chunks(url, sql, chunksize)
