"""First schema, of version 0.1.0. It imports nothing of the models, so that it stays as it was released."""

from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

Column = sa.Column[Any]

TIME = sa.DateTime(timezone=True).with_variant(sa.String(27), "sqlite")
JSON = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")


def required(name: str, kind: Any, **more: Any) -> Column:
    return sa.Column(name, kind, nullable=False, **more)


def optional(name: str, kind: Any, **more: Any) -> Column:
    return sa.Column(name, kind, nullable=True, **more)


def create_dead_letters() -> None:
    op.create_table(
        "dead_letters",
        required("record_id", sa.Text()),
        required("payload", sa.LargeBinary()),
        optional("other_fields", JSON),
        required("reason", sa.Text()),
        required("attempts", sa.Integer()),
        required("buried_at", TIME),
        sa.PrimaryKeyConstraint("record_id", name="pk_dead_letters"),
    )
    op.create_index("ix_dead_letters_buried_at", "dead_letters", ["buried_at"])


def create_schema_compatibility() -> None:
    table = op.create_table(
        "schema_compatibility",
        required("oldest_code", sa.Text()),
        sa.PrimaryKeyConstraint("oldest_code", name="pk_schema_compatibility"),
    )
    op.bulk_insert(table, [{"oldest_code": revision}])


def training_job_request() -> list[Column]:
    return [
        required("id", sa.Integer()),
        required("request_id", sa.Text()),
        required("state", sa.Text()),
        required("config", JSON),
        required("dataset", sa.Text()),
        optional("dataset_sha256", sa.Text()),
        optional("lease_owner", sa.Text()),
        optional("lease_expires_at", TIME),
        required("fencing_token", sa.Integer()),
        required("attempts", sa.Integer()),
    ]


def training_job_progress() -> list[Column]:
    return [
        required("cancel_requested", sa.Boolean()),
        required("step", sa.Integer()),
        optional("total_steps", sa.Integer()),
        optional("loss", sa.Double()),
        optional("samples_per_second", sa.Double()),
        required("submitted_at", TIME),
        optional("started_at", TIME),
        optional("finished_at", TIME),
        optional("error", sa.Text()),
        optional("data_report", JSON),
        optional("message", sa.Text()),
        optional("answer_due_at", TIME),
    ]


def create_training_jobs() -> None:
    op.create_table(
        "training_jobs",
        *training_job_request(),
        *training_job_progress(),
        sa.CheckConstraint(
            "state IN ('queued', 'running', 'succeeded', 'failed', 'cancelled')", name=op.f("ck_training_jobs_state")
        ),
        sa.PrimaryKeyConstraint("id", name="pk_training_jobs"),
        sa.UniqueConstraint("request_id", name="uq_training_jobs_request_id"),
    )
    op.create_index("ix_training_jobs_state_lease_expires_at", "training_jobs", ["state", "lease_expires_at"])


def create_tweets() -> None:
    op.create_table(
        "tweets",
        required("tweet_id", sa.Text()),
        required("text", sa.Text()),
        optional("author_id", sa.Text()),
        optional("lang", sa.Text()),
        optional("topic", sa.Text()),
        optional("tweet_created_at", TIME),
        required("received_at", TIME),
        optional("retweeted_id", sa.Text()),
        optional("quoted_id", sa.Text()),
        optional("replied_to_id", sa.Text()),
        sa.PrimaryKeyConstraint("tweet_id", name="pk_tweets"),
    )
    op.create_index("ix_tweets_received_at", "tweets", ["received_at"])


def create_epoch_metrics() -> None:
    op.create_table(
        "epoch_metrics",
        required("job_id", sa.Integer()),
        required("epoch", sa.Integer()),
        required("train_loss", sa.Double()),
        required("learning_rate", sa.Double()),
        required("valid_loss", sa.Double()),
        required("valid_accuracy", sa.Double()),
        required("valid_f1_macro", sa.Double()),
        required("seconds", sa.Double()),
        required("kept", sa.Boolean(), server_default=sa.true()),
        sa.ForeignKeyConstraint(["job_id"], ["training_jobs.id"], name="fk_epoch_metrics_job_id", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("job_id", "epoch", name="pk_epoch_metrics"),
    )


def create_model_versions() -> None:
    op.create_table(
        "model_versions",
        required("id", sa.Integer()),
        optional("job_id", sa.Integer()),
        required("base_model", sa.Text()),
        optional("base_revision", sa.Text()),
        required("artifact_url", sa.Text()),
        required("sha256", sa.Text()),
        required("labels", JSON),
        required("cleaner_version", sa.Text()),
        required("temperature", sa.Double()),
        required("created_at", TIME),
        optional("deleted_at", TIME),
        sa.ForeignKeyConstraint(["job_id"], ["training_jobs.id"], name="fk_model_versions_job_id"),
        sa.PrimaryKeyConstraint("id", name="pk_model_versions"),
        sa.UniqueConstraint("job_id", name="uq_model_versions_job_id"),
    )


def create_confusion_cells() -> None:
    op.create_table(
        "confusion_cells",
        required("model_version_id", sa.Integer()),
        required("actual", sa.Text()),
        required("predicted", sa.Text()),
        required("count", sa.Integer()),
        sa.ForeignKeyConstraint(
            ["model_version_id"], ["model_versions.id"], name="fk_confusion_cells_model_version_id", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("model_version_id", "actual", "predicted", name="pk_confusion_cells"),
    )


def create_model_aliases() -> None:
    op.create_table(
        "model_aliases",
        required("id", sa.Integer()),
        required("alias", sa.Text()),
        required("model_version_id", sa.Integer()),
        required("assigned_at", TIME),
        sa.ForeignKeyConstraint(["model_version_id"], ["model_versions.id"], name="fk_model_aliases_model_version_id"),
        sa.PrimaryKeyConstraint("id", name="pk_model_aliases"),
    )
    op.create_index("ix_model_aliases_alias_id", "model_aliases", ["alias", "id"])


def create_predictions() -> None:
    op.create_table(
        "predictions",
        required("tweet_id", sa.Text()),
        required("model_version_id", sa.Integer()),
        required("label", sa.Text()),
        required("probability", sa.Double()),
        optional("score_signed", sa.Double()),
        required("probabilities", JSON),
        required("scored_at", TIME),
        sa.ForeignKeyConstraint(["model_version_id"], ["model_versions.id"], name="fk_predictions_model_version_id"),
        sa.ForeignKeyConstraint(["tweet_id"], ["tweets.tweet_id"], name="fk_predictions_tweet_id", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("tweet_id", "model_version_id", name="pk_predictions"),
    )
    op.create_index(
        "ix_predictions_model_version_id_probability_label", "predictions", ["model_version_id", "probability", "label"]
    )
    op.create_index("ix_predictions_model_version_id_scored_at", "predictions", ["model_version_id", "scored_at"])


def create_scoring_windows() -> None:
    op.create_table(
        "scoring_windows",
        required("id", sa.Integer()),
        required("worker", sa.Text()),
        required("model_version_id", sa.Integer()),
        required("started_at", TIME),
        required("tweets", sa.Integer()),
        required("buried", sa.Integer()),
        required("tokens", sa.Integer()),
        required("padded_tokens", sa.Integer()),
        required("read_ms", sa.Double()),
        required("tokenise_ms", sa.Double()),
        required("forward_ms", sa.Double()),
        required("store_ms", sa.Double()),
        sa.ForeignKeyConstraint(
            ["model_version_id"], ["model_versions.id"], name="fk_scoring_windows_model_version_id"
        ),
        sa.PrimaryKeyConstraint("id", name="pk_scoring_windows"),
    )
    op.create_index("ix_scoring_windows_started_at", "scoring_windows", ["started_at"])


def create_sentiment_rollup() -> None:
    op.create_table(
        "sentiment_rollup",
        required("model_version_id", sa.Integer()),
        required("hour", TIME),
        required("topic", sa.Text()),
        required("label", sa.Text()),
        required("shard", sa.Integer()),
        required("tweets", sa.Integer()),
        required("probability_sum", sa.Double()),
        required("score_sum", sa.Double()),
        required("with_score", sa.Integer()),
        sa.ForeignKeyConstraint(
            ["model_version_id"], ["model_versions.id"], name="fk_sentiment_rollup_model_version_id"
        ),
        sa.PrimaryKeyConstraint("model_version_id", "hour", "topic", "label", "shard", name="pk_sentiment_rollup"),
    )


def create_test_metrics() -> None:
    op.create_table(
        "test_metrics",
        required("model_version_id", sa.Integer()),
        required("metric", sa.Text()),
        required("label", sa.Text()),
        required("value", sa.Double()),
        sa.ForeignKeyConstraint(
            ["model_version_id"], ["model_versions.id"], name="fk_test_metrics_model_version_id", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("model_version_id", "metric", "label", name="pk_test_metrics"),
    )


def create_test_predictions() -> None:
    op.create_table(
        "test_predictions",
        required("model_version_id", sa.Integer()),
        required("row_number", sa.Integer()),
        required("text", sa.Text()),
        required("actual", sa.Text()),
        required("predicted", sa.Text()),
        required("probability", sa.Double()),
        required("probabilities", JSON),
        sa.ForeignKeyConstraint(
            ["model_version_id"], ["model_versions.id"], name="fk_test_predictions_model_version_id", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("model_version_id", "row_number", name="pk_test_predictions"),
    )


CHAMPION = "(SELECT a.model_version_id FROM model_aliases AS a WHERE a.alias = 'champion' ORDER BY a.id DESC LIMIT 1)"

# --- triggers that update `sentiment_rollup` in the transaction that adds or deletes predictions

COUNTED = "model_version_id, hour, topic, label, shard, tweets, probability_sum, score_sum, with_score"
HOUR_OF = {
    "sqlite": "substr(coalesce(t.tweet_created_at, t.received_at), 1, 13) || ':00:00.000000Z'",
    "postgresql": "date_trunc('hour', coalesce(t.tweet_created_at, t.received_at), 'UTC')",
}
ADD_UP = """
    ON CONFLICT (model_version_id, hour, topic, label, shard) DO UPDATE SET
        tweets = sentiment_rollup.tweets + excluded.tweets,
        probability_sum = sentiment_rollup.probability_sum + excluded.probability_sum,
        score_sum = sentiment_rollup.score_sum + excluded.score_sum,
        with_score = sentiment_rollup.with_score + excluded.with_score"""
ONE_ROW = """
    INSERT INTO sentiment_rollup ({counted})
    SELECT {row}.model_version_id, {hour}, coalesce(t.topic, ''), {row}.label, 0, {sign}1, {sign}{row}.probability,
           {sign}coalesce({row}.score_signed, 0), {sign}({row}.score_signed IS NOT NULL)
    FROM tweets AS t WHERE t.tweet_id = {row}.tweet_id {add_up}"""
MANY_ROWS = """
    INSERT INTO sentiment_rollup ({counted})
    SELECT p.model_version_id, {hour}, coalesce(t.topic, ''), p.label, {shard}, {sign}count(*),
           {sign}sum(p.probability), {sign}sum(coalesce(p.score_signed, 0)), {sign}count(p.score_signed)
    FROM {rows} AS p JOIN tweets AS t ON t.tweet_id = p.tweet_id GROUP BY 1, 2, 3, 4 {add_up}"""


def count_statement(sign: str, dialect: str) -> str:
    """The statement of a trigger. `sign` is empty for added rows and a minus for deleted rows."""
    form = ONE_ROW if dialect == "sqlite" else MANY_ROWS
    return form.format(
        counted=COUNTED, row="OLD" if sign else "NEW", hour=HOUR_OF[dialect], sign=sign, add_up=ADD_UP,
        rows="changed", shard="pg_backend_pid()",
    )  # fmt: skip


def create_triggers(dialect: str) -> None:
    for event, sign in (("INSERT", ""), ("DELETE", "-")):
        name, statement = f"predictions_{event.lower()}_counted", count_statement(sign, dialect)
        if dialect == "sqlite":
            op.execute(f"CREATE TRIGGER {name} AFTER {event} ON predictions BEGIN {statement}; END")
            continue
        op.execute(
            f"CREATE FUNCTION {name}() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {statement}; RETURN NULL; END $$"
        )
        op.execute(
            f"CREATE TRIGGER {name} AFTER {event} ON predictions REFERENCING {'OLD' if sign else 'NEW'} TABLE "
            f"AS changed FOR EACH STATEMENT EXECUTE FUNCTION {name}()"
        )
    # Before the tweet is deleted: the sums need its hour and topic.
    deletion = "DELETE FROM predictions WHERE tweet_id = OLD.tweet_id"
    if dialect == "sqlite":
        op.execute(f"CREATE TRIGGER tweets_delete BEFORE DELETE ON tweets BEGIN {deletion}; END")
        return
    op.execute(
        f"CREATE FUNCTION tweets_delete() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {deletion}; RETURN OLD; END $$"
    )
    op.execute("CREATE TRIGGER tweets_delete BEFORE DELETE ON tweets FOR EACH ROW EXECUTE FUNCTION tweets_delete()")


# --- views for analysts

HOUR_SHOWN = {"sqlite": "substr(hour, 1, 19) || 'Z'", "postgresql": "hour"}
# Japan has used UTC+9 without summer time since 1951.
DAY_JST = {"sqlite": "date(substr(hour, 1, 19), '+9 hours')", "postgresql": "(hour AT TIME ZONE 'Asia/Tokyo')::date"}
MEANS = """sum(tweets) AS tweets, sum(probability_sum) / sum(tweets) AS mean_probability,
           sum(score_sum) / nullif(sum(with_score), 0) AS mean_score"""
# A query that selects no column of the tweet must not read the tweets. PostgreSQL removes an unused left join. SQLite
# does so for an unused scalar subquery, but not for a join below an aggregate.
OF_TWEET = {"sqlite": "(SELECT t.{0} FROM tweets AS t WHERE t.tweet_id = p.tweet_id) AS {0}", "postgresql": "t.{0}"}
JOINED = {"sqlite": "", "postgresql": "LEFT JOIN tweets AS t ON t.tweet_id = p.tweet_id"}
TWEET_COLUMNS = ("text", "author_id", "lang", "topic", "tweet_created_at", "received_at")
# Metrics of the whole test split, one column each.
METRICS = ("accuracy", "f1_micro", "f1_macro", "tfidf_f1_macro", "f1_macro_low", "f1_macro_high", "roc_auc", "ece")
VIEWS = {
    "v_predictions_current": """
        SELECT p.tweet_id, {text}, {author_id}, {lang}, {topic}, {tweet_created_at}, {received_at},
               p.model_version_id, p.label, p.probability, p.score_signed, p.scored_at
        FROM predictions AS p {joined} WHERE p.model_version_id = {champion}""",
    "v_low_confidence": """
        SELECT p.tweet_id, {text}, {topic}, p.label, p.probability, p.probabilities, p.scored_at
        FROM predictions AS p {joined} WHERE p.model_version_id = {champion} AND p.probability < 0.6""",
    "v_sentiment_hourly": """
        SELECT {hour_shown} AS hour_utc, label, {means} FROM sentiment_rollup
        WHERE model_version_id = {champion} GROUP BY 1, 2 HAVING sum(tweets) > 0""",
    "v_sentiment_daily_jst": """
        SELECT {day_jst} AS day_jst, label, {means} FROM sentiment_rollup
        WHERE model_version_id = {champion} GROUP BY 1, 2 HAVING sum(tweets) > 0""",
    "v_topic_sentiment": """
        SELECT nullif(topic, '') AS topic, label, {means},
               CAST(sum(tweets) AS DOUBLE PRECISION) / sum(sum(tweets)) OVER (PARTITION BY topic) AS share
        FROM sentiment_rollup WHERE model_version_id = {champion} GROUP BY topic, label HAVING sum(tweets) > 0""",
    "v_model_leaderboard": """
        SELECT m.id AS model_version_id, m.base_model, m.job_id, m.created_at, {metrics}
        FROM model_versions AS m LEFT JOIN test_metrics AS x ON x.model_version_id = m.id AND x.label = ''
        WHERE m.deleted_at IS NULL GROUP BY m.id, m.base_model, m.job_id, m.created_at""",
    "v_jobs": """
        SELECT j.id, j.state, j.step, j.total_steps, j.loss, j.attempts, j.submitted_at, j.started_at, j.finished_at,
               j.error, m.id AS model_version_id,
               (SELECT max(e.epoch) FROM epoch_metrics AS e WHERE e.job_id = j.id) AS epochs,
               (SELECT max(e.valid_f1_macro) FROM epoch_metrics AS e WHERE e.job_id = j.id) AS best_valid_f1_macro
        FROM training_jobs AS j
        LEFT JOIN model_versions AS m ON m.job_id = j.id""",
}


def create_views(dialect: str) -> None:
    parts = {name: OF_TWEET[dialect].format(name) for name in TWEET_COLUMNS}
    parts["metrics"] = ", ".join(f"max(CASE WHEN x.metric = '{name}' THEN x.value END) AS {name}" for name in METRICS)
    parts |= {"joined": JOINED[dialect], "hour_shown": HOUR_SHOWN[dialect], "day_jst": DAY_JST[dialect]}
    for name, body in VIEWS.items():
        op.execute(f"CREATE VIEW {name} AS {body.format(champion=CHAMPION, means=MEANS, **parts)}")


# --- the migration

# In the order in which they are created: a table after those it refers to.
TABLES = (
    "dead_letters",
    "schema_compatibility",
    "training_jobs",
    "tweets",
    "epoch_metrics",
    "model_versions",
    "confusion_cells",
    "model_aliases",
    "predictions",
    "scoring_windows",
    "sentiment_rollup",
    "test_metrics",
    "test_predictions",
)


def upgrade() -> None:
    dialect = op.get_bind().dialect.name
    create_dead_letters()
    create_schema_compatibility()
    create_training_jobs()
    create_tweets()
    create_epoch_metrics()
    create_model_versions()
    create_confusion_cells()
    create_model_aliases()
    create_predictions()
    create_scoring_windows()
    create_sentiment_rollup()
    create_test_metrics()
    create_test_predictions()
    create_triggers(dialect)
    create_views(dialect)


def downgrade() -> None:
    for name in reversed(VIEWS):
        op.execute(f"DROP VIEW {name}")
    for name in reversed(TABLES):
        op.drop_table(name)  # its triggers and indexes go with it
    if op.get_bind().dialect.name == "postgresql":
        for name in ("predictions_insert_counted", "predictions_delete_counted", "tweets_delete"):
            op.execute(f"DROP FUNCTION {name}()")
