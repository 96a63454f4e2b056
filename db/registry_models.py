"""The tables of the model registry: model versions, cascades, aliases, test results, evaluations and base models."""

from datetime import datetime
from typing import Any

from sqlalchemy import ForeignKey, Index, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from db.base import Base, utc_now


class ModelVersion(Base):
    """A deleted version has no artifact; its row stays as long as other rows refer to it."""

    __tablename__ = "model_versions"
    __table_args__ = ({"comment": "One row per trained model: its artifact, labels and calibration."},)

    id: Mapped[int] = mapped_column(primary_key=True, comment="Id of the model version, rising.")
    job_id: Mapped[int | None] = mapped_column(
        ForeignKey("training_jobs.id"), unique=True, comment="The job that trained it. NULL when no job did."
    )
    base_model: Mapped[str] = mapped_column(comment="Hub name or folder of the base model that was fine-tuned.")
    base_revision: Mapped[str | None] = mapped_column(
        comment="Hub commit of the base model. NULL for a base model without one."
    )
    artifact_url: Mapped[str] = mapped_column(comment="URL of the folder that holds the artifact.")
    sha256: Mapped[str] = mapped_column(
        comment="SHA-256 of the artifact's list of file digests, in hexadecimal; checked whenever it is loaded."
    )
    labels: Mapped[list[str]] = mapped_column(comment="JSON array: the labels, in the order of the model's outputs.")
    cleaner_version: Mapped[str] = mapped_column(
        comment="Version of the text cleaning that the model was trained with."
    )
    temperature: Mapped[float] = mapped_column(
        default=1.0, comment="Divisor of the logits that calibrates the probabilities, above 0."
    )
    created_at: Mapped[datetime] = mapped_column(default=utc_now, comment="Time at which it was registered, UTC.")
    deleted_at: Mapped[datetime | None] = mapped_column(
        comment="Time at which it was deleted, UTC. NULL for a usable version."
    )


class Cascade(Base):
    """The threshold and the parts are also in the artifact, which workers load."""

    __tablename__ = "cascades"
    __table_args__ = (
        {"comment": "One row per model version that is a cascade: its student, its teacher and its threshold."},
    )

    model_version_id: Mapped[int] = mapped_column(
        ForeignKey("model_versions.id"), primary_key=True, comment="The cascade."
    )
    student_id: Mapped[int] = mapped_column(
        ForeignKey("model_versions.id"), comment="The model version that scores every tweet."
    )
    teacher_id: Mapped[int] = mapped_column(
        ForeignKey("model_versions.id"), comment="The model version that scores the tweets that are passed on."
    )
    threshold: Mapped[float] = mapped_column(
        comment="A tweet is passed on when the student's probability of its label is below it, 0 to 1."
    )
    planned_share: Mapped[float] = mapped_column(
        comment="Share of the rows it was chosen on that are passed on, 0 to 1."
    )
    keep: Mapped[float] = mapped_column(comment="Share of the teacher's macro-F1 that the cascade was to keep, 0 to 1.")
    bound: Mapped[str] = mapped_column(
        comment="What had to be at least keep: bootstrap, the lower 5 % bound of the share, or estimate."
    )
    rows: Mapped[int] = mapped_column(comment="Number of labelled rows it was chosen on.")
    curve: Mapped[list[Any]] = mapped_column(
        comment="JSON array of objects: threshold, share passed on, macro-F1, and its ratio to the teacher's with the "
        "lower 5 % bound, by rising share."
    )


class ModelAlias(Base):
    __tablename__ = "model_aliases"
    __table_args__ = (
        Index(None, "alias", "id"),
        {"comment": "One row per assignment of an alias to a model version. The newest row of an alias counts."},
    )

    id: Mapped[int] = mapped_column(primary_key=True, comment="Id of the assignment, rising with time.")
    alias: Mapped[str] = mapped_column(comment="champion, whose predictions the views show, or challenger.")
    model_version_id: Mapped[int] = mapped_column(
        ForeignKey("model_versions.id"), comment="The model version that the alias points to from then on."
    )
    assigned_at: Mapped[datetime] = mapped_column(default=utc_now, comment="Time of the assignment, UTC.")


class TestMetric(Base):
    __tablename__ = "test_metrics"
    __table_args__ = ({"comment": "One row per model version, metric and label, measured on the test split."},)
    __test__ = False  # keeps pytest from collecting the class

    model_version_id: Mapped[int] = mapped_column(
        ForeignKey("model_versions.id", ondelete="CASCADE"), primary_key=True, comment="The model version."
    )
    metric: Mapped[str] = mapped_column(
        primary_key=True,
        comment="Name of the metric. _low and _high: ends of its 95 % interval. tfidf_ and majority_: of a baseline.",
    )
    label: Mapped[str] = mapped_column(
        primary_key=True, default="", comment="The label that was measured. Empty for the whole test split."
    )
    value: Mapped[float] = mapped_column(comment="The value, in the unit of the metric; most are 0 to 1.")


class ConfusionCell(Base):
    __tablename__ = "confusion_cells"
    __table_args__ = ({"comment": "One row per cell of a model version's confusion matrix on the test split."},)

    model_version_id: Mapped[int] = mapped_column(
        ForeignKey("model_versions.id", ondelete="CASCADE"), primary_key=True, comment="The model version."
    )
    actual: Mapped[str] = mapped_column(primary_key=True, comment="The label in the dataset.")
    predicted: Mapped[str] = mapped_column(primary_key=True, comment="The label that the model predicted.")
    count: Mapped[int] = mapped_column(comment="Number of test rows.")


class TestPrediction(Base):
    __tablename__ = "test_predictions"
    __table_args__ = ({"comment": "One row per model version and test row, for error analysis."},)
    __test__ = False

    model_version_id: Mapped[int] = mapped_column(
        ForeignKey("model_versions.id", ondelete="CASCADE"), primary_key=True, comment="The model version."
    )
    row_number: Mapped[int] = mapped_column(primary_key=True, comment="Number of the row in the dataset.")
    text: Mapped[str] = mapped_column(comment="Text of the row, cleaned as the model reads it.")
    actual: Mapped[str] = mapped_column(comment="The label in the dataset. Several labels are joined with |.")
    predicted: Mapped[str] = mapped_column(
        comment="The label that the model predicted. Several labels are joined with |."
    )
    probability: Mapped[float] = mapped_column(comment="Calibrated probability of the predicted label, 0 to 1.")
    probabilities: Mapped[dict[str, Any]] = mapped_column(
        comment="JSON object: the calibrated probability of every label, 0 to 1."
    )
    unknown_share: Mapped[float | None] = mapped_column(
        comment="Share of the text's tokens that the model does not know, 0 to 1. NULL for rows of releases before 0.2."
    )


class OutOfFoldPrediction(Base):
    __tablename__ = "out_of_fold_predictions"
    __table_args__ = (
        {
            "comment": "One row per model version and row of its dataset, predicted by a model of the job's "
            "cross-validation that was not trained on the row."
        },
    )

    model_version_id: Mapped[int] = mapped_column(
        ForeignKey("model_versions.id", ondelete="CASCADE"), primary_key=True, comment="The model version."
    )
    row_number: Mapped[int] = mapped_column(primary_key=True, comment="Number of the row in the dataset.")
    fold: Mapped[int] = mapped_column(comment="Number of the fold, from 1, that the row was held out in.")
    text: Mapped[str] = mapped_column(comment="Text of the row, cleaned as the model reads it.")
    actual: Mapped[str] = mapped_column(comment="The label in the dataset. Several labels are joined with |.")
    predicted: Mapped[str] = mapped_column(comment="The predicted label. Several labels are joined with |.")
    probability: Mapped[float] = mapped_column(comment="Calibrated probability of the predicted label, 0 to 1.")
    probabilities: Mapped[dict[str, Any]] = mapped_column(
        comment="JSON object: the calibrated probability of every label, 0 to 1."
    )


class Evaluation(Base):
    __tablename__ = "evaluations"
    __table_args__ = (
        UniqueConstraint("model_version_id", "dataset_sha256"),
        {"comment": "One row per model version and labelled file that it was evaluated on after its training."},
    )

    id: Mapped[int] = mapped_column(primary_key=True, comment="Id of the evaluation, rising.")
    model_version_id: Mapped[int] = mapped_column(
        ForeignKey("model_versions.id", ondelete="CASCADE"), comment="The model version."
    )
    dataset: Mapped[str] = mapped_column(comment="Name of the labelled file.")
    dataset_sha256: Mapped[str] = mapped_column(comment="SHA-256 of the labelled file, in hexadecimal.")
    rows: Mapped[int] = mapped_column(comment="Number of rows that were scored.")
    evaluated_at: Mapped[datetime] = mapped_column(default=utc_now, comment="Time of the evaluation, UTC.")


class EvaluationMetric(Base):
    __tablename__ = "evaluation_metrics"
    __table_args__ = ({"comment": "One row per evaluation, metric and label, as in test_metrics."},)

    evaluation_id: Mapped[int] = mapped_column(
        ForeignKey("evaluations.id", ondelete="CASCADE"), primary_key=True, comment="The evaluation."
    )
    metric: Mapped[str] = mapped_column(
        primary_key=True, comment="Name of the metric. _low and _high: ends of its 95 % interval."
    )
    label: Mapped[str] = mapped_column(
        primary_key=True, default="", comment="The label that was measured. Empty for all rows."
    )
    value: Mapped[float] = mapped_column(comment="The value, in the unit of the metric; most are 0 to 1.")


class BaseModel(Base):
    """Training jobs name an adapted base model `adapted:ID`."""

    __tablename__ = "base_models"
    __table_args__ = ({"comment": "One row per base model that a job adapted to stored tweets."},)

    id: Mapped[int] = mapped_column(primary_key=True, comment="Id of the adapted base model, rising.")
    job_id: Mapped[int] = mapped_column(ForeignKey("training_jobs.id"), unique=True, comment="The job that adapted it.")
    base_model: Mapped[str] = mapped_column(comment="Hub name or folder of the base model that was adapted.")
    base_revision: Mapped[str | None] = mapped_column(
        comment="Hub commit of the base model that was adapted. NULL for one without."
    )
    url: Mapped[str] = mapped_column(comment="Path or URL of the folder that holds the adapted base model.")
    tweets: Mapped[int] = mapped_column(comment="Number of stored tweets that it was trained on.")
    loss_before: Mapped[float] = mapped_column(
        comment="Mean masked-language-model loss on held-out tweets before the training."
    )
    loss_after: Mapped[float] = mapped_column(
        comment="Mean masked-language-model loss on the same tweets after the training."
    )
    created_at: Mapped[datetime] = mapped_column(default=utc_now, comment="Time at which it was registered, UTC.")
