"""The schema: one class per table. Comments on tables and columns are stored in PostgreSQL and in `docs/schema.md`.

The tables of the model registry are in `db.registry_models`, those of labels in `db.label_models`; both are importable
from here too.
"""

from datetime import date, datetime
from typing import Any

from sqlalchemy import CheckConstraint, ForeignKey, Index, func, text, true
from sqlalchemy.orm import Mapped, mapped_column

from db.base import Base, TweetId, utc_now
from db.label_models import Label, ReviewAsk, ReviewTweet, of_tweet, on_sqlite
from db.registry_models import (
    BaseModel,
    Cascade,
    ConfusionCell,
    Evaluation,
    EvaluationMetric,
    ModelAlias,
    ModelVersion,
    OutOfFoldPrediction,
    TestMetric,
    TestPrediction,
)

__all__ = [
    "Base",
    "BaseModel",
    "Cascade",
    "ConfusionCell",
    "DeadLetter",
    "DriftRollup",
    "EpochMetric",
    "Evaluation",
    "EvaluationMetric",
    "Label",
    "ModelAlias",
    "ModelVersion",
    "OutOfFoldPrediction",
    "Prediction",
    "ReviewAsk",
    "ReviewTweet",
    "SchemaCompatibility",
    "ScoringWindow",
    "SentimentRollup",
    "TestMetric",
    "TestPrediction",
    "TrainingJob",
    "Tweet",
    "WebhookEvent",
    "utc_now",
]

JOB_STATES = ("queued", "running", "succeeded", "failed", "cancelled")
FINISHED_STATES = ("succeeded", "failed", "cancelled")
# Condition of the index of uncertain predictions, and of the view v_low_confidence.
UNCERTAIN = "probability < 0.6"
# Of the column. Predictions of equal probability are neighbours in that index; with more decimals, each new one would
# change a page of its own. The probabilities of all labels have more.
PROBABILITY_DECIMALS = 4
# `train` makes a model version, `adapt` a base model.
JOB_KINDS = ("train", "adapt")


class Tweet(Base):
    __tablename__ = "tweets"
    __table_args__ = (
        # Tweets of a period, by the time at which they were written: rows of one time lie together.
        Index(
            "ix_tweets_written_at",
            func.coalesce(text("tweet_created_at"), text("received_at")),
            postgresql_using="brin",
            postgresql_with={"autosummarize": "on", "pages_per_range": 32},
        ).ddl_if(dialect="postgresql"),
        {
            "comment": "One row per tweet, with the text as it was received. A repeated tweet keeps its first row.",
            "postgresql_partition_by": "RANGE (tweet_id)",
        },
    )

    tweet_id: Mapped[str] = mapped_column(
        TweetId,
        primary_key=True,
        comment="Id of the tweet, as text: ids exceed 2^53, where JSON readers start to round.",
    )
    text: Mapped[str] = mapped_column(comment="Text of the tweet, as received and before cleaning.")
    author_id: Mapped[str | None] = mapped_column(comment="Id of the author. NULL when the record had none.")
    lang: Mapped[str | None] = mapped_column(
        comment="Language code that the publisher gave, such as ja. NULL when the record had none."
    )
    topic: Mapped[str | None] = mapped_column(
        comment="Topic that the publisher or the filter rule gave. NULL when the record had none."
    )
    tweet_created_at: Mapped[datetime | None] = mapped_column(
        comment="Time at which the tweet was written, UTC. NULL when the record had none."
    )
    received_at: Mapped[datetime] = mapped_column(index=True, comment="Time at which the stream received it, UTC.")
    retweeted_id: Mapped[str | None] = mapped_column(
        TweetId, comment="Id of the tweet that it repeats. NULL for no retweet."
    )
    quoted_id: Mapped[str | None] = mapped_column(TweetId, comment="Id of the tweet that it quotes. NULL for no quote.")
    replied_to_id: Mapped[str | None] = mapped_column(
        TweetId, comment="Id of the tweet that it answers. NULL for no reply."
    )


class Prediction(Base):
    """The key makes a replay an upsert that changes nothing.

    On PostgreSQL the model version has no foreign key, which would lock one row of `model_versions` for every
    prediction; that of `sentiment_rollup`, which a trigger fills, refuses an unknown version.
    """

    __tablename__ = "predictions"
    __table_args__ = (
        of_tweet(),
        on_sqlite("model_version_id", "model_versions.id"),
        # The newest predictions of a model. The rows of a window have one time, which PostgreSQL stores once.
        Index(None, "model_version_id", "scored_at"),
        # Counts by label, and the least certain predictions. On PostgreSQL, which has more rows, only the latter: an
        # index of all of them grows at random places.
        Index(None, "model_version_id", "probability", "label", info={"only_on": "sqlite"}).ddl_if(dialect="sqlite"),
        Index(
            "ix_predictions_uncertain",
            "model_version_id",
            "probability",
            postgresql_where=text(UNCERTAIN),
            info={"only_on": "postgresql"},
        ).ddl_if(dialect="postgresql"),
        {
            "comment": "One row per tweet and model version: the label that the model predicted.",
            "postgresql_partition_by": "RANGE (tweet_id)",
        },
    )

    tweet_id: Mapped[str] = mapped_column(TweetId, primary_key=True, comment="The tweet that was scored.")
    model_version_id: Mapped[int] = mapped_column(primary_key=True, comment="The model version that scored it.")
    label: Mapped[str] = mapped_column(
        comment="The predicted label. A multi-label model joins all labels of probability 0.5 or more with |. The "
        "label of a continuous model is value."
    )
    probability: Mapped[float] = mapped_column(
        comment="Calibrated probability of the label, 0 to 1. Multi-label: of the least certain yes or no."
    )
    score_signed: Mapped[float | None] = mapped_column(
        comment="Polarity of the labels, weighted by probability, -1 to 1. NULL when no label has a polarity."
    )
    probabilities: Mapped[dict[str, Any]] = mapped_column(
        comment="JSON object: the calibrated probability of every label, 0 to 1. Of a continuous model: the number "
        "that it predicts, named value."
    )
    scored_at: Mapped[datetime] = mapped_column(comment="Time at which the prediction was made, UTC.")
    unknown_share: Mapped[float | None] = mapped_column(
        comment="Share of the text's tokens that the model does not know, 0 to 1. NULL for rows of releases before 0.2."
    )
    decided_by: Mapped[int | None] = mapped_column(
        comment="The model version whose probabilities these are: the student or the teacher of a cascade. NULL for "
        "any other model."
    )


class SentimentRollup(Base):
    """On PostgreSQL every connection adds to its own shard, so that workers do not wait for each other. The maintenance
    thread of a worker later adds these rows to shard 0. A query sums over the shards."""

    __tablename__ = "sentiment_rollup"
    __table_args__ = (
        {
            "comment": "Sums of predictions by model version, hour, topic and label, which triggers update. "
            "Add up the shards of a key."
        },
    )

    model_version_id: Mapped[int] = mapped_column(
        ForeignKey("model_versions.id"), primary_key=True, comment="The model version that made the predictions."
    )
    hour: Mapped[datetime] = mapped_column(
        primary_key=True, comment="Start of the hour, UTC, in which the tweets were written, or else received."
    )
    topic: Mapped[str] = mapped_column(primary_key=True, comment="Topic of the tweets. Empty for tweets without one.")
    label: Mapped[str] = mapped_column(primary_key=True, comment="The predicted label.")
    shard: Mapped[int] = mapped_column(
        primary_key=True,
        comment="Process id of the PostgreSQL connection that counted the rows. 0 for folded rows and on SQLite.",
    )
    tweets: Mapped[int] = mapped_column(
        comment="Number of predictions. Negative when a shard counted more deletions than insertions."
    )
    probability_sum: Mapped[float] = mapped_column(comment="Sum of probability over the predictions.")
    score_sum: Mapped[float] = mapped_column(comment="Sum of score_signed over the predictions that have one.")
    with_score: Mapped[int] = mapped_column(comment="Number of predictions whose score_signed is not NULL.")


class DriftRollup(Base):
    """As `SentimentRollup`, for v_drift and v_live_quality."""

    __tablename__ = "drift_rollup"
    __table_args__ = (
        {
            "comment": "Sums of predictions by model version, day of arrival, label and bins of v_drift, which "
            "triggers update. Add up the shards of a key."
        },
    )

    model_version_id: Mapped[int] = mapped_column(
        ForeignKey("model_versions.id"), primary_key=True, comment="The model version that made the predictions."
    )
    day: Mapped[date] = mapped_column(primary_key=True, comment="Day, UTC, on which the tweets were received.")
    label: Mapped[str] = mapped_column(primary_key=True, comment="The predicted label.")
    length_bin: Mapped[str] = mapped_column(
        primary_key=True, comment="Bin of the length, as in v_drift: 0 for up to 9 characters."
    )
    unknown_bin: Mapped[str] = mapped_column(
        primary_key=True,
        comment="Bin of the share of unknown tokens, as in v_drift: 0 for none. Empty for predictions without it.",
    )
    shard: Mapped[int] = mapped_column(
        primary_key=True,
        comment="Process id of the PostgreSQL connection that counted the rows. 0 for folded rows and on SQLite.",
    )
    tweets: Mapped[int] = mapped_column(
        comment="Number of predictions. Negative when a shard counted more deletions than insertions."
    )
    probability_sum: Mapped[float] = mapped_column(comment="Sum of probability over the predictions.")


class TrainingJob(Base):
    """The row is the truth; only the holder of the newest fencing token may write it."""

    __tablename__ = "training_jobs"
    __table_args__ = (
        CheckConstraint(f"state IN ({', '.join(map(repr, JOB_STATES))})", name="state"),
        Index(None, "state", "lease_expires_at"),
        {"comment": "One row per request to train a model: its configuration, state, lease and progress."},
    )

    id: Mapped[int] = mapped_column(primary_key=True, comment="Id of the job, rising.")
    request_id: Mapped[str] = mapped_column(
        unique=True, comment="Id of the request, such as the id of a Celery message. A repeated request finds its job."
    )
    state: Mapped[str] = mapped_column(
        default="queued", comment="State of the job: queued, running, succeeded, failed or cancelled."
    )
    kind: Mapped[str] = mapped_column(
        default="train",
        server_default="train",
        comment="What the job makes: train a model version, adapt a base model.",
    )
    config: Mapped[dict[str, Any]] = mapped_column(comment="JSON object: the training configuration.")
    dataset: Mapped[str] = mapped_column(comment="Path or URL of the labelled dataset.")
    dataset_sha256: Mapped[str | None] = mapped_column(
        comment="SHA-256 of the dataset, in hexadecimal. NULL until a worker has read the dataset."
    )
    lease_owner: Mapped[str | None] = mapped_column(
        comment="Name of the worker that claimed the job last. NULL when the lease was released."
    )
    lease_expires_at: Mapped[datetime | None] = mapped_column(
        comment="End of the lease, UTC; on a queued job, the earliest next start. NULL when neither applies."
    )
    fencing_token: Mapped[int] = mapped_column(
        default=0, comment="Number of claims so far. Only the worker with the newest token may write the job."
    )
    attempts: Mapped[int] = mapped_column(
        default=0, comment="Number of starts that count against the limit. Interrupted starts are subtracted."
    )
    cancel_requested: Mapped[bool] = mapped_column(
        default=False, comment="True once a user has requested cancellation."
    )
    step: Mapped[int] = mapped_column(default=0, comment="Optimizer steps done.")
    total_steps: Mapped[int | None] = mapped_column(comment="Optimizer steps in all. NULL before the first step.")
    loss: Mapped[float | None] = mapped_column(comment="Training loss of a recent step. NULL before the first one.")
    samples_per_second: Mapped[float | None] = mapped_column(
        comment="Training rows per second, measured recently. NULL before the first measurement."
    )
    submitted_at: Mapped[datetime] = mapped_column(default=utc_now, comment="Time at which the job was submitted, UTC.")
    started_at: Mapped[datetime | None] = mapped_column(
        comment="Time of the first start, UTC. NULL before it, and after a retry until the next start."
    )
    finished_at: Mapped[datetime | None] = mapped_column(
        comment="Time at which the job succeeded, failed or was cancelled, UTC. NULL until then."
    )
    error: Mapped[str | None] = mapped_column(
        comment="Why the job failed or what it waits for. NULL when there is nothing to report."
    )
    data_report: Mapped[dict[str, Any] | None] = mapped_column(
        comment="JSON object: what was found in the dataset, such as sizes and duplicates. NULL until it was read."
    )
    message: Mapped[str | None] = mapped_column(
        comment="The Celery message that requested the job. NULL for other jobs and after its sender got the result."
    )
    answer_due_at: Mapped[datetime | None] = mapped_column(
        comment="Time, UTC, until which one worker sends the result to the requester. NULL when none has begun."
    )
    labels_until: Mapped[datetime | None] = mapped_column(
        comment="Labels of stored tweets that were given until then may be among its rows, UTC. NULL for a job without "
        "them."
    )


class EpochMetric(Base):
    __tablename__ = "epoch_metrics"
    __table_args__ = ({"comment": "One row per epoch of a training job. An epoch that is repeated replaces its row."},)

    job_id: Mapped[int] = mapped_column(
        ForeignKey("training_jobs.id", ondelete="CASCADE"), primary_key=True, comment="The training job."
    )
    epoch: Mapped[int] = mapped_column(primary_key=True, comment="Number of the epoch, from 1.")
    train_loss: Mapped[float] = mapped_column(comment="Mean training loss over the rows of the epoch.")
    learning_rate: Mapped[float] = mapped_column(comment="Learning rate of the last step of the epoch.")
    valid_loss: Mapped[float] = mapped_column(comment="Mean loss over the validation rows.")
    valid_accuracy: Mapped[float] = mapped_column(
        comment="Accuracy on the validation rows, 0 to 1. Of a continuous task: R2, at least 0."
    )
    valid_f1_macro: Mapped[float] = mapped_column(
        comment="Macro-F1 on the validation rows, 0 to 1. Of a continuous task: D2, the share of the absolute error "
        "around the median that the model removes, at least 0."
    )
    seconds: Mapped[float] = mapped_column(comment="Duration of the epoch in seconds, validation included.")
    kept: Mapped[bool] = mapped_column(
        default=True,
        server_default=true(),
        comment="True when the weights of this epoch replaced those of the best epoch before it.",
    )


class ScoringWindow(Base):
    __tablename__ = "scoring_windows"
    __table_args__ = (
        {"comment": "One row per window, which is a set of records that a worker scored and committed together."},
    )

    id: Mapped[int] = mapped_column(primary_key=True, comment="Id of the window, rising.")
    worker: Mapped[str] = mapped_column(comment="Name of the worker that scored the window.")
    model_version_id: Mapped[int] = mapped_column(
        ForeignKey("model_versions.id"), comment="The model version that scored it."
    )
    started_at: Mapped[datetime] = mapped_column(index=True, comment="Time at which the window began, UTC.")
    tweets: Mapped[int] = mapped_column(comment="Number of tweets that were scored.")
    buried: Mapped[int] = mapped_column(comment="Number of records that became dead letters.")
    tokens: Mapped[int] = mapped_column(comment="Number of tokens of the tweets, without padding.")
    padded_tokens: Mapped[int] = mapped_column(comment="Number of tokens that the device processed, with padding.")
    read_ms: Mapped[float] = mapped_column(comment="Milliseconds spent reading the records from the stream.")
    tokenise_ms: Mapped[float] = mapped_column(comment="Milliseconds spent cleaning and tokenising the texts.")
    forward_ms: Mapped[float] = mapped_column(comment="Milliseconds spent in the forward passes of the model.")
    store_ms: Mapped[float] = mapped_column(comment="Milliseconds spent writing the rows, without the commit.")
    passed_on: Mapped[int | None] = mapped_column(
        comment="Number of tweets that the student of a cascade passed on to the teacher. NULL for any other model."
    )


class DeadLetter(Base):
    __tablename__ = "dead_letters"
    __table_args__ = (
        {"comment": "One row per record that cannot be scored, byte for byte, until it is retried or dropped."},
    )

    record_id: Mapped[str] = mapped_column(primary_key=True, comment="Id of the record in the stream.")
    payload: Mapped[bytes] = mapped_column(comment="Bytes of the record's field tweet.")
    other_fields: Mapped[list[Any] | None] = mapped_column(
        comment="JSON array: name and value of every field, in order, with null for the payload and base64 for "
        "bytes. NULL when tweet is the only field."
    )
    reason: Mapped[str] = mapped_column(comment="Why the record cannot be scored.")
    attempts: Mapped[int] = mapped_column(comment="How often the record was delivered to a worker.")
    buried_at: Mapped[datetime] = mapped_column(index=True, comment="Time at which it became a dead letter, UTC.")


class WebhookEvent(Base):
    __tablename__ = "webhook_events"
    __table_args__ = (
        Index(None, "delivered_at", "next_attempt_at"),
        {"comment": "One row per event that a webhook is told of, until it is old. Empty without a webhook."},
    )

    id: Mapped[int] = mapped_column(primary_key=True, comment="Id of the event, rising.")
    event_key: Mapped[str] = mapped_column(unique=True, comment="What happened to what, so that an event is told once.")
    kind: Mapped[str] = mapped_column(comment="Kind of the event, such as job.ended or champion.changed.")
    payload: Mapped[dict[str, Any]] = mapped_column(comment="JSON object: what the receiver gets.")
    created_at: Mapped[datetime] = mapped_column(default=utc_now, comment="Time at which it was noticed, UTC.")
    attempts: Mapped[int] = mapped_column(default=0, comment="Number of deliveries that were tried.")
    next_attempt_at: Mapped[datetime] = mapped_column(default=utc_now, comment="Earliest time of the next one, UTC.")
    delivered_at: Mapped[datetime | None] = mapped_column(
        comment="Time at which the receiver accepted it, UTC. NULL until then."
    )
    error: Mapped[str | None] = mapped_column(comment="Why the last delivery failed. NULL when none failed.")


class SchemaCompatibility(Base):
    __tablename__ = "schema_compatibility"
    __table_args__ = ({"comment": "One row: which releases can work with this schema."},)

    oldest_code: Mapped[str] = mapped_column(
        primary_key=True, comment="The newest migration of the oldest release that can work with this schema."
    )
