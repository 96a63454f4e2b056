"""The newcomer's first command, as it is typed; and the sample tweets it runs on."""

import csv
import json
import re
import sqlite3
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import psutil
import pytest
from sklearn.feature_extraction.text import CountVectorizer

from db.models import Prediction, Tweet
from db.querying.readonly import run_query
from db.session import Database
from tests.conftest import PATIENCE_SECONDS
from training.data.sample import LABELLED, UNLABELLED
from training.text.cleaning import same_text_key
from worker.cli.demo import QUERIES, SOME_TWEETS
from worker.stream import embedded_valkey


def labelled() -> list[dict[str, str]]:
    with LABELLED.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def unlabelled() -> list[dict[str, str]]:
    return [json.loads(line) for line in UNLABELLED.read_text(encoding="utf-8").splitlines()]


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


def test_the_sample_has_enough_distinct_tweets_in_natural_and_in_equal_shares() -> None:
    rows, others = labelled(), unlabelled()
    counts = Counter(row["label"] for row in rows)
    balanced = Counter(row["label"] for row in rows if row["balanced"] == "yes")
    assert len(rows) >= 4_000
    assert len(others) >= 2_000
    assert set(counts) == {"negative", "neutral", "positive"}
    assert counts["neutral"] > counts["negative"] > counts["positive"]
    assert set(balanced.values()) == {counts["positive"]}
    texts = [same_text_key(row["text"]) for row in rows + others]
    assert len(set(texts)) == len(texts)
    assert len({row["id"] for row in others}) == len(others)


def test_the_readme_of_the_sample_counts_its_rows() -> None:
    readme = LABELLED.with_name("README.md").read_text(encoding="utf-8")
    counts = Counter(row["label"] for row in labelled())
    for number in (len(labelled()), len(unlabelled()), *counts.values()):
        assert f"{number:,}" in readme


def test_no_sample_tweet_is_a_variation_of_another() -> None:
    def shingles(text: str) -> set[str]:
        text = re.sub(r"https?://\S+|\s", "", text)
        return {text[i : i + 3] for i in range(max(1, len(text) - 2))}

    texts = [row["text"] for row in labelled() + unlabelled()]
    found = CountVectorizer(analyzer=shingles, binary=True).fit_transform(texts).astype(np.int32)
    sizes = np.asarray(found.sum(axis=1)).ravel()
    shared = (found @ found.T).tocoo()  # shingles in common, by pair of texts
    alike = (
        (shared.row < shared.col)
        & (shared.data > 4)
        & (shared.data > 0.5 * (sizes[shared.row] + sizes[shared.col] - shared.data))
    )
    assert [(texts[i], texts[j]) for i, j in zip(shared.row[alike], shared.col[alike], strict=True)] == []


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
