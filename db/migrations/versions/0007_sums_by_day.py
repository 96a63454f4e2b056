"""Sums of predictions by day of arrival, from which v_drift and v_live_quality read.

Before, these views read every tweet of 90 and 30 days. Only adds, so that releases that need migration 0001 keep
working. The sums of the rows that exist are made here, while nothing is written.
"""

from typing import Any

import sqlalchemy as sa
from alembic import context, op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

TABLE = "drift_rollup"
KEY = "model_version_id, day, label, length_bin, unknown_bin, shard"

# --- triggers that update the sums in the transaction that adds or deletes predictions

COUNT = """
    INSERT INTO drift_rollup ({key}, tweets, probability_sum)
    SELECT model_version_id, day, label, {length_bin}, coalesce(unknown, ''), {shard}, {sign}{count}, {sign}{sum}
    FROM (
        SELECT {p}.model_version_id, {p}.label, {p}.probability, {day} AS day, {cleaned_length} AS chars,
               {unknown_bin} AS unknown
        FROM {rows}) AS found
    {grouped}
    ON CONFLICT ({key}) DO UPDATE SET
        tweets = drift_rollup.tweets + excluded.tweets,
        probability_sum = drift_rollup.probability_sum + excluded.probability_sum"""
MANY = {"count": "count(*)", "sum": "sum(probability)", "grouped": "GROUP BY 1, 2, 3, 4, 5"}
ONE = {"count": "1", "sum": "probability", "grouped": "WHERE true"}  # without WHERE, SQLite takes ON for that of a join
ALL_ROWS = "predictions AS p JOIN tweets AS t ON t.tweet_id = p.tweet_id {apart}"
ONE_ROW = "tweets AS t WHERE t.tweet_id = {p}.tweet_id"
CHANGED = "changed AS p JOIN tweets AS t ON t.tweet_id = p.tweet_id AND t.tweet_id = ANY ($1)"
OF_CHANGED = "changed AS t JOIN predictions AS p ON p.tweet_id = t.tweet_id AND p.tweet_id = ANY ($1)"
# Name -> table, event and rows. PostgreSQL runs the triggers of a table by name: that of `tweets` has to come before
# `tweets_delete`, which deletes the predictions.
TRIGGERS = {
    "predictions_insert_counted_by_day": ("predictions", "INSERT", CHANGED),
    "predictions_delete_counted_by_day": ("predictions", "DELETE", CHANGED),
    "tweets_counted_by_day": ("tweets", "DELETE", OF_CHANGED),
}
# `EXECUTE` plans for the given ids, so that only their partitions are read.
FUNCTION = """
    CREATE FUNCTION {name}() RETURNS trigger LANGUAGE plpgsql AS $body$
    DECLARE ids text[] COLLATE "C" := ARRAY(SELECT tweet_id FROM changed);
    BEGIN
        IF cardinality(ids) > 0 THEN EXECUTE $sql$ {statement} $sql$ USING ids; END IF;
        RETURN NULL;
    END $body$"""

# --- views

BY_DAY_BEFORE = """
        SELECT {day} AS day, count(*) AS tweets, sum(p.probability) AS sure
        FROM tweets AS t JOIN predictions AS p ON p.tweet_id = t.tweet_id
        WHERE p.model_version_id = (SELECT id FROM champion) AND t.received_at >= {first_time}
        GROUP BY 1"""
BY_DAY = """
        SELECT day, sum(tweets) AS tweets, sum(probability_sum) AS sure FROM drift_rollup
        WHERE model_version_id = (SELECT id FROM champion) AND day >= {first_of_30}
        GROUP BY day HAVING sum(tweets) > 0"""
LIVE_BEFORE = """
        SELECT day, label, {length_bin} AS chars, unknown, count(*) AS n, sum(sure) AS sure
        FROM (
            SELECT {day} AS day, p.label, {cleaned_length} AS chars, {unknown_live} AS unknown, p.probability AS sure
            FROM tweets AS t JOIN predictions AS p ON p.tweet_id = t.tweet_id
            WHERE p.model_version_id = {champion} AND t.received_at >= {first_time}
            {apart}) AS found
        GROUP BY 1, 2, 3, 4"""
LIVE = """
        SELECT day, label, length_bin AS chars, nullif(unknown_bin, '') AS unknown, sum(tweets) AS n,
               sum(probability_sum) AS sure
        FROM drift_rollup WHERE model_version_id = {champion} AND day >= {first_day}
        GROUP BY day, label, length_bin, unknown_bin HAVING sum(tweets) > 0"""


def released(revision: str) -> Any:
    """The migration that made the views of before."""
    return context.script.get_revision(revision).module


def count(rows: str, form: dict[str, str], p: str = "p", sign: str = "", shard: str = "0") -> str:
    dialect, views = op.get_bind().dialect.name, released("0003")
    return COUNT.format(
        key=KEY,
        rows=rows.format(p=p, apart=views.APART[dialect]),
        p=p,
        sign=sign,
        shard=shard,
        day=views.DAY[dialect],
        cleaned_length=views.CLEANED_LENGTH.format(position=views.POSITION[dialect]),
        length_bin=views.LENGTH_BIN,
        unknown_bin=views.UNKNOWN_BIN.format(of=p),
        **form,
    )


def create_triggers() -> None:
    for name, (table, event, rows) in TRIGGERS.items():
        sign, changed = ("", "NEW") if event == "INSERT" else ("-", "OLD")
        if op.get_bind().dialect.name == "postgresql":
            op.execute(FUNCTION.format(name=name, statement=count(rows, MANY, sign=sign, shard="pg_backend_pid()")))
            op.execute(
                f"CREATE TRIGGER {name} AFTER {event} ON {table} REFERENCING {changed} TABLE AS changed "
                f"FOR EACH STATEMENT EXECUTE FUNCTION {name}()"
            )
        elif table == "predictions":  # `tweets_delete` deletes them before the tweet
            body = count(ONE_ROW, ONE, p=changed, sign=sign)
            op.execute(f"CREATE TRIGGER {name} AFTER {event} ON predictions BEGIN {body}; END")


def replace_views(bodies: dict[str, str]) -> None:
    for name, body in bodies.items():
        # On PostgreSQL the view keeps its comments and the rights on it.
        if op.get_bind().dialect.name == "postgresql":
            op.execute(f"CREATE OR REPLACE VIEW {name} AS {body}")
        else:
            op.execute(f"DROP VIEW {name}")
            op.execute(f"CREATE VIEW {name} AS {body}")


def live_quality(text: str) -> str:
    dialect, before = op.get_bind().dialect.name, released("0004")
    return text.format(
        single_label=before.SINGLE_LABEL.format(champion=before.CHAMPION),
        day=before.DAY[dialect],
        first_time=before.FIRST_TIME[dialect].format(before=29),
        unseen=before.UNSEEN,
        fair=before.FAIR,
        first_of_7=before.FIRST_DAY[dialect].format(before=6),
        first_of_30=before.FIRST_DAY[dialect].format(before=29),
    )


def drift() -> str:
    dialect, before = op.get_bind().dialect.name, released("0003")
    text: str = before.DRIFT.replace(LIVE_BEFORE, LIVE)
    return text.format(
        single_label=before.SINGLE_LABEL.format(champion=before.CHAMPION),
        champion=before.CHAMPION,
        first_day=before.FIRST_DAY[dialect].format(before=89),
        length_bin=before.LENGTH_BIN,
        unknown_tested=before.UNKNOWN_BIN.format(of="t"),
        live_bins=before.BY_BIN.format(of="live", day="day, ", group="day, "),
        test_bins=before.BY_BIN.format(of="tested", day="", group=""),
    )


def upgrade() -> None:
    postgresql = op.get_bind().dialect.name == "postgresql"
    op.create_table(
        TABLE,
        sa.Column(
            "model_version_id", sa.Integer(), nullable=False, comment="The model version that made the predictions."
        ),
        sa.Column("day", sa.Date(), nullable=False, comment="Day, UTC, on which the tweets were received."),
        sa.Column("label", sa.Text(), nullable=False, comment="The predicted label."),
        sa.Column(
            "length_bin",
            sa.Text(),
            nullable=False,
            comment="Bin of the length, as in v_drift: 0 for up to 9 characters.",
        ),
        sa.Column(
            "unknown_bin",
            sa.Text(),
            nullable=False,
            comment="Bin of the share of unknown tokens, as in v_drift: 0 for none. Empty for predictions without it.",
        ),
        sa.Column(
            "shard",
            sa.Integer(),
            nullable=False,
            comment="Process id of the PostgreSQL connection that counted the rows. 0 for folded rows and on SQLite.",
        ),
        sa.Column(
            "tweets",
            sa.Integer(),
            nullable=False,
            comment="Number of predictions. Negative when a shard counted more deletions than insertions.",
        ),
        sa.Column("probability_sum", sa.Double(), nullable=False, comment="Sum of probability over the predictions."),
        sa.ForeignKeyConstraint(["model_version_id"], ["model_versions.id"], name=f"fk_{TABLE}_model_version_id"),
        sa.PrimaryKeyConstraint(*KEY.split(", "), name=f"pk_{TABLE}"),
        comment="Sums of predictions by model version, day of arrival, label and bins of v_drift, which triggers "
        "update. Add up the shards of a key.",
    )
    if postgresql:
        op.execute("LOCK TABLE tweets, predictions IN SHARE ROW EXCLUSIVE MODE")
    op.execute(count(ALL_ROWS, MANY))
    create_triggers()
    by_day = released("0004").LIVE_QUALITY.replace(BY_DAY_BEFORE, BY_DAY)
    replace_views({"v_live_quality": live_quality(by_day), "v_drift": drift()})


def downgrade() -> None:
    dialect = op.get_bind().dialect.name
    before = live_quality(released("0004").LIVE_QUALITY)
    replace_views({"v_live_quality": before, "v_drift": released("0003").drift(dialect)})
    for name, (table, _, _) in TRIGGERS.items():
        if dialect == "postgresql":
            op.execute(f"DROP TRIGGER {name} ON {table}")
            op.execute(f"DROP FUNCTION {name}()")
        elif table == "predictions":
            op.execute(f"DROP TRIGGER {name}")
    op.drop_table(TABLE)
