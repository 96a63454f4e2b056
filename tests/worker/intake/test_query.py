"""`worker.query`: answers as pandas frames, the same from either database, whole or a chunk at a time."""

import re
import subprocess
import sys
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest
from sqlalchemy import text

import worker
from db.errors import DatabaseError, TweetscoreError
from db.session import Database
from tests.support.job_rows import submit
from tests.support.paths import ROOT
from tests.support.rows import NOON, answer, assign, make_version, prediction_row, tweet_row, url_of, write
from tests.support.world import on_sqlite
from worker.errors import BadRequest

TIME, DAY = "datetime64[us, UTC]", "datetime64[us]"
PAST_FLOATS = str(2**53 + 1)
NUMBERS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {}) SELECT i FROM n"


@pytest.fixture
def database(database: Database, monkeypatch: pytest.MonkeyPatch) -> Database:
    """The one the settings name."""
    monkeypatch.setenv("DATABASE_URL", url_of(database))
    return database


@pytest.fixture
def scored(database: Database) -> Database:
    """Three tweets under a champion, the last without a time and a score; and a job."""
    version = make_version(database)
    assign(database, version)
    said = {PAST_FLOATS: NOON - timedelta(hours=1), "2": NOON + timedelta(microseconds=5), "3": None}
    write(
        database,
        [tweet_row(id_, tweet_created_at=when, text="NA", topic=None) for id_, when in said.items()],
        [prediction_row(id_, version, score_signed=None if id_ == "3" else 0.5) for id_ in said],
    )
    submit(database)
    return database


def dtypes(sql: str) -> dict[str, str]:
    return {name: str(dtype) for name, dtype in worker.query(sql).dtypes.items()}


COLUMNS = {
    "tweet_id": "str", "text": "str", "author_id": "str", "tweet_created_at": TIME, "received_at": TIME,
    "model_version_id": "int64", "label": "str", "probability": "float64", "score_signed": "float64", "scored_at": TIME,
}  # fmt: skip
JOB = {
    "id": "int64", "state": "str", "config": "object", "cancel_requested": "bool", "submitted_at": TIME,
    "total_steps": "Int64", "finished_at": TIME, "loss": "float64", "data_report": "object", "error": "str",
}  # fmt: skip


@pytest.mark.parametrize("columns_of", [("v_predictions_current", COLUMNS), ("training_jobs", JOB)])
def test_columns_have_the_types_of_the_schema_with_rows_and_without(
    scored: Database, columns_of: tuple[str, dict[str, str]]
) -> None:
    table, columns = columns_of
    sql = f"SELECT {', '.join(columns)} FROM {table}"
    assert dtypes(sql) == columns
    empty = worker.query(f"{sql} WHERE 1 = 0")
    assert (len(empty), list(empty.columns)) == (0, list(columns))
    integers = {"Int64": "int64"}  # without rows there is no NULL
    assert dtypes(f"{sql} WHERE 1 = 0") == {name: integers.get(kind, kind) for name, kind in columns.items()}


def test_values_come_as_they_were_stored(scored: Database) -> None:
    if scored.engine.dialect.name == "postgresql":  # whatever zone the server speaks in
        with scored.begin() as session:
            session.execute(text(f"ALTER DATABASE {scored.engine.url.database} SET timezone TO 'America/New_York'"))
    frame = worker.query("SELECT * FROM v_predictions_current ORDER BY received_at, tweet_created_at, tweet_id DESC")
    frame = frame.set_index("tweet_id")
    assert frame.loc[PAST_FLOATS, "tweet_created_at"] == NOON - timedelta(hours=1)
    assert frame.loc["2", "tweet_created_at"] == pd.Timestamp(NOON) + pd.Timedelta(microseconds=5)
    assert frame["tweet_created_at"].isna().tolist() == frame["score_signed"].isna().tolist()
    assert frame["text"].tolist() == ["NA"] * 3
    [job] = worker.query("SELECT * FROM training_jobs").to_dict("records")
    assert (job["config"], job["data_report"], job["cancel_requested"]) == ({"epochs": 1}, None, False)
    [said] = worker.query(f"SELECT probabilities FROM predictions WHERE tweet_id = '{PAST_FLOATS}'")["probabilities"]
    assert said == {"positive": 0.75}


def test_what_the_schema_does_not_name_is_typed_by_its_values(scored: Database) -> None:
    sql = """
        SELECT max(p.scored_at) AS latest, hour_utc, day_jst, sum(h.tweets) AS tweets, avg(h.mean_probability) AS mean,
               1 AS one, NULL AS nobody, '' AS words, '2026-01-31' AS day, sum(CAST(0.5 AS REAL)) AS half
        FROM v_sentiment_hourly AS h JOIN v_sentiment_daily_jst AS d USING (label), predictions AS p
        GROUP BY hour_utc, day_jst
    """
    assert dtypes(sql) == {
        "latest": TIME, "hour_utc": TIME, "day_jst": DAY, "tweets": "int64", "mean": "float64", "one": "int64",
        "nobody": "object", "words": "str", "day": DAY, "half": "float64",
    }  # fmt: skip
    frame = worker.query(sql).sort_values("hour_utc")
    assert frame["hour_utc"].tolist() == [pd.Timestamp(NOON - timedelta(hours=1)), pd.Timestamp(NOON)]
    assert frame["day_jst"].tolist() == [pd.Timestamp("2026-01-31")] * 2


def test_a_tweet_that_reads_like_a_time_or_json_stays_text(database: Database) -> None:
    write(database, [tweet_row("1", text="2026-01-31T12:00:00Z", author_id="2026-01-31", topic='{"a": 1}')], [])
    frame = worker.query("SELECT text, author_id, topic, text || '?' AS asked FROM tweets")
    assert frame.loc[0].tolist() == ["2026-01-31T12:00:00Z", "2026-01-31", '{"a": 1}', "2026-01-31T12:00:00Z?"]
    # Called as a time and as JSON, and neither.
    odd = worker.query("SELECT 'x' AS scored_at, 'y' AS config, '2026-13-45' AS day, 7 AS kept")
    assert odd.loc[0].tolist() == ["x", "y", "2026-13-45", 7]


def test_two_columns_of_one_name_and_whole_numbers_past_64_bits_are_kept(database: Database) -> None:
    frame = worker.query("SELECT 1 AS a, 'x' AS a, 9223372036854775807 AS big")
    assert (list(frame.columns), frame.iloc[0].tolist()) == (["a", "a", "big"], [1, "x", 2**63 - 1])
    if database.engine.dialect.name == "postgresql":
        assert worker.query("SELECT CAST(2 AS numeric) ^ 70 AS n, sum(9223372036854775807) * 4 AS m").loc[0, "m"] == (
            (2**63 - 1) * 4
        )


def test_an_answer_comes_in_chunks_of_so_many_rows(database: Database) -> None:
    whole = worker.query(NUMBERS.format(25))
    chunks = list(worker.query(NUMBERS.format(25), chunksize=10))
    assert [len(chunk) for chunk in chunks] == [10, 10, 5]
    pd.testing.assert_frame_equal(pd.concat(chunks, ignore_index=True), whole)
    [empty] = worker.query("SELECT tweet_id, received_at FROM tweets", chunksize=10)
    assert {name: str(dtype) for name, dtype in empty.dtypes.items()} == {"tweet_id": "str", "received_at": TIME}


def test_chunks_are_streamed_rather_than_held_in_memory(database: Database) -> None:
    sql = NUMBERS.format(300_000).replace("SELECT i FROM", f"SELECT i, '{'x' * 500}' AS x FROM")
    process = psutil.Process()
    with_pandas = len(worker.query(sql + " WHERE i < 2000"))
    before, most, rows = process.memory_info().rss, 0, with_pandas - 1_999
    for chunk in worker.query(sql, chunksize=2_000):
        rows += len(chunk)
        most = max(most, process.memory_info().rss)
    assert rows == 300_000
    assert most - before < 60_000_000  # all of them are 150 MB as bytes alone


@pytest.mark.parametrize("how", ["exhausted", "closed", "forgotten", "closed by another thread"])
def test_the_connection_ends_with_its_chunks(database: Database, how: str) -> None:
    database.close()  # its own connections hide what SQLite leaves open in one process
    before = connections(database)
    chunks = worker.query(NUMBERS.format(25), chunksize=10)
    next(chunks)
    assert connections(database) == before + 1
    if how == "exhausted":
        list(chunks)
    elif how == "closed":
        chunks.close()
    elif how == "closed by another thread":
        closer = threading.Thread(target=chunks.close)
        closer.start()
        closer.join()
    else:
        del chunks
    assert connections(database) == before


def connections(database: Database) -> int:
    """Of this process to the database, seen from outside."""
    if database.engine.dialect.name == "sqlite":
        return sum(file.path == database.engine.url.database for file in psutil.Process().open_files())
    [(count,)] = answer(database, "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()")
    return int(count)


@on_sqlite
def test_chunks_that_wait_for_their_reader_are_not_ended(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """A minute is how long a question may take for a row, not how long its reader may take."""
    now = [0.0]
    monkeypatch.setattr("db.querying.readonly.time.monotonic", lambda: now[0])
    monkeypatch.setattr("db.querying.readonly.STEPS_BETWEEN_CHECKS", 1)
    chunks = worker.query(NUMBERS.format(2_000), chunksize=1_000)
    for _ in range(2):
        now[0] += 3_600
        assert len(next(chunks)) == 1_000


@pytest.mark.parametrize("chunksize", [None, 10])
@pytest.mark.parametrize(
    "sql",
    ["DELETE FROM tweets", "SELECT * FROM nowhere", "", "SELECT '\ud800'", 'SELECT 1 AS "\x00"', "SELECT 1; SELECT 2"],
)
def test_what_cannot_be_answered_is_refused_at_once(database: Database, sql: str, chunksize: Any) -> None:
    with pytest.raises(DatabaseError) as refused:
        worker.query(sql, chunksize)
    assert "\n" not in str(refused.value)


def test_a_question_is_not_the_place_for_settings_that_make_no_sense(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(BadRequest, match="chunksize is 0"):
        worker.query("SELECT 1", chunksize=0)
    with pytest.raises(DatabaseError, match="there is no database"):
        worker.query("SELECT 1")
    assert not list(tmp_path.rglob("*.db"))  # nor is one made by a question
    for url in ("nonsense", "postgresql://host:port/name"):
        monkeypatch.setenv("DATABASE_URL", url)
        with pytest.raises(TweetscoreError, match=r"postgresql://"):
            worker.query("SELECT 1")


def test_the_notebook_of_the_documentation_runs(scored: Database, tmp_path: Path) -> None:
    page = (ROOT / "docs" / "querying.md").read_text(encoding="utf-8")
    [written] = re.findall(r"```python\n(import worker\n.*?)```", page, re.DOTALL)
    ended = subprocess.run([sys.executable, "-c", written], capture_output=True, text=True, cwd=tmp_path)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert len(pd.read_parquet(tmp_path / "part-0.parquet")) == 3
