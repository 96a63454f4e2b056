"""First schema: tables and the views for analysts."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

from db.models import UtcDateTime

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

HOUR = {
    "sqlite": "strftime('%Y-%m-%dT%H:00:00Z', {0})",
    "postgresql": "date_trunc('hour', {0}, 'UTC')",
}
# Japan has kept UTC+9 without summer time since 1951. SQLite rounds fractions of a second, which would turn the day.
DAY_JST = {
    "sqlite": "date(substr({0}, 1, 19), '+9 hours')",
    "postgresql": "({0} AT TIME ZONE 'Asia/Tokyo')::date",
}
VIEWS = {
    # One row a tweet: what the present champion says of it.
    "v_predictions_current": """
        SELECT t.tweet_id, t.text, t.author_id, t.lang, t.topic, t.tweet_created_at, t.received_at,
               p.model_version_id, p.label, p.probability, p.score_signed, p.scored_at
        FROM predictions AS p
        JOIN tweets AS t ON t.tweet_id = p.tweet_id
        WHERE p.model_version_id = (
            SELECT a.model_version_id FROM model_aliases AS a WHERE a.alias = 'champion' ORDER BY a.id DESC LIMIT 1
        )""",
    "v_sentiment_hourly": """
        SELECT {hour} AS hour_utc, label, count(*) AS tweets,
               avg(probability) AS mean_probability, avg(score_signed) AS mean_score
        FROM v_predictions_current GROUP BY 1, 2""",
    "v_sentiment_daily_jst": """
        SELECT {day} AS day_jst, label, count(*) AS tweets,
               avg(probability) AS mean_probability, avg(score_signed) AS mean_score
        FROM v_predictions_current GROUP BY 1, 2""",
    "v_model_leaderboard": """
        SELECT m.id AS model_version_id, m.base_model, m.job_id, m.created_at,
               max(CASE WHEN x.metric = 'accuracy' THEN x.value END) AS accuracy,
               max(CASE WHEN x.metric = 'f1_micro' THEN x.value END) AS f1_micro,
               max(CASE WHEN x.metric = 'f1_macro' THEN x.value END) AS f1_macro,
               max(CASE WHEN x.metric = 'tfidf_f1_macro' THEN x.value END) AS tfidf_f1_macro
        FROM model_versions AS m
        LEFT JOIN test_metrics AS x ON x.model_version_id = m.id AND x.label = ''
        GROUP BY m.id, m.base_model, m.job_id, m.created_at""",
    "v_jobs": """
        SELECT j.id, j.state, j.step, j.total_steps, j.loss, j.attempts, j.submitted_at, j.started_at, j.finished_at,
               j.error, m.id AS model_version_id,
               (SELECT max(e.epoch) FROM epoch_metrics AS e WHERE e.job_id = j.id) AS epochs,
               (SELECT max(e.valid_f1_macro) FROM epoch_metrics AS e WHERE e.job_id = j.id) AS best_valid_f1_macro
        FROM training_jobs AS j
        LEFT JOIN model_versions AS m ON m.job_id = j.id""",
}


def create_views(dialect: str) -> None:
    # A tweet without a time of its own counts when it arrived.
    when = "coalesce(tweet_created_at, received_at)"
    for name, body in VIEWS.items():
        query = body.replace("{hour}", HOUR[dialect].format(when)).replace("{day}", DAY_JST[dialect].format(when))
        op.execute(f"CREATE VIEW {name} AS {query}")


def upgrade() -> None:
    op.create_table(
        "dead_letters",
        sa.Column("record_id", sa.Text(), nullable=False),
        sa.Column("payload", sa.LargeBinary(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("buried_at", UtcDateTime(), nullable=False),
        sa.PrimaryKeyConstraint("record_id", name=op.f("pk_dead_letters")),
    )
    op.create_table(
        "training_jobs",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("request_id", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column(
            "config", sa.JSON().with_variant(postgresql.JSONB(astext_type=sa.Text()), "postgresql"), nullable=False
        ),
        sa.Column("dataset", sa.Text(), nullable=False),
        sa.Column("dataset_sha256", sa.Text(), nullable=True),
        sa.Column("lease_owner", sa.Text(), nullable=True),
        sa.Column("lease_expires_at", UtcDateTime(), nullable=True),
        sa.Column("fencing_token", sa.Integer(), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("cancel_requested", sa.Boolean(), nullable=False),
        sa.Column("step", sa.Integer(), nullable=False),
        sa.Column("total_steps", sa.Integer(), nullable=True),
        sa.Column("loss", sa.Double(), nullable=True),
        sa.Column("submitted_at", UtcDateTime(), nullable=False),
        sa.Column("started_at", UtcDateTime(), nullable=True),
        sa.Column("finished_at", UtcDateTime(), nullable=True),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column(
            "data_report", sa.JSON().with_variant(postgresql.JSONB(astext_type=sa.Text()), "postgresql"), nullable=True
        ),
        sa.CheckConstraint(
            "state IN ('queued', 'running', 'succeeded', 'failed', 'cancelled')", name=op.f("ck_training_jobs_state")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_training_jobs")),
        sa.UniqueConstraint("request_id", name=op.f("uq_training_jobs_request_id")),
    )
    with op.batch_alter_table("training_jobs", schema=None) as batch_op:
        batch_op.create_index(
            batch_op.f("ix_training_jobs_state_lease_expires_at"), ["state", "lease_expires_at"], unique=False
        )

    op.create_table(
        "tweets",
        sa.Column("tweet_id", sa.Text(), nullable=False),
        sa.Column("text", sa.Text(), nullable=False),
        sa.Column("author_id", sa.Text(), nullable=True),
        sa.Column("lang", sa.Text(), nullable=True),
        sa.Column("topic", sa.Text(), nullable=True),
        sa.Column("tweet_created_at", UtcDateTime(), nullable=True),
        sa.Column("received_at", UtcDateTime(), nullable=False),
        sa.PrimaryKeyConstraint("tweet_id", name=op.f("pk_tweets")),
    )
    op.create_table(
        "epoch_metrics",
        sa.Column("job_id", sa.Integer(), nullable=False),
        sa.Column("epoch", sa.Integer(), nullable=False),
        sa.Column("train_loss", sa.Double(), nullable=False),
        sa.Column("learning_rate", sa.Double(), nullable=False),
        sa.Column("valid_loss", sa.Double(), nullable=False),
        sa.Column("valid_accuracy", sa.Double(), nullable=False),
        sa.Column("valid_f1_macro", sa.Double(), nullable=False),
        sa.Column("seconds", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(
            ["job_id"], ["training_jobs.id"], name=op.f("fk_epoch_metrics_job_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("job_id", "epoch", name=op.f("pk_epoch_metrics")),
    )
    op.create_table(
        "model_versions",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("job_id", sa.Integer(), nullable=True),
        sa.Column("base_model", sa.Text(), nullable=False),
        sa.Column("base_revision", sa.Text(), nullable=True),
        sa.Column("artifact_url", sa.Text(), nullable=False),
        sa.Column("sha256", sa.Text(), nullable=False),
        sa.Column(
            "labels", sa.JSON().with_variant(postgresql.JSONB(astext_type=sa.Text()), "postgresql"), nullable=False
        ),
        sa.Column("cleaner_version", sa.Text(), nullable=False),
        sa.Column("temperature", sa.Double(), nullable=False),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["training_jobs.id"], name=op.f("fk_model_versions_job_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_model_versions")),
        sa.UniqueConstraint("job_id", name=op.f("uq_model_versions_job_id")),
    )
    op.create_table(
        "confusion_cells",
        sa.Column("model_version_id", sa.Integer(), nullable=False),
        sa.Column("actual", sa.Text(), nullable=False),
        sa.Column("predicted", sa.Text(), nullable=False),
        sa.Column("count", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(
            ["model_version_id"],
            ["model_versions.id"],
            name=op.f("fk_confusion_cells_model_version_id"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("model_version_id", "actual", "predicted", name=op.f("pk_confusion_cells")),
    )
    op.create_table(
        "model_aliases",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("alias", sa.Text(), nullable=False),
        sa.Column("model_version_id", sa.Integer(), nullable=False),
        sa.Column("assigned_at", UtcDateTime(), nullable=False),
        sa.ForeignKeyConstraint(
            ["model_version_id"], ["model_versions.id"], name=op.f("fk_model_aliases_model_version_id")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_model_aliases")),
    )
    with op.batch_alter_table("model_aliases", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_model_aliases_alias_id"), ["alias", "id"], unique=False)

    op.create_table(
        "predictions",
        sa.Column("tweet_id", sa.Text(), nullable=False),
        sa.Column("model_version_id", sa.Integer(), nullable=False),
        sa.Column("label", sa.Text(), nullable=False),
        sa.Column("probability", sa.Double(), nullable=False),
        sa.Column("score_signed", sa.Double(), nullable=True),
        sa.Column(
            "probabilities",
            sa.JSON().with_variant(postgresql.JSONB(astext_type=sa.Text()), "postgresql"),
            nullable=False,
        ),
        sa.Column("scored_at", UtcDateTime(), nullable=False),
        sa.ForeignKeyConstraint(
            ["model_version_id"], ["model_versions.id"], name=op.f("fk_predictions_model_version_id")
        ),
        sa.ForeignKeyConstraint(
            ["tweet_id"], ["tweets.tweet_id"], name=op.f("fk_predictions_tweet_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("tweet_id", "model_version_id", name=op.f("pk_predictions")),
    )
    with op.batch_alter_table("predictions", schema=None) as batch_op:
        batch_op.create_index(
            batch_op.f("ix_predictions_model_version_id_scored_at"), ["model_version_id", "scored_at"], unique=False
        )

    op.create_table(
        "scoring_windows",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("worker", sa.Text(), nullable=False),
        sa.Column("model_version_id", sa.Integer(), nullable=False),
        sa.Column("started_at", UtcDateTime(), nullable=False),
        sa.Column("tweets", sa.Integer(), nullable=False),
        sa.Column("buried", sa.Integer(), nullable=False),
        sa.Column("tokens", sa.Integer(), nullable=False),
        sa.Column("padded_tokens", sa.Integer(), nullable=False),
        sa.Column("read_ms", sa.Double(), nullable=False),
        sa.Column("tokenise_ms", sa.Double(), nullable=False),
        sa.Column("forward_ms", sa.Double(), nullable=False),
        sa.Column("store_ms", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(
            ["model_version_id"], ["model_versions.id"], name=op.f("fk_scoring_windows_model_version_id")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_scoring_windows")),
    )
    with op.batch_alter_table("scoring_windows", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_scoring_windows_started_at"), ["started_at"], unique=False)

    op.create_table(
        "test_metrics",
        sa.Column("model_version_id", sa.Integer(), nullable=False),
        sa.Column("metric", sa.Text(), nullable=False),
        sa.Column("label", sa.Text(), nullable=False),
        sa.Column("value", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(
            ["model_version_id"],
            ["model_versions.id"],
            name=op.f("fk_test_metrics_model_version_id"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("model_version_id", "metric", "label", name=op.f("pk_test_metrics")),
    )
    op.create_table(
        "test_predictions",
        sa.Column("model_version_id", sa.Integer(), nullable=False),
        sa.Column("row_number", sa.Integer(), nullable=False),
        sa.Column("text", sa.Text(), nullable=False),
        sa.Column("actual", sa.Text(), nullable=False),
        sa.Column("predicted", sa.Text(), nullable=False),
        sa.Column("probability", sa.Double(), nullable=False),
        sa.Column(
            "probabilities",
            sa.JSON().with_variant(postgresql.JSONB(astext_type=sa.Text()), "postgresql"),
            nullable=False,
        ),
        sa.ForeignKeyConstraint(
            ["model_version_id"],
            ["model_versions.id"],
            name=op.f("fk_test_predictions_model_version_id"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("model_version_id", "row_number", name=op.f("pk_test_predictions")),
    )
    create_views(op.get_bind().dialect.name)


def downgrade() -> None:
    for name in reversed(VIEWS):
        op.execute(f"DROP VIEW {name}")
    op.drop_table("test_predictions")
    op.drop_table("test_metrics")
    with op.batch_alter_table("scoring_windows", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_scoring_windows_started_at"))

    op.drop_table("scoring_windows")
    with op.batch_alter_table("predictions", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_predictions_model_version_id_scored_at"))

    op.drop_table("predictions")
    with op.batch_alter_table("model_aliases", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_model_aliases_alias_id"))

    op.drop_table("model_aliases")
    op.drop_table("confusion_cells")
    op.drop_table("model_versions")
    op.drop_table("epoch_metrics")
    op.drop_table("tweets")
    with op.batch_alter_table("training_jobs", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_training_jobs_state_lease_expires_at"))

    op.drop_table("training_jobs")
    op.drop_table("dead_letters")
