"""The newcomer's first command, as it is typed; and the sample tweets it runs on."""

import csv
import itertools
import json
import re
import sqlite3
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import psutil
import pytest

from db.models import Prediction, Tweet
from db.readonly import run_query
from db.session import Database
from tests.conftest import PATIENCE_SECONDS
from worker.cli.demo import QUERIES, SAMPLE, SOME_TWEETS
from worker.stream import embedded_valkey


def labelled() -> list[dict[str, str]]:
    with (SAMPLE / "labelled.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def unlabelled() -> list[dict[str, str]]:
    return [json.loads(line) for line in (SAMPLE / "unlabelled.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.slow
def test_the_demo_walks_the_whole_route_and_leaves_nothing_running(
    tweetscore_process: Callable, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    ended = tweetscore_process("demo", timeout=4 * PATIENCE_SECONDS, TWEETSCORE_ENGINE="auto")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    for part in (
        "job 1 succeeded",
        "F1 macro",
        "TF-IDF",
        "model 1 is the champion now",
        "v_sentiment_daily_jst",
        "what next",
    ):
        assert part in ended.stdout
    with closing(sqlite3.connect(home / "tweetscore.db")) as connection:
        counted = connection.execute("SELECT count(*), count(DISTINCT tweet_id) FROM predictions").fetchone()
        figures = dict(connection.execute("SELECT metric, value FROM test_metrics WHERE label = ''"))
        dead = connection.execute("SELECT count(*) FROM dead_letters").fetchone()[0]
    assert counted == (len(unlabelled()), len(unlabelled()))
    assert dead == 0
    assert figures["f1_macro"] > 0.75  # three balanced labels: a coin reaches 0.33
    events = (home / "runs" / "job-1").glob("events.out.tfevents.*")  # the hyper-parameters have a file of their own
    assert max(path.stat().st_size for path in events) > 10_000
    assert embedded_valkey.find(home) is None
    mentions = [p.pid for p in psutil.process_iter(["environ"]) if str(home) in str((p.info["environ"] or {}).values())]
    assert not mentions


def test_its_queries_are_answered_by_both_databases(
    database: Database, database_url: str, promote: Callable[[Database], int]
) -> None:
    now = datetime.now(UTC)
    version = promote(database)
    with database.begin() as session:
        for i in range(6):
            session.add(Tweet(tweet_id=f"{i}", text="良い", topic="猫", received_at=now))
            session.flush()
            session.add(
                Prediction(
                    tweet_id=f"{i}", model_version_id=version, label="positive", probability=0.9, score_signed=0.5,
                    probabilities={}, scored_at=now,
                )
            )  # fmt: skip
    for sql in (SOME_TWEETS, *QUERIES):
        with run_query(database_url, sql) as (columns, rows):
            answered = [dict(zip(columns, row, strict=True)) for row in rows]
        assert answered, sql
        assert answered[0].get("score", 0.5) == 0.5


def test_the_sample_has_enough_distinct_balanced_tweets() -> None:
    rows, others = labelled(), unlabelled()
    counts = Counter(row["label"] for row in rows)
    assert len(rows) >= 1200
    assert len(others) >= 300
    assert set(counts) == {"negative", "neutral", "positive"}
    assert max(counts.values()) <= 1.1 * min(counts.values())
    texts = [row["text"] for row in rows + others]
    assert len(set(texts)) == len(texts)
    assert len({row["id"] for row in others}) == len(others)


def test_no_sample_tweet_is_a_variation_of_another() -> None:
    def shingles(text: str) -> set[str]:
        text = re.sub(r"https?://\S+|\s", "", text)
        return {text[i : i + 3] for i in range(max(1, len(text) - 2))}

    sets = [shingles(row["text"]) for row in labelled() + unlabelled()]
    for a, b in itertools.combinations(sets, 2):
        shared = len(a & b)
        assert shared <= 4 or shared / len(a | b) <= 0.5, (a, b)


def test_the_sample_shows_what_tweets_are_made_of() -> None:
    texts = [row["text"] for row in labelled()]
    for pattern in (
        r"#\S",
        r"https://example\.(com|jp)/",
        r"@\w",
        r"[\U0001F300-\U0001FAFF]",
        r"\([^)]*[;；ω∀▽][^)]*\)",
        r"\n",
        r"ない|ません",
    ):
        assert sum(bool(re.search(pattern, text)) for text in texts) >= 10, pattern
    hosts = set(re.findall(r"https?://([^/\s]+)", " ".join(texts)))
    assert hosts == {"example.com", "example.jp"}
