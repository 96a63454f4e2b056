"""`tweetscore demo`: train a model, score sample tweets and query the results, with the real workers and databases."""

import csv
import tempfile
import time
from itertools import islice
from pathlib import Path

from db import predictions, registry
from db.errors import TweetscoreError, public_url
from db.querying.readonly import run_query
from db.session import Database
from training.data.dataset import PART_NAMES
from training.data.sample import LABELLED, UNLABELLED
from worker.app import SCORING, TRAINING, make_app, nudge
from worker.cli import output
from worker.cli.training import job_output
from worker.connections import broker, model_store, open_sql, open_stream, wait_for_broker
from worker.errors import StreamAway
from worker.intake.publish_file import publish_file
from worker.intake.submit_job import submit_training
from worker.process.supervisor import Supervisor, supervise
from worker.quality.promotion import promote
from worker.settings import Settings
from worker.stream import embedded_valkey
from worker.stream.sharded_stream import TweetStream

SCORING_SECONDS = 120.0
# As many rows as two cores train on in most of the demo's minute.
DEMO_ROWS = 4_000
# A mixture of topics and labels, the same in every run.
SOME_TWEETS = (
    "SELECT label, probability, text FROM v_predictions_current"
    " ORDER BY substr(tweet_id, length(tweet_id) - 1), tweet_id LIMIT 7"
)
# Printed with their results, so each fits on one line of a terminal with 100 columns.
QUERIES = (
    "SELECT label, count(*) AS tweets, avg(score_signed) AS score FROM v_predictions_current GROUP BY 1",
    "SELECT topic, tweets, share FROM v_topic_sentiment WHERE label = 'positive' ORDER BY 2 DESC LIMIT 4",
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
        # Forced: the demo shows its own model, even on a home that has a better one.
        promote(database, version, force=True)
        write(f"model {version} is the champion now")
        pushed = publish_file(settings, url, str(UNLABELLED))
        _wait_until_scored(settings, database, url, version, pushed.published, supervisor)
        _show_queries(settings)
    write(
        f"\ndone in {time.monotonic() - began:.0f} s; all processes are stopped",
        f"database     {public_url(settings.sql_url)}",
        f"model        {model_store(settings)}",
        f"TensorBoard  {settings.boards}",
        "\nwhat next:",
        "  tweetscore up                       keep server and workers running",
        "  tweetscore train your.csv --wait    fine-tune on your own labels",
        "  tweetscore push your.jsonl          publish tweets for scoring",
        f"  tweetscore models show {version:<13}all test metrics of the model",
        '  tweetscore query "SELECT * FROM v_sentiment_daily_jst"',
        sep="\n",
        soft_wrap=True,
    )


def _train(settings: Settings, database: Database, supervisor: Supervisor) -> int:
    with tempfile.TemporaryDirectory(prefix="tweetscore-") as folder:
        dataset = Path(folder) / LABELLED.name
        _write_rows(dataset, DEMO_ROWS)
        job = submit_training(settings, database, dataset, "fast", epochs=1, add_sample=False)
    nudge(make_app(settings), TRAINING)
    job = job_output.follow(database, job.id, supervisor.watch)
    with database.read() as session:
        version = registry.of_job(session, job.id)
        metrics = registry.metrics(session, version.id) if version else {}
    if version is None:
        job_output.job_summary(database, job)
        raise TweetscoreError(f"the demo's job {job.state}; the log of its worker is in {settings.logs}")
    sizes = job.data_report["sizes"] if job.data_report else {}
    rows = ", ".join(f"{sizes.get(part, 0):,} {name} rows" for part, name in PART_NAMES.items())
    output.console.print(f"job {job.id} {job.state}: {rows}", soft_wrap=True)
    output.compact_table(("test rows", "model", "TF-IDF", "majority"), _test_metrics(metrics))
    return version.id


def _write_rows(path: Path, count: int) -> None:
    """Write the first rows of the sample, whose order is random. A tweet can contain line breaks."""
    with LABELLED.open(encoding="utf-8", newline="") as source, path.open("w", encoding="utf-8", newline="") as target:
        csv.writer(target).writerows(islice(csv.reader(source), 1 + count))


def _test_metrics(metrics: dict[tuple[str, str], float]) -> list[tuple[str | float | None, ...]]:
    """Return accuracy and macro-F1 of the model and of the baselines."""
    return [
        (name, *(metrics.get((f"{baseline}{metric}", "")) for baseline in ("", "tfidf_", "majority_")))
        for metric, name in (("accuracy", "accuracy"), ("f1_macro", "F1 macro"))
    ]


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
                    f"only {scored} of {expected} tweets were scored in {SCORING_SECONDS:.0f} s; look at the logs in "
                    f"{settings.logs}"
                )
            supervisor.watch()
            time.sleep(0.05)
    output.console.print(
        f"scored {expected} tweets in {time.monotonic() - began:.1f} s, from publishing to the last row\n"
    )


def _nothing_pending(settings: Settings, stream: TweetStream) -> bool:
    try:
        return stream.depth().pending == 0
    except StreamAway:
        wait_for_broker(settings, output.line)
        return False


def _show_queries(settings: Settings) -> None:
    with run_query(settings.sql_url, SOME_TWEETS) as (columns, rows):
        output.compact_table(columns, rows)
    for sql in QUERIES:
        with run_query(settings.sql_url, sql) as (columns, rows):
            output.console.print(f"\n{sql}", style="dim", soft_wrap=True)
            output.compact_table(columns, rows)
