"""Questions over a million predictions take less than a second: sums by hour that triggers keep, and two indexes.

The triggers count whatever is stored or removed, by whichever way, in the transaction that does it. In PostgreSQL every
connection has rows of its own (`shard`), so that workers never wait for each other's sums; a question adds them up.
Tweets also keep the ids of what they repeat, quote and answer.
"""

import sqlalchemy as sa
from alembic import op

from db.models import UtcDateTime

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

REFERENCES = ("retweeted_id", "quoted_id", "replied_to_id")
CHAMPION = "(SELECT a.model_version_id FROM model_aliases AS a WHERE a.alias = 'champion' ORDER BY a.id DESC LIMIT 1)"
COUNTED = "model_version_id, hour, topic, label, shard, tweets, probability_sum, score_sum, with_score"
HOUR_OF = {
    "sqlite": "substr(coalesce(t.tweet_created_at, t.received_at), 1, 13) || ':00:00.000000Z'",
    "postgresql": "date_trunc('hour', coalesce(t.tweet_created_at, t.received_at), 'UTC')",
}
HOUR_SHOWN = {"sqlite": "substr(hour, 1, 19) || 'Z'", "postgresql": "hour"}
# Japan has kept UTC+9 without summer time since 1951.
DAY_JST = {"sqlite": "date(substr(hour, 1, 19), '+9 hours')", "postgresql": "(hour AT TIME ZONE 'Asia/Tokyo')::date"}

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

MEANS = """sum(tweets) AS tweets, sum(probability_sum) / sum(tweets) AS mean_probability,
           sum(score_sum) / nullif(sum(with_score), 0) AS mean_score"""
# Of a tweet that a question does not ask about nothing is looked up: PostgreSQL leaves a left join out of it, SQLite a
# value that is a query of its own, but not a join under an aggregate.
OF_TWEET = {"sqlite": "(SELECT t.{0} FROM tweets AS t WHERE t.tweet_id = p.tweet_id) AS {0}", "postgresql": "t.{0}"}
JOINED = {"sqlite": "", "postgresql": "LEFT JOIN tweets AS t ON t.tweet_id = p.tweet_id"}
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
}
EARLIER = {
    "v_predictions_current": """
        SELECT t.tweet_id, t.text, t.author_id, t.lang, t.topic, t.tweet_created_at, t.received_at,
               p.model_version_id, p.label, p.probability, p.score_signed, p.scored_at
        FROM predictions AS p JOIN tweets AS t ON t.tweet_id = p.tweet_id WHERE p.model_version_id = {champion}""",
    "v_sentiment_hourly": """
        SELECT {hour} AS hour_utc, label, count(*) AS tweets, avg(probability) AS mean_probability,
               avg(score_signed) AS mean_score FROM v_predictions_current AS t GROUP BY 1, 2""",
    "v_sentiment_daily_jst": """
        SELECT {day} AS day_jst, label, count(*) AS tweets, avg(probability) AS mean_probability,
               avg(score_signed) AS mean_score FROM v_predictions_current AS t GROUP BY 1, 2""",
}
EARLIER_TIMES = {
    "sqlite": {
        "hour": "strftime('%Y-%m-%dT%H:00:00Z', coalesce(t.tweet_created_at, t.received_at))",
        "day": "date(substr(coalesce(t.tweet_created_at, t.received_at), 1, 19), '+9 hours')",
    },
    "postgresql": {
        "hour": "date_trunc('hour', coalesce(t.tweet_created_at, t.received_at), 'UTC')",
        "day": "(coalesce(t.tweet_created_at, t.received_at) AT TIME ZONE 'Asia/Tokyo')::date",
    },
}


def statement(sign: str, dialect: str) -> str:
    """One of the triggers' statements: `sign` is empty for rows that came, a minus for rows that went."""
    row = "OLD" if sign else "NEW"
    form = ONE_ROW if dialect == "sqlite" else MANY_ROWS
    return form.format(
        counted=COUNTED, row=row, hour=HOUR_OF[dialect], sign=sign, add_up=ADD_UP, rows="changed",
        shard="pg_backend_pid()",
    )  # fmt: skip


def create_triggers(dialect: str) -> None:
    for event, sign in (("INSERT", ""), ("DELETE", "-")):
        name = f"predictions_{event.lower()}_counted"
        if dialect == "sqlite":
            op.execute(f"CREATE TRIGGER {name} AFTER {event} ON predictions BEGIN {statement(sign, dialect)}; END")
            continue
        table = "OLD" if sign else "NEW"
        op.execute(
            f"CREATE FUNCTION {name}() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {statement(sign, dialect)}; "
            "RETURN NULL; END $$"
        )
        op.execute(
            f"CREATE TRIGGER {name} AFTER {event} ON predictions REFERENCING {table} TABLE AS changed "
            f"FOR EACH STATEMENT EXECUTE FUNCTION {name}()"
        )
    # Before the tweet goes: its hour and topic are needed to take its predictions out of the sums.
    gone = "DELETE FROM predictions WHERE tweet_id = OLD.tweet_id"
    if dialect == "sqlite":
        op.execute(f"CREATE TRIGGER tweets_delete BEFORE DELETE ON tweets BEGIN {gone}; END")
        return
    op.execute(
        f"CREATE FUNCTION tweets_delete() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {gone}; RETURN OLD; END $$"
    )
    op.execute("CREATE TRIGGER tweets_delete BEFORE DELETE ON tweets FOR EACH ROW EXECUTE FUNCTION tweets_delete()")


def replace_views(views: dict[str, str], old: dict[str, str], **parts: str) -> None:
    for name in reversed(old):
        op.execute(f"DROP VIEW {name}")
    for name, body in views.items():
        op.execute(f"CREATE VIEW {name} AS {body.format(champion=CHAMPION, means=MEANS, **parts)}")


def upgrade() -> None:
    dialect = op.get_bind().dialect.name
    for name in REFERENCES:
        op.add_column("tweets", sa.Column(name, sa.Text(), nullable=True))
    op.create_table(
        "sentiment_rollup",
        sa.Column("model_version_id", sa.Integer(), nullable=False),
        sa.Column("hour", UtcDateTime(), nullable=False),
        sa.Column("topic", sa.Text(), nullable=False),
        sa.Column("label", sa.Text(), nullable=False),
        sa.Column("shard", sa.Integer(), nullable=False),
        sa.Column("tweets", sa.Integer(), nullable=False),
        sa.Column("probability_sum", sa.Double(), nullable=False),
        sa.Column("score_sum", sa.Double(), nullable=False),
        sa.Column("with_score", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(
            ["model_version_id"], ["model_versions.id"], name="fk_sentiment_rollup_model_version_id"
        ),
        sa.PrimaryKeyConstraint("model_version_id", "hour", "topic", "label", "shard", name="pk_sentiment_rollup"),
    )
    op.execute(
        MANY_ROWS.format(counted=COUNTED, hour=HOUR_OF[dialect], sign="", shard="0", rows="predictions", add_up="")
    )
    create_triggers(dialect)
    op.create_index(
        "ix_predictions_model_version_id_probability_label", "predictions", ["model_version_id", "probability", "label"]
    )
    op.create_index("ix_tweets_received_at", "tweets", ["received_at"])
    columns = ("text", "author_id", "lang", "topic", "tweet_created_at", "received_at")
    parts = {name: OF_TWEET[dialect].format(name) for name in columns} | {"joined": JOINED[dialect]}
    replace_views(VIEWS, EARLIER, hour_shown=HOUR_SHOWN[dialect], day_jst=DAY_JST[dialect], **parts)


def downgrade() -> None:
    dialect = op.get_bind().dialect.name
    replace_views(EARLIER, VIEWS, **EARLIER_TIMES[dialect])
    op.drop_index("ix_tweets_received_at", "tweets")
    op.drop_index("ix_predictions_model_version_id_probability_label", "predictions")
    for name, table in (
        ("predictions_insert_counted", "predictions"), ("predictions_delete_counted", "predictions"),
        ("tweets_delete", "tweets"),
    ):  # fmt: skip
        op.execute(f"DROP TRIGGER {name}" if dialect == "sqlite" else f"DROP TRIGGER {name} ON {table}")
        if dialect == "postgresql":
            op.execute(f"DROP FUNCTION {name}()")
    op.drop_table("sentiment_rollup")
    for name in REFERENCES:
        op.drop_column("tweets", name)
