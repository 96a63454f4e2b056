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


def required(name: str, kind: Any, comment: str, **more: Any) -> Column:
    return sa.Column(name, kind, nullable=False, comment=comment, **more)


def optional(name: str, kind: Any, comment: str, **more: Any) -> Column:
    return sa.Column(name, kind, nullable=True, comment=comment, **more)


def create_dead_letters() -> None:
    op.create_table(
        "dead_letters",
        required("record_id", sa.Text(), "Id of the record in the stream."),
        required("payload", sa.LargeBinary(), "Bytes of the record's field tweet."),
        optional(
            "other_fields",
            JSON,
            (
                "JSON array: name and value of every field, in order, with null for the payload and base64 "
                "for bytes. NULL when tweet is the only field."
            ),
        ),
        required("reason", sa.Text(), "Why the record cannot be scored."),
        required("attempts", sa.Integer(), "How often the record was delivered to a worker."),
        required("buried_at", TIME, "Time at which it became a dead letter, UTC."),
        sa.PrimaryKeyConstraint("record_id", name="pk_dead_letters"),
        comment="One row per record that cannot be scored, byte for byte, until it is retried or dropped.",
    )
    op.create_index("ix_dead_letters_buried_at", "dead_letters", ["buried_at"])


def create_schema_compatibility() -> None:
    table = op.create_table(
        "schema_compatibility",
        required(
            "oldest_code", sa.Text(), "The newest migration of the oldest release that can work with this schema."
        ),
        sa.PrimaryKeyConstraint("oldest_code", name="pk_schema_compatibility"),
        comment="One row: which releases can work with this schema.",
    )
    op.bulk_insert(table, [{"oldest_code": revision}])


def training_job_request() -> list[Column]:
    return [
        required("id", sa.Integer(), "Id of the job, rising."),
        required(
            "request_id",
            sa.Text(),
            "Id of the request, such as the id of a Celery message. A repeated request finds its job.",
        ),
        required("state", sa.Text(), "State of the job: queued, running, succeeded, failed or cancelled."),
        required("config", JSON, "JSON object: the training configuration."),
        required("dataset", sa.Text(), "Path or URL of the labelled dataset."),
        optional(
            "dataset_sha256",
            sa.Text(),
            "SHA-256 of the dataset, in hexadecimal. NULL until a worker has read the dataset.",
        ),
        optional(
            "lease_owner",
            sa.Text(),
            "Name of the worker that claimed the job last. NULL when the lease was released.",
        ),
        optional(
            "lease_expires_at",
            TIME,
            "End of the lease, UTC; on a queued job, the earliest next start. NULL when neither applies.",
        ),
        required(
            "fencing_token",
            sa.Integer(),
            "Number of claims so far. Only the worker with the newest token may write the job.",
        ),
        required(
            "attempts",
            sa.Integer(),
            "Number of starts that count against the limit. Interrupted starts are subtracted.",
        ),
    ]


def training_job_progress() -> list[Column]:
    return [
        required("cancel_requested", sa.Boolean(), "True once a user has requested cancellation."),
        required("step", sa.Integer(), "Optimizer steps done."),
        optional("total_steps", sa.Integer(), "Optimizer steps in all. NULL before the first step."),
        optional("loss", sa.Double(), "Training loss of a recent step. NULL before the first one."),
        optional(
            "samples_per_second",
            sa.Double(),
            "Training rows per second, measured recently. NULL before the first measurement.",
        ),
        required("submitted_at", TIME, "Time at which the job was submitted, UTC."),
        optional(
            "started_at", TIME, "Time of the first start, UTC. NULL before it, and after a retry until the next start."
        ),
        optional(
            "finished_at", TIME, "Time at which the job succeeded, failed or was cancelled, UTC. NULL until then."
        ),
        optional("error", sa.Text(), "Why the job failed or what it waits for. NULL when there is nothing to report."),
        optional(
            "data_report",
            JSON,
            ("JSON object: what was found in the dataset, such as sizes and duplicates. NULL until it was read."),
        ),
        optional(
            "message",
            sa.Text(),
            ("The Celery message that requested the job. NULL for other jobs and after its sender got the result."),
        ),
        optional(
            "answer_due_at",
            TIME,
            "Time, UTC, until which one worker sends the result to the requester. NULL when none has begun.",
        ),
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
        comment="One row per request to train a model: its configuration, state, lease and progress.",
    )
    op.create_index("ix_training_jobs_state_lease_expires_at", "training_jobs", ["state", "lease_expires_at"])


def create_tweets() -> None:
    op.create_table(
        "tweets",
        required(
            "tweet_id", sa.Text(), "Id of the tweet, as text: ids exceed 2^53, where JSON readers start to round."
        ),
        required("text", sa.Text(), "Text of the tweet, as received and before cleaning."),
        optional("author_id", sa.Text(), "Id of the author. NULL when the record had none."),
        optional(
            "lang", sa.Text(), "Language code that the publisher gave, such as ja. NULL when the record had none."
        ),
        optional(
            "topic", sa.Text(), "Topic that the publisher or the filter rule gave. NULL when the record had none."
        ),
        optional("tweet_created_at", TIME, "Time at which the tweet was written, UTC. NULL when the record had none."),
        required("received_at", TIME, "Time at which the stream received it, UTC."),
        optional("retweeted_id", sa.Text(), "Id of the tweet that it repeats. NULL for no retweet."),
        optional("quoted_id", sa.Text(), "Id of the tweet that it quotes. NULL for no quote."),
        optional("replied_to_id", sa.Text(), "Id of the tweet that it answers. NULL for no reply."),
        sa.PrimaryKeyConstraint("tweet_id", name="pk_tweets"),
        comment="One row per tweet, with the text as it was received. A repeated tweet keeps its first row.",
    )
    op.create_index("ix_tweets_received_at", "tweets", ["received_at"])


def create_epoch_metrics() -> None:
    op.create_table(
        "epoch_metrics",
        required("job_id", sa.Integer(), "The training job."),
        required("epoch", sa.Integer(), "Number of the epoch, from 1."),
        required("train_loss", sa.Double(), "Mean training loss over the rows of the epoch."),
        required("learning_rate", sa.Double(), "Learning rate of the last step of the epoch."),
        required("valid_loss", sa.Double(), "Mean loss over the validation rows."),
        required("valid_accuracy", sa.Double(), "Accuracy on the validation rows, 0 to 1."),
        required("valid_f1_macro", sa.Double(), "Macro-F1 on the validation rows, 0 to 1."),
        required("seconds", sa.Double(), "Duration of the epoch in seconds, validation included."),
        required(
            "kept",
            sa.Boolean(),
            "True when the weights of this epoch replaced those of the best epoch before it.",
            server_default=sa.true(),
        ),
        sa.ForeignKeyConstraint(["job_id"], ["training_jobs.id"], name="fk_epoch_metrics_job_id", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("job_id", "epoch", name="pk_epoch_metrics"),
        comment="One row per epoch of a training job. An epoch that is repeated replaces its row.",
    )


def create_model_versions() -> None:
    op.create_table(
        "model_versions",
        required("id", sa.Integer(), "Id of the model version, rising."),
        optional("job_id", sa.Integer(), "The job that trained it. NULL when no job did."),
        required("base_model", sa.Text(), "Hub name or folder of the base model that was fine-tuned."),
        optional("base_revision", sa.Text(), "Hub commit of the base model. NULL for a base model without one."),
        required("artifact_url", sa.Text(), "URL of the folder that holds the artifact."),
        required(
            "sha256",
            sa.Text(),
            "SHA-256 of the artifact's list of file digests, in hexadecimal; checked whenever it is loaded.",
        ),
        required("labels", JSON, "JSON array: the labels, in the order of the model's outputs."),
        required("cleaner_version", sa.Text(), "Version of the text cleaning that the model was trained with."),
        required("temperature", sa.Double(), "Divisor of the logits that calibrates the probabilities, above 0."),
        required("created_at", TIME, "Time at which it was registered, UTC."),
        optional("deleted_at", TIME, "Time at which it was deleted, UTC. NULL for a usable version."),
        sa.ForeignKeyConstraint(["job_id"], ["training_jobs.id"], name="fk_model_versions_job_id"),
        sa.PrimaryKeyConstraint("id", name="pk_model_versions"),
        sa.UniqueConstraint("job_id", name="uq_model_versions_job_id"),
        comment="One row per trained model: its artifact, labels and calibration.",
    )


def create_confusion_cells() -> None:
    op.create_table(
        "confusion_cells",
        required("model_version_id", sa.Integer(), "The model version."),
        required("actual", sa.Text(), "The label in the dataset."),
        required("predicted", sa.Text(), "The label that the model predicted."),
        required("count", sa.Integer(), "Number of test rows."),
        sa.ForeignKeyConstraint(
            ["model_version_id"], ["model_versions.id"], name="fk_confusion_cells_model_version_id", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("model_version_id", "actual", "predicted", name="pk_confusion_cells"),
        comment="One row per cell of a model version's confusion matrix on the test split.",
    )


def create_model_aliases() -> None:
    op.create_table(
        "model_aliases",
        required("id", sa.Integer(), "Id of the assignment, rising with time."),
        required("alias", sa.Text(), "champion, whose predictions the views show, or challenger."),
        required("model_version_id", sa.Integer(), "The model version that the alias points to from then on."),
        required("assigned_at", TIME, "Time of the assignment, UTC."),
        sa.ForeignKeyConstraint(["model_version_id"], ["model_versions.id"], name="fk_model_aliases_model_version_id"),
        sa.PrimaryKeyConstraint("id", name="pk_model_aliases"),
        comment="One row per assignment of an alias to a model version. The newest row of an alias counts.",
    )
    op.create_index("ix_model_aliases_alias_id", "model_aliases", ["alias", "id"])


def create_predictions() -> None:
    op.create_table(
        "predictions",
        required("tweet_id", sa.Text(), "The tweet that was scored."),
        required("model_version_id", sa.Integer(), "The model version that scored it."),
        required(
            "label",
            sa.Text(),
            "The predicted label. A multi-label model joins all labels of probability 0.5 or more with |.",
        ),
        required(
            "probability",
            sa.Double(),
            "Calibrated probability of the label, 0 to 1. Multi-label: of the least certain yes or no.",
        ),
        optional(
            "score_signed",
            sa.Double(),
            "Polarity of the labels, weighted by probability, -1 to 1. NULL when no label has a polarity.",
        ),
        required("probabilities", JSON, "JSON object: the calibrated probability of every label, 0 to 1."),
        required("scored_at", TIME, "Time at which the prediction was made, UTC."),
        sa.ForeignKeyConstraint(["model_version_id"], ["model_versions.id"], name="fk_predictions_model_version_id"),
        sa.ForeignKeyConstraint(["tweet_id"], ["tweets.tweet_id"], name="fk_predictions_tweet_id", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("tweet_id", "model_version_id", name="pk_predictions"),
        comment="One row per tweet and model version: the label that the model predicted.",
    )
    op.create_index(
        "ix_predictions_model_version_id_probability_label", "predictions", ["model_version_id", "probability", "label"]
    )
    op.create_index("ix_predictions_model_version_id_scored_at", "predictions", ["model_version_id", "scored_at"])


def create_scoring_windows() -> None:
    op.create_table(
        "scoring_windows",
        required("id", sa.Integer(), "Id of the window, rising."),
        required("worker", sa.Text(), "Name of the worker that scored the window."),
        required("model_version_id", sa.Integer(), "The model version that scored it."),
        required("started_at", TIME, "Time at which the window began, UTC."),
        required("tweets", sa.Integer(), "Number of tweets that were scored."),
        required("buried", sa.Integer(), "Number of records that became dead letters."),
        required("tokens", sa.Integer(), "Number of tokens of the tweets, without padding."),
        required("padded_tokens", sa.Integer(), "Number of tokens that the device processed, with padding."),
        required("read_ms", sa.Double(), "Milliseconds spent reading the records from the stream."),
        required("tokenise_ms", sa.Double(), "Milliseconds spent cleaning and tokenising the texts."),
        required("forward_ms", sa.Double(), "Milliseconds spent in the forward passes of the model."),
        required("store_ms", sa.Double(), "Milliseconds spent writing the rows, without the commit."),
        sa.ForeignKeyConstraint(
            ["model_version_id"], ["model_versions.id"], name="fk_scoring_windows_model_version_id"
        ),
        sa.PrimaryKeyConstraint("id", name="pk_scoring_windows"),
        comment="One row per window, which is a set of records that a worker scored and committed together.",
    )
    op.create_index("ix_scoring_windows_started_at", "scoring_windows", ["started_at"])


def create_sentiment_rollup() -> None:
    op.create_table(
        "sentiment_rollup",
        required("model_version_id", sa.Integer(), "The model version that made the predictions."),
        required("hour", TIME, "Start of the hour, UTC, in which the tweets were written, or else received."),
        required("topic", sa.Text(), "Topic of the tweets. Empty for tweets without one."),
        required("label", sa.Text(), "The predicted label."),
        required(
            "shard",
            sa.Integer(),
            "Process id of the PostgreSQL connection that counted the rows. 0 for folded rows and on SQLite.",
        ),
        required(
            "tweets",
            sa.Integer(),
            "Number of predictions. Negative when a shard counted more deletions than insertions.",
        ),
        required("probability_sum", sa.Double(), "Sum of probability over the predictions."),
        required("score_sum", sa.Double(), "Sum of score_signed over the predictions that have one."),
        required("with_score", sa.Integer(), "Number of predictions whose score_signed is not NULL."),
        sa.ForeignKeyConstraint(
            ["model_version_id"], ["model_versions.id"], name="fk_sentiment_rollup_model_version_id"
        ),
        sa.PrimaryKeyConstraint("model_version_id", "hour", "topic", "label", "shard", name="pk_sentiment_rollup"),
        comment=(
            "Sums of predictions by model version, hour, topic and label, which triggers update. Add "
            "up the shards of a key."
        ),
    )


def create_test_metrics() -> None:
    op.create_table(
        "test_metrics",
        required("model_version_id", sa.Integer(), "The model version."),
        required(
            "metric",
            sa.Text(),
            "Name of the metric. _low and _high: ends of its 95 % interval. tfidf_ and majority_: of a baseline.",
        ),
        required("label", sa.Text(), "The label that was measured. Empty for the whole test split."),
        required("value", sa.Double(), "The value, in the unit of the metric; most are 0 to 1."),
        sa.ForeignKeyConstraint(
            ["model_version_id"], ["model_versions.id"], name="fk_test_metrics_model_version_id", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("model_version_id", "metric", "label", name="pk_test_metrics"),
        comment="One row per model version, metric and label, measured on the test split.",
    )


def create_test_predictions() -> None:
    op.create_table(
        "test_predictions",
        required("model_version_id", sa.Integer(), "The model version."),
        required("row_number", sa.Integer(), "Number of the row in the dataset."),
        required("text", sa.Text(), "Text of the row, cleaned as the model reads it."),
        required("actual", sa.Text(), "The label in the dataset. Several labels are joined with |."),
        required("predicted", sa.Text(), "The label that the model predicted. Several labels are joined with |."),
        required("probability", sa.Double(), "Calibrated probability of the predicted label, 0 to 1."),
        required("probabilities", JSON, "JSON object: the calibrated probability of every label, 0 to 1."),
        sa.ForeignKeyConstraint(
            ["model_version_id"], ["model_versions.id"], name="fk_test_predictions_model_version_id", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("model_version_id", "row_number", name="pk_test_predictions"),
        comment="One row per model version and test row, for error analysis.",
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
VIEW_COMMENTS = {
    "v_predictions_current": "One row per tweet that the current champion has scored, with its prediction.",
    "v_low_confidence": "Tweets for which the current champion's probability is below 0.6: candidates for labelling.",
    "v_sentiment_hourly": "Counts and means of the current champion's predictions by hour (UTC) and label.",
    "v_sentiment_daily_jst": "Counts and means of the current champion's predictions by day in Japan and label.",
    "v_topic_sentiment": "Counts and means of the current champion's predictions by topic and label.",
    "v_model_leaderboard": (
        "One row per model version that is not deleted, with its metrics on the test split. NULL: not measured."
    ),
    "v_jobs": "One row per training job, with its progress and the model version that it made.",
}
VIEW_COLUMN_COMMENTS = {
    "v_predictions_current": {
        "tweet_id": "Id of the tweet, as text: ids exceed 2^53, where JSON readers start to round.",
        "text": "Text of the tweet, as received and before cleaning.",
        "author_id": "Id of the author. NULL when the record had none.",
        "lang": "Language code that the publisher gave, such as ja. NULL when the record had none.",
        "topic": "Topic that the publisher or the filter rule gave. NULL when the record had none.",
        "tweet_created_at": "Time at which the tweet was written, UTC. NULL when the record had none.",
        "received_at": "Time at which the stream received it, UTC.",
        "model_version_id": "The model version that scored it.",
        "label": "The predicted label. A multi-label model joins all labels of probability 0.5 or more with |.",
        "probability": "Calibrated probability of the label, 0 to 1. Multi-label: of the least certain yes or no.",
        "score_signed": "Polarity of the labels, weighted by probability, -1 to 1. NULL when no label has a polarity.",
        "scored_at": "Time at which the prediction was made, UTC.",
    },
    "v_low_confidence": {
        "tweet_id": "Id of the tweet, as text: ids exceed 2^53, where JSON readers start to round.",
        "text": "Text of the tweet, as received and before cleaning.",
        "topic": "Topic that the publisher or the filter rule gave. NULL when the record had none.",
        "label": "The predicted label. A multi-label model joins all labels of probability 0.5 or more with |.",
        "probability": "Calibrated probability of the label, 0 to 1. Multi-label: of the least certain yes or no.",
        "probabilities": "JSON object: the calibrated probability of every label, 0 to 1.",
        "scored_at": "Time at which the prediction was made, UTC.",
    },
    "v_sentiment_hourly": {
        "hour_utc": "Start of the hour, UTC, in which the tweets were written, or else received.",
        "label": "The predicted label. A multi-label model joins all labels of probability 0.5 or more with |.",
        "tweets": "Number of tweets with this label.",
        "mean_probability": "Mean probability of their predictions, 0 to 1.",
        "mean_score": "Mean score_signed of their predictions, -1 to 1. NULL when no label has a polarity.",
    },
    "v_sentiment_daily_jst": {
        "day_jst": "Day in Japan (UTC+9) on which the tweets were written, or else received.",
        "label": "The predicted label. A multi-label model joins all labels of probability 0.5 or more with |.",
        "tweets": "Number of tweets with this label.",
        "mean_probability": "Mean probability of their predictions, 0 to 1.",
        "mean_score": "Mean score_signed of their predictions, -1 to 1. NULL when no label has a polarity.",
    },
    "v_topic_sentiment": {
        "topic": "Topic of the tweets. NULL for tweets without one.",
        "label": "The predicted label. A multi-label model joins all labels of probability 0.5 or more with |.",
        "tweets": "Number of tweets with this label.",
        "mean_probability": "Mean probability of their predictions, 0 to 1.",
        "mean_score": "Mean score_signed of their predictions, -1 to 1. NULL when no label has a polarity.",
        "share": "Share of the topic's tweets that have this label, 0 to 1.",
    },
    "v_model_leaderboard": {
        "model_version_id": "Id of the model version.",
        "base_model": "Hub name or folder of the base model that was fine-tuned.",
        "job_id": "The job that trained it. NULL when no job did.",
        "created_at": "Time at which it was registered, UTC.",
        "accuracy": "Accuracy, 0 to 1.",
        "f1_micro": "Micro-F1, 0 to 1.",
        "f1_macro": "Macro-F1, 0 to 1.",
        "tfidf_f1_macro": "Macro-F1 of TF-IDF with logistic regression on the same rows, 0 to 1.",
        "f1_macro_low": "Lower end of the 95 % bootstrap interval of f1_macro.",
        "f1_macro_high": "Upper end of the 95 % bootstrap interval of f1_macro.",
        "roc_auc": "Area under the ROC curve, mean over the labels, 0 to 1.",
        "ece": "Expected calibration error over 15 bins after temperature scaling, 0 to 1.",
    },
    "v_jobs": {
        "id": "Id of the job, rising.",
        "state": "State of the job: queued, running, succeeded, failed or cancelled.",
        "step": "Optimizer steps done.",
        "total_steps": "Optimizer steps in all. NULL before the first step.",
        "loss": "Training loss of a recent step. NULL before the first one.",
        "attempts": "Number of starts that count against the limit. Interrupted starts are subtracted.",
        "submitted_at": "Time at which the job was submitted, UTC.",
        "started_at": "Time of the first start, UTC. NULL before it, and after a retry until the next start.",
        "finished_at": "Time at which the job succeeded, failed or was cancelled, UTC. NULL until then.",
        "error": "Why the job failed or what it waits for. NULL when there is nothing to report.",
        "model_version_id": "The model version that the job made. NULL when it made none.",
        "epochs": "Number of the last finished epoch. NULL before the first one.",
        "best_valid_f1_macro": "Best macro-F1 on the validation rows, 0 to 1. NULL before the first epoch.",
    },
}


def create_views(dialect: str) -> None:
    parts = {name: OF_TWEET[dialect].format(name) for name in TWEET_COLUMNS}
    parts["metrics"] = ", ".join(f"max(CASE WHEN x.metric = '{name}' THEN x.value END) AS {name}" for name in METRICS)
    parts |= {"joined": JOINED[dialect], "hour_shown": HOUR_SHOWN[dialect], "day_jst": DAY_JST[dialect]}
    for name, body in VIEWS.items():
        op.execute(f"CREATE VIEW {name} AS {body.format(champion=CHAMPION, means=MEANS, **parts)}")
    if dialect == "postgresql":
        comment_on_views()


def comment_on_views() -> None:
    """SQLite has no comments."""
    for view, comment in VIEW_COMMENTS.items():
        op.execute(f"COMMENT ON VIEW {view} IS {quoted(comment)}")
        for column, text in VIEW_COLUMN_COMMENTS[view].items():
            op.execute(f"COMMENT ON COLUMN {view}.{column} IS {quoted(text)}")


def quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


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
