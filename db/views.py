"""Descriptions of the views for analysts. Migrations hold the SQL of the views and a frozen copy of this text."""

from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement
from sqlalchemy.dialects import postgresql

from db.models import Base, Evaluation, Label, ModelVersion, Prediction, TrainingJob, Tweet


@dataclass(frozen=True)
class ViewColumn:
    """`type` is the PostgreSQL type, as `information_schema.columns` names it."""

    name: str
    type: str
    comment: str


@dataclass(frozen=True)
class View:
    name: str
    comment: str
    columns: tuple[ViewColumn, ...]


def _from_table(table: type[Base], *names: str) -> tuple[ViewColumn, ...]:
    """Columns that a view takes unchanged from a table."""
    columns = [table.__table__.c[name] for name in names]
    return tuple(ViewColumn(column.name, sql_type(column), column.comment or "") for column in columns)


def sql_type(column: ColumnElement[Any]) -> str:
    """The PostgreSQL type of a table's column, in small letters."""
    compiled = column.type.compile(dialect=postgresql.dialect())  # type: ignore[no-untyped-call]
    compiled = compiled.partition(" COLLATE")[0]
    return {"FLOAT": "double precision"}.get(compiled, compiled.lower())


def _fraction(name: str, comment: str) -> ViewColumn:
    return ViewColumn(name, "double precision", comment)


LABEL = _from_table(Prediction, "label")
SUMS = (
    ViewColumn("tweets", "bigint", "Number of tweets with this label."),
    _fraction("mean_probability", "Mean probability of their predictions, 0 to 1."),
    _fraction("mean_score", "Mean score_signed of their predictions, -1 to 1. NULL when no label has a polarity."),
)
ACCURACY = _fraction("accuracy", "Accuracy, 0 to 1.")
F1_MACRO = (
    _fraction("f1_macro", "Macro-F1, 0 to 1."),
    _fraction("f1_macro_low", "Lower end of the 95 % bootstrap interval of f1_macro."),
    _fraction("f1_macro_high", "Upper end of the 95 % bootstrap interval of f1_macro."),
)
ECE = _fraction("ece", "Expected calibration error over 15 bins after temperature scaling, 0 to 1.")

VIEWS = (
    View(
        "v_predictions_current",
        "One row per tweet that the current champion has scored, with its prediction.",
        _from_table(Tweet, "tweet_id", "text", "author_id", "lang", "topic", "tweet_created_at", "received_at")
        + _from_table(Prediction, "model_version_id", "label", "probability", "score_signed", "scored_at"),
    ),
    View(
        "v_low_confidence",
        "Tweets for which the current champion's probability is below 0.6: candidates for labelling.",
        _from_table(Tweet, "tweet_id", "text", "topic")
        + _from_table(Prediction, "label", "probability", "probabilities", "scored_at"),
    ),
    View(
        "v_sentiment_hourly",
        "Counts and means of the current champion's predictions by hour (UTC) and label.",
        (
            ViewColumn(
                "hour_utc",
                "timestamp with time zone",
                "Start of the hour, UTC, in which the tweets were written, or else received.",
            ),
            *LABEL,
            *SUMS,
        ),
    ),
    View(
        "v_sentiment_daily_jst",
        "Counts and means of the current champion's predictions by day in Japan and label.",
        (
            ViewColumn("day_jst", "date", "Day in Japan (UTC+9) on which the tweets were written, or else received."),
            *LABEL,
            *SUMS,
        ),
    ),
    View(
        "v_topic_sentiment",
        "Counts and means of the current champion's predictions by topic and label.",
        (
            ViewColumn("topic", "text", "Topic of the tweets. NULL for tweets without one."),
            *LABEL,
            *SUMS,
            _fraction("share", "Share of the topic's tweets that have this label, 0 to 1."),
        ),
    ),
    View(
        "v_model_leaderboard",
        "One row per model version that is not deleted, with its metrics on the test split. NULL: not measured.",
        (
            ViewColumn("model_version_id", "integer", "Id of the model version."),
            *_from_table(ModelVersion, "base_model", "job_id", "created_at"),
            ACCURACY,
            _fraction("f1_micro", "Micro-F1, 0 to 1."),
            F1_MACRO[0],
            _fraction("tfidf_f1_macro", "Macro-F1 of TF-IDF with logistic regression on the same rows, 0 to 1."),
            *F1_MACRO[1:],
            _fraction("roc_auc", "Area under the ROC curve, mean over the labels, 0 to 1."),
            ECE,
            _fraction("quadratic_kappa", "Quadratic weighted kappa, -1 to 1. Ordinal labels only."),
            _fraction(
                "mean_absolute_error",
                "Mean absolute error: of ordinal labels in their numbers, or else in steps; of continuous targets.",
            ),
        ),
    ),
    View(
        "v_model_evaluations",
        "One row per model version and labelled file that it was evaluated on after its training.",
        (
            *_from_table(Evaluation, "model_version_id", "dataset", "rows", "evaluated_at"),
            ACCURACY,
            *F1_MACRO,
            ECE,
        ),
    ),
    View(
        "v_jobs",
        "One row per training job, with its progress and the model version that it made.",
        (
            *_from_table(
                TrainingJob,
                *("id", "state", "step", "total_steps", "loss", "attempts", "submitted_at", "started_at"),
                *("finished_at", "error"),
            ),
            ViewColumn("model_version_id", "integer", "The model version that the job made. NULL when it made none."),
            ViewColumn("epochs", "integer", "Number of the last finished epoch. NULL before the first one."),
            _fraction(
                "best_valid_f1_macro",
                "Best macro-F1 on the validation rows, 0 to 1. NULL before the first epoch.",
            ),
            *_from_table(TrainingJob, "kind"),
        ),
    ),
    View(
        "v_labels",
        "One row per tweet that people labelled, with the label that most annotators gave it.",
        (
            *_from_table(Label, "tweet_id"),
            ViewColumn("label", "text", "The label that most annotators gave; among equals the newest."),
            ViewColumn("annotators", "bigint", "Number of annotators that labelled the tweet."),
            ViewColumn("agreeing", "bigint", "Number of annotators that gave this label."),
            ViewColumn("labelled_at", "timestamp with time zone", "Time of the newest of these labels, UTC."),
        ),
    ),
    View(
        "v_live_quality",
        "How right the current champion is on tweets of the last 7 and 30 days, by the labels of tweets that "
        "were picked at random. Empty for a multi-label or continuous champion.",
        (
            ViewColumn("model_version_id", "integer", "The champion."),
            ViewColumn("days", "integer", "Length of the period in days of arrival (UTC), today's included: 7 or 30."),
            ViewColumn(
                "labels",
                "bigint",
                "Number of tweets that the champion scored and people labelled, and that were picked at random. "
                "Other picks do not count: they are not typical. Nor do labels that it may have been trained on.",
            ),
            ViewColumn("tweets", "bigint", "Number of tweets of the period that the champion scored."),
            ViewColumn(
                "covered_tweets",
                "bigint",
                "Number of these tweets that arrived on days with labels. The figures of labels describe only them.",
            ),
            _fraction(
                "accuracy",
                "Accuracy on the labelled tweets, 0 to 1. Each label has the weight of its day: tweets by labels. "
                "NULL without labels.",
            ),
            _fraction("accuracy_low", "Lower end of the 95 % Wilson interval of accuracy, from effective_labels."),
            _fraction("accuracy_high", "Upper end of the 95 % Wilson interval of accuracy, from effective_labels."),
            _fraction(
                "effective_labels",
                "Number of equally weighted labels that would be as precise (Kish): at most labels. NULL without "
                "labels.",
            ),
            _fraction(
                "f1_macro", "Macro-F1 over the labels that occur, weighted as accuracy, 0 to 1. NULL without labels."
            ),
            _fraction(
                "expected_accuracy",
                "Mean probability of all predictions of the period, 0 to 1: the accuracy if the probabilities are "
                "right.",
            ),
            _fraction("test_accuracy", "Accuracy on the test rows, 0 to 1. NULL when it was not measured."),
            ViewColumn(
                "labels_needed",
                "bigint",
                "Number of labels of the period with which the interval of accuracy would be plus or minus 3 points.",
            ),
        ),
    ),
    View(
        "v_drift",
        "How the tweets of a day differ from the test rows of the current champion, for the last 90 days. A "
        "population stability index (PSI) below 0.1 is little, above 0.25 much. An empty bin counts as half a "
        "row.",
        (
            ViewColumn("model_version_id", "integer", "The champion."),
            ViewColumn("day", "date", "Day of arrival, UTC."),
            ViewColumn(
                "tweets",
                "bigint",
                "Number of tweets of the day that the champion scored. Chance alone makes the PSI of few tweets large.",
            ),
            _fraction(
                "expected_accuracy",
                "Mean probability of the predictions, 0 to 1. NULL for a multi-label or continuous champion.",
            ),
            _fraction(
                "test_expected_accuracy",
                "Mean probability of the test rows' predictions, 0 to 1. NULL where expected_accuracy is, and "
                "without test rows.",
            ),
            _fraction(
                "psi_labels", "PSI of the predicted labels. NULL where expected_accuracy is, and without test rows."
            ),
            _fraction(
                "psi_length",
                "PSI of the length in characters, in the bins 0-9, 10-19, 20-39, 40-79, 80-139 and 140 or more. Of a "
                "tweet, 24 are taken off per link and 12 per mention, which cleaning removes. NULL without test "
                "rows.",
            ),
            _fraction(
                "psi_unknown",
                "PSI of the share of unknown tokens, in the bins 0, to 2 %, to 5 %, to 10 % and above. NULL without "
                "rows that have the share, which releases before 0.2 did not write.",
            ),
        ),
    ),
)
