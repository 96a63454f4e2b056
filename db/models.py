"""The schema: one class a table. Knows nothing of queries, sessions or who writes what.

All times are aware and UTC. PostgreSQL stores them as timestamptz, SQLite as ISO-8601 text with a Z, so that
text order is time order and SQLite's date functions read them as they are.
"""

from datetime import UTC, datetime
from typing import Any, ClassVar

from sqlalchemy import (
    JSON,
    CheckConstraint,
    DateTime,
    Dialect,
    ForeignKey,
    Index,
    LargeBinary,
    MetaData,
    String,
    Text,
    true,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.types import TypeDecorator

JOB_STATES = ("queued", "running", "succeeded", "failed", "cancelled")
FINISHED_STATES = ("succeeded", "failed", "cancelled")


def utc_now() -> datetime:
    return datetime.now(UTC)


class UtcDateTime(TypeDecorator[datetime]):
    """An aware datetime in UTC; a naive one raises `ValueError` when it is bound."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> Any:
        return dialect.type_descriptor(String(27) if dialect.name == "sqlite" else DateTime(timezone=True))

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> Any:
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError(f"{value!r} has no time zone; use an aware datetime in UTC")
        value = value.astimezone(UTC)
        return value.isoformat(timespec="microseconds")[: -len("+00:00")] + "Z" if dialect.name == "sqlite" else value

    def process_result_value(self, value: Any, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return datetime.fromisoformat(value) if isinstance(value, str) else value.astimezone(UTC)


# JSONB compares and indexes; SQLite keeps JSON as text. What is not there is NULL, as in every other column.
Json = JSON(none_as_null=True).with_variant(JSONB(none_as_null=True), "postgresql")


class Base(DeclarativeBase):
    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map: ClassVar[dict[Any, Any]] = {
        datetime: UtcDateTime,
        dict[str, Any]: Json,
        list[str]: Json,
        list[Any]: Json,
        str: Text,
        bytes: LargeBinary,
    }


class Tweet(Base):
    """A tweet as it came. Ids are text: they pass 2^53, where JSON readers start to round."""

    __tablename__ = "tweets"

    tweet_id: Mapped[str] = mapped_column(primary_key=True)
    text: Mapped[str]
    author_id: Mapped[str | None]
    lang: Mapped[str | None]
    topic: Mapped[str | None]
    tweet_created_at: Mapped[datetime | None]
    received_at: Mapped[datetime] = mapped_column(index=True)
    retweeted_id: Mapped[str | None]
    quoted_id: Mapped[str | None]
    replied_to_id: Mapped[str | None]


class Prediction(Base):
    """What one model version says of one tweet. The key makes a replay an upsert that changes nothing."""

    __tablename__ = "predictions"
    __table_args__ = (
        Index(None, "model_version_id", "scored_at"),
        Index(
            None, "model_version_id", "probability", "label"
        ),  # alone answers which are unsure, and how many have which label
    )

    tweet_id: Mapped[str] = mapped_column(ForeignKey("tweets.tweet_id", ondelete="CASCADE"), primary_key=True)
    model_version_id: Mapped[int] = mapped_column(ForeignKey("model_versions.id"), primary_key=True)
    label: Mapped[str]
    probability: Mapped[float]
    score_signed: Mapped[float | None]
    probabilities: Mapped[dict[str, Any]]
    scored_at: Mapped[datetime]


class SentimentRollup(Base):
    """Sums of predictions by hour (UTC), topic (empty for none) and label, which triggers keep as predictions come and
    go. A key's rows are added up: in PostgreSQL every connection has its own `shard`, so that workers never wait, until
    a worker's housekeeping adds it to shard 0."""

    __tablename__ = "sentiment_rollup"

    model_version_id: Mapped[int] = mapped_column(ForeignKey("model_versions.id"), primary_key=True)
    hour: Mapped[datetime] = mapped_column(primary_key=True)
    topic: Mapped[str] = mapped_column(primary_key=True)
    label: Mapped[str] = mapped_column(primary_key=True)
    shard: Mapped[int] = mapped_column(primary_key=True)
    tweets: Mapped[int]
    probability_sum: Mapped[float]
    score_sum: Mapped[float]
    with_score: Mapped[int]


class TrainingJob(Base):
    """A request to train. The row is the truth; whoever holds the newest fencing token may write it."""

    __tablename__ = "training_jobs"
    __table_args__ = (
        CheckConstraint(f"state IN ({', '.join(map(repr, JOB_STATES))})", name="state"),
        Index(None, "state", "lease_expires_at"),
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    request_id: Mapped[str] = mapped_column(unique=True)
    state: Mapped[str] = mapped_column(default="queued")
    config: Mapped[dict[str, Any]]
    dataset: Mapped[str]
    dataset_sha256: Mapped[str | None]
    lease_owner: Mapped[str | None]
    lease_expires_at: Mapped[datetime | None]
    fencing_token: Mapped[int] = mapped_column(default=0)
    attempts: Mapped[int] = mapped_column(default=0)
    cancel_requested: Mapped[bool] = mapped_column(default=False)
    step: Mapped[int] = mapped_column(default=0)
    total_steps: Mapped[int | None]
    loss: Mapped[float | None]
    samples_per_second: Mapped[float | None]
    submitted_at: Mapped[datetime] = mapped_column(default=utc_now)
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]
    error: Mapped[str | None]
    data_report: Mapped[dict[str, Any] | None]
    # The Celery message that asked for this job, until its sender was told the outcome; then NULL.
    message: Mapped[str | None]
    answer_due_at: Mapped[datetime | None]


class EpochMetric(Base):
    __tablename__ = "epoch_metrics"

    job_id: Mapped[int] = mapped_column(ForeignKey("training_jobs.id", ondelete="CASCADE"), primary_key=True)
    epoch: Mapped[int] = mapped_column(primary_key=True)
    train_loss: Mapped[float]
    learning_rate: Mapped[float]
    valid_loss: Mapped[float]
    valid_accuracy: Mapped[float]
    valid_f1_macro: Mapped[float]
    seconds: Mapped[float]
    kept: Mapped[bool] = mapped_column(default=True, server_default=true())


class ModelVersion(Base):
    """A trained model: where its artifact lies, and the digest that proves it whole.

    One that was deleted has no artifact any more; its row stays for as long as others speak of it.
    """

    __tablename__ = "model_versions"

    id: Mapped[int] = mapped_column(primary_key=True)
    job_id: Mapped[int | None] = mapped_column(ForeignKey("training_jobs.id"), unique=True)
    base_model: Mapped[str]
    base_revision: Mapped[str | None]
    artifact_url: Mapped[str]
    sha256: Mapped[str]
    labels: Mapped[list[str]]
    cleaner_version: Mapped[str]
    temperature: Mapped[float] = mapped_column(default=1.0)
    created_at: Mapped[datetime] = mapped_column(default=utc_now)
    deleted_at: Mapped[datetime | None]


class ModelAlias(Base):
    """Every assignment of `champion` or `challenger`, in order; the newest row of an alias counts."""

    __tablename__ = "model_aliases"
    __table_args__ = (Index(None, "alias", "id"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    alias: Mapped[str]
    model_version_id: Mapped[int] = mapped_column(ForeignKey("model_versions.id"))
    assigned_at: Mapped[datetime] = mapped_column(default=utc_now)


class TestMetric(Base):
    """Long form: one row a figure. `label` is empty where the figure is of the whole test split."""

    __tablename__ = "test_metrics"
    __test__ = False  # not a test class, whatever its name makes pytest think

    model_version_id: Mapped[int] = mapped_column(ForeignKey("model_versions.id", ondelete="CASCADE"), primary_key=True)
    metric: Mapped[str] = mapped_column(primary_key=True)
    label: Mapped[str] = mapped_column(primary_key=True, default="")
    value: Mapped[float]


class ConfusionCell(Base):
    __tablename__ = "confusion_cells"

    model_version_id: Mapped[int] = mapped_column(ForeignKey("model_versions.id", ondelete="CASCADE"), primary_key=True)
    actual: Mapped[str] = mapped_column(primary_key=True)
    predicted: Mapped[str] = mapped_column(primary_key=True)
    count: Mapped[int]


class TestPrediction(Base):
    """One test row and what the model said of it, for error analysis. `row_number` is the line in the dataset."""

    __tablename__ = "test_predictions"
    __test__ = False

    model_version_id: Mapped[int] = mapped_column(ForeignKey("model_versions.id", ondelete="CASCADE"), primary_key=True)
    row_number: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str]
    actual: Mapped[str]
    predicted: Mapped[str]
    probability: Mapped[float]
    probabilities: Mapped[dict[str, Any]]


class ScoringWindow(Base):
    """One window of one worker: what it held and where its milliseconds went."""

    __tablename__ = "scoring_windows"

    id: Mapped[int] = mapped_column(primary_key=True)
    worker: Mapped[str]
    model_version_id: Mapped[int] = mapped_column(ForeignKey("model_versions.id"))
    started_at: Mapped[datetime] = mapped_column(index=True)
    tweets: Mapped[int]
    buried: Mapped[int]
    tokens: Mapped[int]
    padded_tokens: Mapped[int]
    read_ms: Mapped[float]
    tokenise_ms: Mapped[float]
    forward_ms: Mapped[float]
    store_ms: Mapped[float]


class DeadLetter(Base):
    """A record that cannot be scored, byte for byte as it came, and why.

    `payload` is its field `tweet`. `other_fields` is empty when it had no other; else all of its fields in order, as
    pairs of name and value, with null for the value of `tweet` and base64 for what is no text.
    """

    __tablename__ = "dead_letters"

    record_id: Mapped[str] = mapped_column(primary_key=True)
    payload: Mapped[bytes]
    other_fields: Mapped[list[Any] | None]
    reason: Mapped[str]
    attempts: Mapped[int]
    buried_at: Mapped[datetime] = mapped_column(index=True)


class SchemaCompatibility(Base):
    """One row: the oldest code, by its newest migration, that may work with this schema."""

    __tablename__ = "schema_compatibility"

    oldest_code: Mapped[str] = mapped_column(primary_key=True)
