"""`tweetscore demo`: train a model, score sample tweets and query the results, with the real workers and databases."""

import time
from importlib.resources import files
from pathlib import Path

from db import predictions, registry
from db.errors import TweetscoreError, public_url
from db.readonly import run_query
from db.session import Database
from worker.app import SCORING, TRAINING, make_app, nudge
from worker.cli import output
from worker.connections import broker, model_store, open_sql, open_stream, wait_for_broker
from worker.errors import StreamAway
from worker.intake.publish_file import publish_file
from worker.intake.submit_job import submit_training
from worker.process.supervisor import Supervisor, supervise
from worker.settings import Settings
from worker.stream import embedded_valkey
from worker.stream.stream import Stream

SAMPLE = Path(str(files("training") / "sample"))
SCORING_SECONDS = 120.0
SOME_TWEETS = (
    "SELECT label, probability, text FROM v_predictions_current"
    " ORDER BY substr(tweet_id, length(tweet_id) - 1), tweet_id LIMIT 12"
)
QUERIES = (
    (
        "Tweets and mean score by label",
        "SELECT label, count(*) AS tweets, avg(score_signed) AS mean_score FROM v_predictions_current"
        " GROUP BY label ORDER BY tweets DESC",
    ),
    (
        "Topics by mean score",
        "SELECT topic, count(*) AS tweets, avg(score_signed) AS mean_score FROM v_predictions_current"
        " GROUP BY topic HAVING count(*) >= 5 ORDER BY mean_score DESC LIMIT 8",
    ),
    (
        "Tweets by day, in Japan Standard Time",
        "SELECT day_jst, sum(CASE WHEN label = 'positive' THEN tweets ELSE 0 END) AS positive,"
        " sum(CASE WHEN label = 'neutral' THEN tweets ELSE 0 END) AS neutral,"
        " sum(CASE WHEN label = 'negative' THEN tweets ELSE 0 END) AS negative"
        " FROM v_sentiment_daily_jst GROUP BY day_jst ORDER BY day_jst",
    ),
)


def run_demo(settings: Settings) -> None:
    """Start broker and workers, train, promote, publish tweets, wait for predictions and query them; then stop
    everything."""
    began = time.monotonic()
    write = output.console.print
    database = open_sql(settings)
    if settings.embedded and embedded_valkey.owner(settings.home):
        write(f"using the embedded server that already runs on {settings.home}")
    with broker(settings, output.line) as url, supervise(settings, ("train", "score"), write) as supervisor:
        write(f"started: database, broker, a training and a scoring worker ({time.monotonic() - began:.1f} s)")
        version = _train(settings, database, supervisor)
        with database.begin() as session:
            registry.assign(session, registry.CHAMPION, version)
        write(f"model {version} is the champion now\n")
        pushed = publish_file(settings, url, str(SAMPLE / "unlabelled.jsonl"))
        _wait_until_scored(settings, database, url, version, pushed.published, supervisor)
        _show_queries(settings)
    write(
        f"done in {time.monotonic() - began:.0f} s; all processes are stopped\n",
        f"database     {public_url(settings.sql_url)}",
        f"model        {model_store(settings)}",
        f"TensorBoard  {settings.boards}",
        "\nwhat next:",
        "  tweetscore up                                  keep server and workers running",
        "  tweetscore train your.csv --wait               fine-tune on your own labels",
        "  tweetscore push your.jsonl                     stream tweets for scoring",
        '  tweetscore query "SELECT * FROM v_sentiment_hourly"',
        "  tweetscore dashboard                           show charts in a browser (needs tweetscore[dashboard])",
        "  tweetscore tensorboard                         show the training run",
        sep="\n",
        soft_wrap=True,
    )


def _train(settings: Settings, database: Database, supervisor: Supervisor) -> int:
    job = submit_training(settings, database, SAMPLE / "labelled.csv", "fast")
    nudge(make_app(settings), TRAINING)
    job = output.follow(database, job.id, supervisor.watch)
    output.job_summary(database, job)
    with database.read() as session:
        version = registry.of_job(session, job.id)
    if version is None:
        raise TweetscoreError(f"the demo's job ended {job.state}; its worker's log is in {settings.logs}")
    return version.id


def _wait_until_scored(
    settings: Settings, database: Database, url: str, version: int, expected: int, supervisor: Supervisor
) -> None:
    stream, began = open_stream(settings, url), time.monotonic()
    nudge(make_app(settings), SCORING)
    with output.bar() as progress:
        shown = progress.add_task("scoring", total=expected)
        while True:
            with database.read() as session:
                scored = predictions.prediction_count(session, version)
            progress.update(shown, completed=scored)
            if scored >= expected and _nothing_pending(settings, stream):
                break
            if time.monotonic() - began > SCORING_SECONDS:
                raise TweetscoreError(
                    f"only {scored} of {expected} tweets were scored in {SCORING_SECONDS:.0f} s; see {settings.logs}"
                )
            supervisor.watch()
            time.sleep(0.05)
    output.console.print(f"scored {expected} tweets in {time.monotonic() - began:.1f} s from publishing to rows")


def _nothing_pending(settings: Settings, stream: Stream) -> bool:
    try:
        return stream.depth().pending == 0
    except StreamAway:
        wait_for_broker(settings, output.line)
        return False


def _show_queries(settings: Settings) -> None:
    with run_query(settings.sql_url, SOME_TWEETS) as (columns, rows):
        output.table("Some of the tweets", columns, rows)
    for question, sql in QUERIES:
        with run_query(settings.sql_url, sql) as (columns, rows):
            output.console.print(f"\n{sql}", style="dim", soft_wrap=True)
            output.table(question, columns, rows)
