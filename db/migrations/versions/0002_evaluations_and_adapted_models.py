"""Evaluations on other files, out-of-fold predictions, adapted base models, and the kind of a job.

Only adds, so that releases that need migration 0001 keep working.
"""

from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

Column = sa.Column[Any]

TIME = sa.DateTime(timezone=True).with_variant(sa.String(27), "sqlite")
JSON = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")


def required(name: str, kind: Any, comment: str, **more: Any) -> Column:
    return sa.Column(name, kind, nullable=False, comment=comment, **more)


def optional(name: str, kind: Any, comment: str) -> Column:
    return sa.Column(name, kind, nullable=True, comment=comment)


def create_out_of_fold_predictions() -> None:
    op.create_table(
        "out_of_fold_predictions",
        required("model_version_id", sa.Integer(), "The model version."),
        required("row_number", sa.Integer(), "Number of the row in the dataset."),
        required("fold", sa.Integer(), "Number of the fold, from 1, that the row was held out in."),
        required("text", sa.Text(), "Text of the row, cleaned as the model reads it."),
        required("actual", sa.Text(), "The label in the dataset. Several labels are joined with |."),
        required("predicted", sa.Text(), "The predicted label. Several labels are joined with |."),
        required("probability", sa.Double(), "Calibrated probability of the predicted label, 0 to 1."),
        required("probabilities", JSON, "JSON object: the calibrated probability of every label, 0 to 1."),
        sa.ForeignKeyConstraint(
            ["model_version_id"],
            ["model_versions.id"],
            name="fk_out_of_fold_predictions_model_version_id",
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("model_version_id", "row_number", name="pk_out_of_fold_predictions"),
        comment=(
            "One row per model version and row of its dataset, predicted by a model of the job's cross-validation that "
            "was not trained on the row."
        ),
    )


def create_evaluations() -> None:
    op.create_table(
        "evaluations",
        required("id", sa.Integer(), "Id of the evaluation, rising."),
        required("model_version_id", sa.Integer(), "The model version."),
        required("dataset", sa.Text(), "Name of the labelled file."),
        required("dataset_sha256", sa.Text(), "SHA-256 of the labelled file, in hexadecimal."),
        required("rows", sa.Integer(), "Number of rows that were scored."),
        required("evaluated_at", TIME, "Time of the evaluation, UTC."),
        sa.ForeignKeyConstraint(
            ["model_version_id"], ["model_versions.id"], name="fk_evaluations_model_version_id", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name="pk_evaluations"),
        sa.UniqueConstraint(
            "model_version_id", "dataset_sha256", name="uq_evaluations_model_version_id_dataset_sha256"
        ),
        comment="One row per model version and labelled file that it was evaluated on after its training.",
    )
    op.create_table(
        "evaluation_metrics",
        required("evaluation_id", sa.Integer(), "The evaluation."),
        required("metric", sa.Text(), "Name of the metric. _low and _high: ends of its 95 % interval."),
        required("label", sa.Text(), "The label that was measured. Empty for all rows."),
        required("value", sa.Double(), "The value, in the unit of the metric; most are 0 to 1."),
        sa.ForeignKeyConstraint(
            ["evaluation_id"], ["evaluations.id"], name="fk_evaluation_metrics_evaluation_id", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("evaluation_id", "metric", "label", name="pk_evaluation_metrics"),
        comment="One row per evaluation, metric and label, as in test_metrics.",
    )


def create_base_models() -> None:
    op.create_table(
        "base_models",
        required("id", sa.Integer(), "Id of the adapted base model, rising."),
        required("job_id", sa.Integer(), "The job that adapted it."),
        required("base_model", sa.Text(), "Hub name or folder of the base model that was adapted."),
        optional("base_revision", sa.Text(), "Hub commit of the base model that was adapted. NULL for one without."),
        required("url", sa.Text(), "Path or URL of the folder that holds the adapted base model."),
        required("tweets", sa.Integer(), "Number of stored tweets that it was trained on."),
        required("loss_before", sa.Double(), "Mean masked-language-model loss on held-out tweets before the training."),
        required("loss_after", sa.Double(), "Mean masked-language-model loss on the same tweets after the training."),
        required("created_at", TIME, "Time at which it was registered, UTC."),
        sa.ForeignKeyConstraint(["job_id"], ["training_jobs.id"], name="fk_base_models_job_id"),
        sa.PrimaryKeyConstraint("id", name="pk_base_models"),
        sa.UniqueConstraint("job_id", name="uq_base_models_job_id"),
        comment="One row per base model that a job adapted to stored tweets.",
    )


# --- views

LEADERBOARD_METRICS = (
    *("accuracy", "f1_micro", "f1_macro", "tfidf_f1_macro", "f1_macro_low", "f1_macro_high", "roc_auc", "ece"),
    *("quadratic_kappa", "mean_absolute_error"),
)
EVALUATION_METRICS = ("accuracy", "f1_macro", "f1_macro_low", "f1_macro_high", "ece")


def columns(metrics: tuple[str, ...]) -> str:
    return ", ".join(f"max(CASE WHEN x.metric = '{name}' THEN x.value END) AS {name}" for name in metrics)


JOBS_BEFORE = """
    SELECT j.id, j.state, j.step, j.total_steps, j.loss, j.attempts, j.submitted_at, j.started_at, j.finished_at,
           j.error, m.id AS model_version_id,
           (SELECT max(e.epoch) FROM epoch_metrics AS e WHERE e.job_id = j.id) AS epochs,
           (SELECT max(e.valid_f1_macro) FROM epoch_metrics AS e WHERE e.job_id = j.id) AS best_valid_f1_macro{more}
    FROM training_jobs AS j
    LEFT JOIN model_versions AS m ON m.job_id = j.id"""
LEADERBOARD = """
    SELECT m.id AS model_version_id, m.base_model, m.job_id, m.created_at, {metrics}
    FROM model_versions AS m LEFT JOIN test_metrics AS x ON x.model_version_id = m.id AND x.label = ''
    WHERE m.deleted_at IS NULL GROUP BY m.id, m.base_model, m.job_id, m.created_at"""
EVALUATIONS = f"""
    SELECT e.model_version_id, e.dataset, e.rows, e.evaluated_at, {columns(EVALUATION_METRICS)}
    FROM evaluations AS e LEFT JOIN evaluation_metrics AS x ON x.evaluation_id = e.id AND x.label = ''
    GROUP BY e.id, e.model_version_id, e.dataset, e.rows, e.evaluated_at"""
# Columns are only appended: PostgreSQL then replaces a view and keeps its privileges.
NEW = {
    "v_jobs": JOBS_BEFORE.format(more=", j.kind"),
    "v_model_leaderboard": LEADERBOARD.format(metrics=columns(LEADERBOARD_METRICS)),
}
OLD = {
    "v_jobs": JOBS_BEFORE.format(more=""),
    "v_model_leaderboard": LEADERBOARD.format(metrics=columns(LEADERBOARD_METRICS[:-2])),
}
# The comments of the columns that 0001 has not described.
COMMENTS = (
    ("COLUMN v_jobs.kind", "What the job makes: train a model version, adapt a base model."),
    ("COLUMN v_model_leaderboard.quadratic_kappa", "Quadratic weighted kappa, -1 to 1. Ordinal labels only."),
    (
        "COLUMN v_model_leaderboard.mean_absolute_error",
        "Mean absolute error: of ordinal labels in their numbers, or else in steps; of continuous targets.",
    ),
    (
        "VIEW v_model_evaluations",
        "One row per model version and labelled file that it was evaluated on after its training.",
    ),
    ("COLUMN v_model_evaluations.model_version_id", "The model version."),
    ("COLUMN v_model_evaluations.dataset", "Name of the labelled file."),
    ("COLUMN v_model_evaluations.rows", "Number of rows that were scored."),
    ("COLUMN v_model_evaluations.evaluated_at", "Time of the evaluation, UTC."),
    ("COLUMN v_model_evaluations.accuracy", "Accuracy, 0 to 1."),
    ("COLUMN v_model_evaluations.f1_macro", "Macro-F1, 0 to 1."),
    ("COLUMN v_model_evaluations.f1_macro_low", "Lower end of the 95 % bootstrap interval of f1_macro."),
    ("COLUMN v_model_evaluations.f1_macro_high", "Upper end of the 95 % bootstrap interval of f1_macro."),
    (
        "COLUMN v_model_evaluations.ece",
        "Expected calibration error over 15 bins after temperature scaling, 0 to 1.",
    ),
)

# The new comments of columns that 0001 has described, and the comments before. The columns of a view have their own.
LABEL_BEFORE = "The predicted label. A multi-label model joins all labels of probability 0.5 or more with |."
PROBABILITIES_BEFORE = "JSON object: the calibrated probability of every label, 0 to 1."
VIEWS_WITH_LABEL = (
    *("v_predictions_current", "v_low_confidence", "v_sentiment_hourly", "v_sentiment_daily_jst"),
    "v_topic_sentiment",
)
CHANGED_COMMENTS = (
    *(
        (f"COLUMN {table}.label", LABEL_BEFORE, f"{LABEL_BEFORE} The label of a continuous model is value.")
        for table in ("predictions", *VIEWS_WITH_LABEL)
    ),
    *(
        (
            f"COLUMN {table}.probabilities",
            PROBABILITIES_BEFORE,
            f"{PROBABILITIES_BEFORE} Of a continuous model: the number that it predicts, named value.",
        )
        for table in ("predictions", "v_low_confidence")
    ),
    (
        "COLUMN epoch_metrics.valid_accuracy",
        "Accuracy on the validation rows, 0 to 1.",
        "Accuracy on the validation rows, 0 to 1. Of a continuous task: R2, at least 0.",
    ),
    (
        "COLUMN epoch_metrics.valid_f1_macro",
        "Macro-F1 on the validation rows, 0 to 1.",
        "Macro-F1 on the validation rows, 0 to 1. Of a continuous task: D2, the share of the absolute error around the "
        "median that the model removes, at least 0.",
    ),
)


def quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def upgrade() -> None:
    op.add_column(
        "training_jobs",
        required(
            "kind",
            sa.Text(),
            "What the job makes: train a model version, adapt a base model.",
            server_default="train",
        ),
    )
    create_out_of_fold_predictions()
    create_evaluations()
    create_base_models()
    on_postgresql = op.get_bind().dialect.name == "postgresql"
    for name, body in NEW.items():
        if not on_postgresql:
            op.execute(f"DROP VIEW {name}")
        op.execute(f"CREATE {'OR REPLACE ' if on_postgresql else ''}VIEW {name} AS {body}")
    op.execute(f"CREATE VIEW v_model_evaluations AS {EVALUATIONS}")
    if on_postgresql:
        for target, text in (*COMMENTS, *((target, now) for target, _, now in CHANGED_COMMENTS)):
            op.execute(f"COMMENT ON {target} IS {quoted(text)}")


def downgrade() -> None:
    op.execute("DROP VIEW v_model_evaluations")
    for name, body in OLD.items():
        op.execute(f"DROP VIEW {name}")
        op.execute(f"CREATE VIEW {name} AS {body}")
    for table in ("base_models", "evaluation_metrics", "evaluations", "out_of_fold_predictions"):
        op.drop_table(table)
    op.drop_column("training_jobs", "kind")
    if op.get_bind().dialect.name == "postgresql":
        for target, before, _ in CHANGED_COMMENTS:
            op.execute(f"COMMENT ON {target} IS {quoted(before)}")
