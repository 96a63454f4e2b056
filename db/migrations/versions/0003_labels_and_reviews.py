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
CHAMPION = "(SELECT a.model_version_id FROM model_aliases AS a WHERE a.alias = 'champion' ORDER BY a.id DESC LIMIT 1)"
# Figures of labels: a continuous model has none, and a multi-label model has several of a row.
SINGLE_LABEL = """
    SELECT m.id FROM model_versions AS m LEFT JOIN training_jobs AS j ON j.id = m.job_id
    WHERE m.id = {champion} AND coalesce(j.config ->> 'task', 'single_label') IN ('single_label', 'ordinal')
      AND CAST(m.labels AS TEXT) <> '["value"]'"""
DAY = {"sqlite": "substr(t.received_at, 1, 10)", "postgresql": "(t.received_at AT TIME ZONE 'UTC')::date"}
# The first of so many days, today's included, as a day and as a time.
FIRST_DAY = {
    "sqlite": "date('now', '-{before} days')",
    "postgresql": "((now() AT TIME ZONE 'UTC')::date - {before})",
}
FIRST_TIME = {
    "sqlite": "date('now', '-{before} days')",
    "postgresql": "((now() AT TIME ZONE 'UTC')::date - {before})::timestamp AT TIME ZONE 'UTC'",
}
# Both databases must compute the joint counts once. SQLite sorts the texts themselves unless a limit separates the
# computed columns from the grouping.
APART = {"sqlite": "LIMIT -1", "postgresql": ""}

# A label stands for all tweets of its day: its weight is the number of the day's tweets by the number of its labels.
# `z` is the 97.5 % quantile of the normal distribution, and 0.03 the half width of the interval that is wanted.
LIVE_QUALITY = """
    WITH champion AS ({single_label}),
    by_day AS (
        SELECT {day} AS day, count(*) AS tweets, sum(p.probability) AS sure
        FROM tweets AS t JOIN predictions AS p ON p.tweet_id = t.tweet_id
        WHERE p.model_version_id = (SELECT id FROM champion) AND t.received_at >= {first_time}
        GROUP BY 1),
    labelled AS (
        SELECT {day} AS day, v.label AS actual, p.label AS predicted
        FROM review_tweets AS r JOIN v_labels AS v ON v.tweet_id = r.tweet_id
        JOIN tweets AS t ON t.tweet_id = r.tweet_id JOIN predictions AS p ON p.tweet_id = r.tweet_id
        WHERE r.reason = 'random' AND p.model_version_id = (SELECT id FROM champion)
          AND t.received_at >= {first_time}),
    labelled_days AS (
        SELECT l.day, count(*) AS labels, d.tweets FROM labelled AS l JOIN by_day AS d ON d.day = l.day
        GROUP BY l.day, d.tweets),
    periods AS (SELECT 7 AS days, {first_of_7} AS first_day UNION ALL SELECT 30, {first_of_30}),
    weighted AS (
        SELECT e.days, l.actual, l.predicted, CAST(d.tweets AS DOUBLE PRECISION) / d.labels AS weight
        FROM periods AS e JOIN labelled AS l ON l.day >= e.first_day JOIN labelled_days AS d ON d.day = l.day),
    sides AS (
        SELECT days, actual AS label, weight, CASE WHEN actual = predicted THEN weight ELSE 0 END AS hit
        FROM weighted
        UNION ALL SELECT days, predicted, weight, 0 FROM weighted),
    f1 AS (
        SELECT days, avg(f1) AS f1_macro
        FROM (SELECT days, label, 2 * sum(hit) / sum(weight) AS f1 FROM sides GROUP BY days, label) AS each_label
        GROUP BY days),
    right_share AS (
        SELECT days, count(*) AS labels, sum(CASE WHEN actual = predicted THEN weight ELSE 0 END) / sum(weight) AS p,
               sum(weight) * sum(weight) / sum(weight * weight) AS n
        FROM weighted GROUP BY days),
    whole AS (
        SELECT e.days, coalesce(sum(d.tweets), 0) AS tweets,
               coalesce(sum(CASE WHEN l.day IS NOT NULL THEN d.tweets END), 0) AS covered_tweets,
               sum(d.sure) / sum(d.tweets) AS expected
        FROM periods AS e LEFT JOIN by_day AS d ON d.day >= e.first_day LEFT JOIN labelled_days AS l ON l.day = d.day
        GROUP BY e.days),
    figures AS (
        SELECT c.id, w.days, w.tweets, w.covered_tweets, w.expected, s.labels, s.p, s.n, f.f1_macro, x.value AS tested,
               3.841458820694124 AS zz, coalesce(s.p, x.value, w.expected) AS guess
        FROM champion AS c CROSS JOIN whole AS w
        LEFT JOIN right_share AS s ON s.days = w.days LEFT JOIN f1 AS f ON f.days = w.days
        LEFT JOIN test_metrics AS x ON x.model_version_id = c.id AND x.metric = 'accuracy' AND x.label = '')
    SELECT id AS model_version_id, days, CAST(coalesce(labels, 0) AS BIGINT) AS labels,
           CAST(tweets AS BIGINT) AS tweets, CAST(covered_tweets AS BIGINT) AS covered_tweets, p AS accuracy,
           (p + zz / (2 * n) - sqrt(zz * (p * (1 - p) / n + zz / (4 * n * n)))) / (1 + zz / n) AS accuracy_low,
           (p + zz / (2 * n) + sqrt(zz * (p * (1 - p) / n + zz / (4 * n * n)))) / (1 + zz / n) AS accuracy_high,
           n AS effective_labels, f1_macro, expected AS expected_accuracy, tested AS test_accuracy,
           CAST(ceil(coalesce(labels / n, 1) * zz * 2 * (0.25 - 0.0009) / (
               sqrt((guess * (1 - guess) - 0.0018) * (guess * (1 - guess) - 0.0018) + 4 * (0.25 - 0.0009) * 0.0009)
               - (guess * (1 - guess) - 0.0018))) AS BIGINT) AS labels_needed
    FROM figures"""

# Links and mentions are cleaned away before a model reads a text, and test rows hold cleaned text. SQLite has no
# regular expressions, so each link counts as 24 characters and each mention as 12, spaces included.
CLEANED_LENGTH = """length(t.text)
                   - CASE WHEN {position}(t.text, 'http') > 0
                          THEN 6 * (length(t.text) - length(replace(t.text, 'http', ''))) ELSE 0 END
                   - CASE WHEN {position}(t.text, '@') > 0
                          THEN 12 * (length(t.text) - length(replace(t.text, '@', ''))) ELSE 0 END"""
POSITION = {"sqlite": "instr", "postgresql": "strpos"}
LENGTH_BIN = """CASE WHEN chars < 10 THEN '0' WHEN chars < 20 THEN '1' WHEN chars < 40 THEN '2'
                    WHEN chars < 80 THEN '3' WHEN chars < 140 THEN '4' ELSE '5' END"""
UNKNOWN_BIN = """CASE WHEN {of}.unknown_share <= 0 THEN '0' WHEN {of}.unknown_share <= 0.02 THEN '1'
                    WHEN {of}.unknown_share <= 0.05 THEN '2' WHEN {of}.unknown_share <= 0.1 THEN '3'
                    WHEN {of}.unknown_share > 0.1 THEN '4' END"""
# Counts by what is compared: labels, length and share of unknown tokens.
BY_BIN = """
        SELECT {day}'labels' AS what, label AS bin, sum(n) AS n FROM {of} GROUP BY {group}label
        UNION ALL SELECT {day}'length', chars, sum(n) FROM {of} GROUP BY {group}chars
        UNION ALL SELECT {day}'unknown', unknown, sum(n) FROM {of} WHERE unknown IS NOT NULL GROUP BY {group}unknown"""
# An empty bin counts as half a row. A bin that is empty on both sides does not count.
DRIFT = """
    WITH live AS (
        SELECT day, label, {length_bin} AS chars, unknown, count(*) AS n, sum(sure) AS sure
        FROM (
            SELECT {day} AS day, p.label, {cleaned_length} AS chars, {unknown_live} AS unknown, p.probability AS sure
            FROM tweets AS t JOIN predictions AS p ON p.tweet_id = t.tweet_id
            WHERE p.model_version_id = {champion} AND t.received_at >= {first_time}
            {apart}) AS found
        GROUP BY 1, 2, 3, 4),
    tested AS (
        SELECT label, {length_bin} AS chars, unknown, count(*) AS n, sum(sure) AS sure
        FROM (
            SELECT t.predicted AS label, length(t.text) AS chars, {unknown_tested} AS unknown, t.probability AS sure
            FROM test_predictions AS t WHERE t.model_version_id = {champion}) AS found
        GROUP BY 1, 2, 3),
    days AS (
        SELECT day, sum(n) AS tweets, sum(sure) AS sure, (SELECT count(*) FROM ({single_label}) AS c) AS single
        FROM live GROUP BY day),
    live_bins AS ({live_bins}),
    test_bins AS ({test_bins}),
    live_rows AS (SELECT day, what, sum(n) AS n FROM live_bins GROUP BY day, what),
    test_rows AS (SELECT what, sum(n) AS n FROM test_bins GROUP BY what),
    bins AS (SELECT what, bin FROM test_bins UNION SELECT what, bin FROM live_bins),
    shares AS (
        SELECT r.day, r.what, coalesce(CAST(a.n AS DOUBLE PRECISION), 0.5) / r.n AS actual,
               coalesce(CAST(e.n AS DOUBLE PRECISION), 0.5) / s.n AS expected
        FROM live_rows AS r JOIN test_rows AS s ON s.what = r.what JOIN bins AS b ON b.what = r.what
        LEFT JOIN live_bins AS a ON a.day = r.day AND a.what = b.what AND a.bin = b.bin
        LEFT JOIN test_bins AS e ON e.what = b.what AND e.bin = b.bin
        WHERE a.n IS NOT NULL OR e.n IS NOT NULL),
    psi AS (SELECT day, what, sum((actual - expected) * ln(actual / expected)) AS value FROM shares GROUP BY day, what)
    SELECT {champion} AS model_version_id, d.day, CAST(d.tweets AS BIGINT) AS tweets,
           CASE WHEN d.single > 0 THEN d.sure / d.tweets END AS expected_accuracy,
           CASE WHEN d.single > 0 THEN (SELECT sum(sure) / sum(n) FROM tested) END AS test_expected_accuracy,
           max(CASE WHEN x.what = 'labels' AND d.single > 0 THEN x.value END) AS psi_labels,
           max(CASE WHEN x.what = 'length' THEN x.value END) AS psi_length,
           max(CASE WHEN x.what = 'unknown' THEN x.value END) AS psi_unknown
    FROM days AS d LEFT JOIN psi AS x ON x.day = d.day
    GROUP BY d.day, d.tweets, d.sure, d.single"""


def live_quality(dialect: str) -> str:
    return LIVE_QUALITY.format(
        single_label=SINGLE_LABEL.format(champion=CHAMPION),
        day=DAY[dialect],
        first_time=FIRST_TIME[dialect].format(before=29),
        first_of_7=FIRST_DAY[dialect].format(before=6),
        first_of_30=FIRST_DAY[dialect].format(before=29),
    )


def drift(dialect: str) -> str:
    return DRIFT.format(
        single_label=SINGLE_LABEL.format(champion=CHAMPION),
        champion=CHAMPION,
        day=DAY[dialect],
        first_time=FIRST_TIME[dialect].format(before=89),
        apart=APART[dialect],
        cleaned_length=CLEANED_LENGTH.format(position=POSITION[dialect]),
        length_bin=LENGTH_BIN,
        unknown_live=UNKNOWN_BIN.format(of="p"),
        unknown_tested=UNKNOWN_BIN.format(of="t"),
        live_bins=BY_BIN.format(of="live", day="day, ", group="day, "),
        test_bins=BY_BIN.format(of="tested", day="", group=""),
    )


def views(dialect: str) -> dict[str, str]:
    """The bodies of the views by name, in the order in which they are created."""
    return {"v_labels": LABELLED, "v_live_quality": live_quality(dialect), "v_drift": drift(dialect)}


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
    "v_live_quality": (
        (
            "How right the current champion is on tweets of the last 7 and 30 days, by the labels of tweets that "
            "were picked at random. Empty for a multi-label or continuous champion."
        ),
        {
            "model_version_id": "The champion.",
            "days": "Length of the period in days of arrival (UTC), today's included: 7 or 30.",
            "labels": (
                "Number of tweets that the champion scored and people labelled, and that were picked at random. "
                "Other picks do not count: they are not typical."
            ),
            "tweets": "Number of tweets of the period that the champion scored.",
            "covered_tweets": (
                "Number of these tweets that arrived on days with labels. The figures of labels describe only them."
            ),
            "accuracy": (
                "Accuracy on the labelled tweets, 0 to 1. Each label has the weight of its day: tweets by labels. "
                "NULL without labels."
            ),
            "accuracy_low": "Lower end of the 95 % Wilson interval of accuracy, from effective_labels.",
            "accuracy_high": "Upper end of the 95 % Wilson interval of accuracy, from effective_labels.",
            "effective_labels": (
                "Number of equally weighted labels that would be as precise (Kish): at most labels. NULL without "
                "labels."
            ),
            "f1_macro": "Macro-F1 over the labels that occur, weighted as accuracy, 0 to 1. NULL without labels.",
            "expected_accuracy": (
                "Mean probability of all predictions of the period, 0 to 1: the accuracy if the probabilities are "
                "right."
            ),
            "test_accuracy": "Accuracy on the test rows, 0 to 1. NULL when it was not measured.",
            "labels_needed": (
                "Number of labels of the period with which the interval of accuracy would be plus or minus 3 points."
            ),
        },
    ),
    "v_drift": (
        (
            "How the tweets of a day differ from the test rows of the current champion, for the last 90 days. A "
            "population stability index (PSI) below 0.1 is little, above 0.25 much. An empty bin counts as half a "
            "row."
        ),
        {
            "model_version_id": "The champion.",
            "day": "Day of arrival, UTC.",
            "tweets": (
                "Number of tweets of the day that the champion scored. Chance alone makes the PSI of few tweets large."
            ),
            "expected_accuracy": (
                "Mean probability of the predictions, 0 to 1. NULL for a multi-label or continuous champion."
            ),
            "test_expected_accuracy": (
                "Mean probability of the test rows' predictions, 0 to 1. NULL where expected_accuracy is, and "
                "without test rows."
            ),
            "psi_labels": "PSI of the predicted labels. NULL where expected_accuracy is, and without test rows.",
            "psi_length": (
                "PSI of the length in characters, in the bins 0-9, 10-19, 20-39, 40-79, 80-139 and 140 or more. Of a "
                "tweet, 24 are taken off per link and 12 per mention, which cleaning removes. NULL without test "
                "rows."
            ),
            "psi_unknown": (
                "PSI of the share of unknown tokens, in the bins 0, to 2 %, to 5 %, to 10 % and above. NULL without "
                "rows that have the share, which releases before 0.2 did not write."
            ),
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
    dialect = op.get_bind().dialect.name
    for name, body in views(dialect).items():
        op.execute(f"CREATE VIEW {name} AS {body}")
    if dialect == "postgresql":
        for name, (comment, columns) in COMMENTS.items():
            op.execute(f"COMMENT ON VIEW {name} IS {quoted(comment)}")
            for column, text in columns.items():
                op.execute(f"COMMENT ON COLUMN {name}.{column} IS {quoted(text)}")


def downgrade() -> None:
    for name in reversed(COMMENTS):
        op.execute(f"DROP VIEW {name}")
    for table in ("predictions", "test_predictions"):
        op.drop_column(table, "unknown_share")
    for table in ("webhook_events", "review_asks", "review_tweets", "labels"):
        op.drop_table(table)
