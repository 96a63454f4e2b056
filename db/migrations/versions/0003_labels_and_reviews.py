"""Labels of stored tweets, tweets picked for review, webhook events, and the share of unknown tokens.

Only adds, so that releases that need migration 0001 keep working.
"""

from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

Column = sa.Column[Any]

TIME = sa.DateTime(timezone=True).with_variant(sa.String(27), "sqlite")
JSON = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")
UNKNOWN_SHARE = "Share of the text's tokens that the model does not know, 0 to 1. NULL for rows of releases before 0.2."
LABELS_UNTIL = (
    "Labels of stored tweets that were given until then may be among its rows, UTC. NULL for a job without them."
)


def required(name: str, kind: Any, comment: str, **more: Any) -> Column:
    return sa.Column(name, kind, nullable=False, comment=comment, **more)


def optional(name: str, kind: Any, comment: str) -> Column:
    return sa.Column(name, kind, nullable=True, comment=comment)


def create_labels() -> None:
    op.create_table(
        "labels",
        required("id", sa.Integer(), "Id of the label, rising."),
        required("tweet_id", sa.Text(), "The tweet that was labelled."),
        required("label", sa.Text(), "The label. Several labels of a multi-label task are joined with |."),
        required("annotator", sa.Text(), "Name of the person, or of the model, that gave the label."),
        required(
            "source", sa.Text(), "Where it comes from: review, import, or model for labels that a model proposed."
        ),
        required("at", TIME, "Time at which the label was given, UTC."),
        sa.CheckConstraint("source IN ('review', 'import', 'model')", name=op.f("ck_labels_source")),
        sa.ForeignKeyConstraint(["tweet_id"], ["tweets.tweet_id"], name="fk_labels_tweet_id", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name="pk_labels"),
        comment="One row per label that an annotator gave to a tweet. The newest of a tweet and annotator counts.",
    )
    op.create_index("ix_labels_tweet_id_annotator", "labels", ["tweet_id", "annotator"])
    op.create_index("ix_labels_at", "labels", ["at"])


def create_reviews() -> None:
    op.create_table(
        "review_tweets",
        required("tweet_id", sa.Text(), "The tweet that was picked."),
        required(
            "reason",
            sa.Text(),
            "Why it was picked: random, uncertain, disagreement (of champion and challenger) or spread.",
        ),
        required("readers", sa.Integer(), "Number of annotators that are to label it: 1, or 2 for a tenth."),
        required("place", sa.Integer(), "Order in which the tweets of all picks are asked, rising."),
        required("model_version_id", sa.Integer(), "The champion whose predictions it was picked by."),
        required("picked_at", TIME, "Time at which it was picked, UTC."),
        sa.CheckConstraint(
            "reason IN ('random', 'uncertain', 'disagreement', 'spread')", name=op.f("ck_review_tweets_reason")
        ),
        sa.ForeignKeyConstraint(
            ["tweet_id"], ["tweets.tweet_id"], name="fk_review_tweets_tweet_id", ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(["model_version_id"], ["model_versions.id"], name="fk_review_tweets_model_version_id"),
        sa.PrimaryKeyConstraint("tweet_id", name="pk_review_tweets"),
        comment="One row per tweet that was picked to be labelled.",
    )
    op.create_table(
        "review_asks",
        required("tweet_id", sa.Text(), "The picked tweet."),
        required("annotator", sa.Text(), "Name of the annotator."),
        required("state", sa.Text(), "State of the question: asked, labelled or skipped."),
        required("at", TIME, "Time of that state, UTC. A question without an answer is asked of others later."),
        sa.CheckConstraint("state IN ('asked', 'labelled', 'skipped')", name=op.f("ck_review_asks_state")),
        sa.ForeignKeyConstraint(
            ["tweet_id"], ["review_tweets.tweet_id"], name="fk_review_asks_tweet_id", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("tweet_id", "annotator", name="pk_review_asks"),
        comment="One row per picked tweet and annotator who was asked about it.",
    )


def create_webhook_events() -> None:
    op.create_table(
        "webhook_events",
        required("id", sa.Integer(), "Id of the event, rising."),
        required("event_key", sa.Text(), "What happened to what, so that an event is told once."),
        required("kind", sa.Text(), "Kind of the event, such as job.ended or champion.changed."),
        required("payload", JSON, "JSON object: what the receiver gets."),
        required("created_at", TIME, "Time at which it was noticed, UTC."),
        required("attempts", sa.Integer(), "Number of deliveries that were tried."),
        required("next_attempt_at", TIME, "Earliest time of the next one, UTC."),
        optional("delivered_at", TIME, "Time at which the receiver accepted it, UTC. NULL until then."),
        optional(
            "error",
            sa.Text(),
            "Why the last delivery failed. NULL when none failed.",
        ),
        sa.PrimaryKeyConstraint("id", name="pk_webhook_events"),
        sa.UniqueConstraint("event_key", name="uq_webhook_events_event_key"),
        comment="One row per event that a webhook is told of, until it is old. Empty without a webhook.",
    )
    op.create_index(
        "ix_webhook_events_delivered_at_next_attempt_at", "webhook_events", ["delivered_at", "next_attempt_at"]
    )


# --- views

LABELLED = """
    WITH newest AS (
        SELECT l.id, l.tweet_id, l.label, l.at FROM labels AS l
        WHERE l.source <> 'model' AND NOT EXISTS (
            SELECT 1 FROM labels AS n
            WHERE n.tweet_id = l.tweet_id AND n.annotator = l.annotator AND n.source <> 'model'
              AND (n.at > l.at OR (n.at = l.at AND n.id > l.id)))),
    counted AS (
        SELECT tweet_id, label, count(*) AS agreeing, max(at) AS labelled_at, max(id) AS newest_id
        FROM newest GROUP BY tweet_id, label),
    ranked AS (
        SELECT c.*, sum(agreeing) OVER (PARTITION BY tweet_id) AS annotators,
               row_number() OVER (
                   PARTITION BY tweet_id ORDER BY agreeing DESC, labelled_at DESC, newest_id DESC) AS place
        FROM counted AS c)
    SELECT tweet_id, label, CAST(annotators AS BIGINT) AS annotators, agreeing, labelled_at
    FROM ranked WHERE place = 1"""
VIEWS = {"v_labels": LABELLED}
COMMENTS = {
    "v_labels": (
        "One row per tweet that people labelled, with the label that most annotators gave it.",
        {
            "tweet_id": "The tweet that was labelled.",
            "label": "The label that most annotators gave; among equals the newest.",
            "annotators": "Number of annotators that labelled the tweet.",
            "agreeing": "Number of annotators that gave this label.",
            "labelled_at": "Time of the newest of these labels, UTC.",
        },
    ),
}


def quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def upgrade() -> None:
    create_labels()
    create_reviews()
    create_webhook_events()
    for table in ("predictions", "test_predictions"):
        op.add_column(table, optional("unknown_share", sa.Double(), UNKNOWN_SHARE))
    op.add_column("training_jobs", optional("labels_until", TIME, LABELS_UNTIL))
    for name, body in VIEWS.items():
        op.execute(f"CREATE VIEW {name} AS {body}")
    if op.get_bind().dialect.name == "postgresql":
        for name, (comment, columns) in COMMENTS.items():
            op.execute(f"COMMENT ON VIEW {name} IS {quoted(comment)}")
            for column, text in columns.items():
                op.execute(f"COMMENT ON COLUMN {name}.{column} IS {quoted(text)}")


def downgrade() -> None:
    for name in reversed(VIEWS):
        op.execute(f"DROP VIEW {name}")
    for table in ("predictions", "test_predictions"):
        op.drop_column(table, "unknown_share")
    op.drop_column("training_jobs", "labels_until")
    for table in ("webhook_events", "review_asks", "review_tweets", "labels"):
        op.drop_table(table)
