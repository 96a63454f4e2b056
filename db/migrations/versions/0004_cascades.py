"""Cascades: model versions made of two others, which of them decided a prediction, and how many tweets were passed on.

Only adds, so that releases that need migration 0001 keep working. The view v_live_quality also leaves out the labels
that the parts of a cascade may have been trained on.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

JSON = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")
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
# A cascade has no job of its own: its parts may have been trained on labels that were given before their jobs.
UNSEEN = """
    NOT EXISTS (
        SELECT 1 FROM labels AS l JOIN training_jobs AS j ON l.at <= j.labels_until
        JOIN model_versions AS m ON m.job_id = j.id
        WHERE l.tweet_id = r.tweet_id AND l.source <> 'model' AND m.id IN (
            SELECT id FROM champion UNION ALL
            SELECT c.student_id FROM cascades AS c JOIN champion AS h ON h.id = c.model_version_id UNION ALL
            SELECT c.teacher_id FROM cascades AS c JOIN champion AS h ON h.id = c.model_version_id))"""
UNSEEN_BEFORE = """
    NOT EXISTS (
        SELECT 1 FROM labels AS l JOIN training_jobs AS j ON l.at <= j.labels_until
        JOIN model_versions AS m ON m.job_id = j.id
        WHERE l.tweet_id = r.tweet_id AND l.source <> 'model' AND m.id = (SELECT id FROM champion))"""
# A draw includes tweets that have labels. Counted before the other tweets of the draw, they would be too many.
FAIR = """
    (v.labelled_at >= r.picked_at OR r.place < coalesce((
        SELECT min(o.place) FROM review_tweets AS o WHERE o.reason = 'random'
          AND NOT EXISTS (SELECT 1 FROM labels AS l WHERE l.tweet_id = o.tweet_id AND l.source <> 'model')
          AND NOT EXISTS (SELECT 1 FROM review_asks AS a WHERE a.tweet_id = o.tweet_id AND a.state = 'skipped')
        ), r.place + 1))"""
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
          AND t.received_at >= {first_time} AND {unseen} AND {fair}),
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


def live_quality(dialect: str, unseen: str) -> str:
    return LIVE_QUALITY.format(
        single_label=SINGLE_LABEL.format(champion=CHAMPION),
        day=DAY[dialect],
        first_time=FIRST_TIME[dialect].format(before=29),
        unseen=unseen,
        fair=FAIR,
        first_of_7=FIRST_DAY[dialect].format(before=6),
        first_of_30=FIRST_DAY[dialect].format(before=29),
    )


def replace_live_quality(unseen: str) -> None:
    dialect = op.get_bind().dialect.name
    body = live_quality(dialect, unseen)
    # On PostgreSQL the view keeps its comments and the rights on it.
    if dialect == "postgresql":
        op.execute(f"CREATE OR REPLACE VIEW v_live_quality AS {body}")
        return
    op.execute("DROP VIEW v_live_quality")
    op.execute(f"CREATE VIEW v_live_quality AS {body}")


def upgrade() -> None:
    op.create_table(
        "cascades",
        sa.Column("model_version_id", sa.Integer(), nullable=False, comment="The cascade."),
        sa.Column("student_id", sa.Integer(), nullable=False, comment="The model version that scores every tweet."),
        sa.Column(
            "teacher_id",
            sa.Integer(),
            nullable=False,
            comment="The model version that scores the tweets that are passed on.",
        ),
        sa.Column(
            "threshold",
            sa.Double(),
            nullable=False,
            comment="A tweet is passed on when the student's probability of its label is below it, 0 to 1.",
        ),
        sa.Column(
            "planned_share",
            sa.Double(),
            nullable=False,
            comment="Share of the rows it was chosen on that are passed on, 0 to 1.",
        ),
        sa.Column(
            "keep",
            sa.Double(),
            nullable=False,
            comment="Share of the teacher's macro-F1 that the cascade was to keep, 0 to 1.",
        ),
        sa.Column(
            "bound",
            sa.Text(),
            nullable=False,
            comment="What had to be at least keep: bootstrap, the lower 5 % bound of the share, or estimate.",
        ),
        sa.Column("rows", sa.Integer(), nullable=False, comment="Number of labelled rows it was chosen on."),
        sa.Column(
            "curve",
            JSON,
            nullable=False,
            comment="JSON array of objects: threshold, share passed on, macro-F1, and its ratio to the teacher's with "
            "the lower 5 % bound, by rising share.",
        ),
        sa.ForeignKeyConstraint(["model_version_id"], ["model_versions.id"], name="fk_cascades_model_version_id"),
        sa.ForeignKeyConstraint(["student_id"], ["model_versions.id"], name="fk_cascades_student_id"),
        sa.ForeignKeyConstraint(["teacher_id"], ["model_versions.id"], name="fk_cascades_teacher_id"),
        sa.PrimaryKeyConstraint("model_version_id", name="pk_cascades"),
        comment="One row per model version that is a cascade: its student, its teacher and its threshold.",
    )
    op.add_column(
        "predictions",
        sa.Column(
            "decided_by",
            sa.Integer(),
            nullable=True,
            comment="The model version whose probabilities these are: the student or the teacher of a cascade. NULL "
            "for any other model.",
        ),
    )
    op.add_column(
        "scoring_windows",
        sa.Column(
            "passed_on",
            sa.Integer(),
            nullable=True,
            comment="Number of tweets that the student of a cascade passed on to the teacher. NULL for any other "
            "model.",
        ),
    )
    replace_live_quality(UNSEEN)


def downgrade() -> None:
    replace_live_quality(UNSEEN_BEFORE)
    op.drop_column("scoring_windows", "passed_on")
    op.drop_column("predictions", "decided_by")
    op.drop_table("cascades")
