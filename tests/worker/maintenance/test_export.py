"""Exports, a look at a file beforehand; and that what is deleted is gone."""

import codecs
import csv
import json
import subprocess
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
from rich.console import Console
from rich.progress import MofNCompleteColumn

from db import predictions
from db.errors import NotFound
from db.models import DeadLetter, Prediction, Tweet
from db.session import Database
from tests.conftest import PATIENCE_SECONDS
from tests.support.bench import Bench, Slow, draining, wire
from tests.support.leaks import SECRET, found_in
from tests.support.rows import NOON, assign, make_version, prediction_row, tweet_row, write
from training.errors import BadSource
from worker.cli import output
from worker.connections import model_store
from worker.errors import StreamError
from worker.intake.file_report import check_file
from worker.maintenance.deletion import DeletedCounts, TweetFilter, delete_tweets
from worker.maintenance.export import SCHEMA, export
from worker.settings import Settings
from worker.stream import embedded_valkey
from worker.stream.redis_client import connect
from worker.stream.stream import Stream

Run = Callable[..., subprocess.CompletedProcess[str]]

# --- export

TEXTS = {"1": "=1+1", "2": '改行\nと"引用",', "3": "@someone 良い", "4": "普通"}


@pytest.fixture
def scored(database: Database) -> Database:
    """Four tweets, an hour apart, with two topics, scored by the champion; a fifth is scored only by another model."""
    version, other = make_version(database), make_version(database)
    assign(database, version)
    hours = {id_: NOON + timedelta(hours=int(id_)) for id_ in [*TEXTS, "5"]}
    topics = {"1": "映画", "2": "雨", "3": "映画"}
    write(
        database,
        [
            tweet_row(id_, text=TEXTS.get(id_, "x"), tweet_created_at=when, topic=topics.get(id_))
            for id_, when in hours.items()
        ],
        [prediction_row(id_, version, score_signed=-0.5, scored_at=hours[id_]) for id_ in TEXTS]
        + [prediction_row("5", other)],
    )
    return database


def test_csv_defuses_formulas_and_keeps_everything_else(scored: Database, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    assert export(scored, str(tmp_path / "a.csv"), "csv", progress=lambda *at: told.append(at)) == 4
    assert told[-1] == (4, 4)
    rows = list(csv.DictReader(StringIO((tmp_path / "a.csv").read_text(encoding="utf-8"), newline="")))
    assert list(rows[0]) == SCHEMA.names
    assert [row["text"] for row in rows] == ["'=1+1", TEXTS["2"], "'@someone 良い", TEXTS["4"]]
    assert [row["score_signed"] for row in rows] == ["-0.5"] * 4  # a number is no formula
    assert datetime.fromisoformat(rows[0]["tweet_created_at"]) == NOON + timedelta(hours=1)
    assert list(tmp_path.glob(".a.csv*")) == []


def test_excel_gets_its_byte_order_mark(scored: Database, tmp_path: Path) -> None:
    export(scored, str(tmp_path / "a.csv"), "csv", excel=True)
    content = (tmp_path / "a.csv").read_bytes()
    assert content.startswith(codecs.BOM_UTF8)
    assert content.count(b"\r\n") == 5


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ({}, ["1", "2", "3", "4"]),
        ({"since": NOON + timedelta(hours=3)}, ["3", "4"]),
        ({"topic": "映画"}, ["1", "3"]),
        ({"model": 2}, ["5"]),
    ],
)
def test_jsonl_and_parquet_hold_the_same_rows(
    scored: Database, tmp_path: Path, how: dict[str, Any], expected: list[str]
) -> None:
    for form in ("jsonl", "parquet"):
        assert export(scored, str(tmp_path / f"a.{form}"), form, **how) == len(expected)
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text(encoding="utf-8").splitlines()]
    table = pq.read_table(tmp_path / "a.parquet")
    assert [line["tweet_id"] for line in lines] == table["tweet_id"].to_pylist() == expected
    assert table.schema == SCHEMA
    assert table["scored_at"].to_pylist() == [datetime.fromisoformat(line["scored_at"]) for line in lines]


def test_an_export_that_fails_leaves_the_earlier_file(scored: Database, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("earlier")

    def stop(done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(scored, str(tmp_path / "a.csv"), "csv", progress=stop)
    with pytest.raises(NotFound, match="no model"):
        export(scored, str(tmp_path / "a.csv"), "csv", model=99)
    assert (tmp_path / "a.csv").read_text() == "earlier"
    assert list(tmp_path.glob(".a.csv*")) == []


def test_the_command_exports_to_standard_output_and_to_a_file(
    tweetscore: Run, home_database: Database, tmp_path: Path
) -> None:
    version = make_version(home_database)
    assign(home_database, version)
    write(home_database, [tweet_row("1", text="良い")], [prediction_row("1", version)])
    said = tweetscore("export", "--format", "jsonl")
    assert (said.returncode, json.loads(said.stdout)["text"]) == (0, "良い")
    assert tweetscore("export", "--format", "parquet", "--out", str(tmp_path / "a.parquet")).returncode == 0
    assert pq.read_table(tmp_path / "a.parquet").num_rows == 1
    refused = tweetscore("export", "--format", "parquet")
    assert (refused.returncode, "--out" in refused.stderr) == (2, True)


# --- data check


def test_the_report_on_a_file_has_counts_lengths_and_advice(tmp_path: Path) -> None:
    rows = ["良い日,pos", "悪い日,neg", "良い日,pos", "良い日,neg", "https://t.co/a,pos", ",neg", f"{'長い' * 100},pos"]
    path = tmp_path / "a.csv"
    path.write_bytes(("id,text,label\n" + "".join(f"{i % 6},{row}\n" for i, row in enumerate(rows))).encode("cp932"))
    found = check_file(str(path), "starter", 50)
    assert {key: found[key] for key in ("encoding", "columns", "rows", "bad_lines", "duplicates", "conflicting")} == {
        "encoding": "cp932", "columns": ["id", "text", "label"], "rows": 6, "bad_lines": 1, "duplicates": 2,
        "conflicting": 1,
    }  # fmt: skip
    assert found["labels"] == {"pos": 4, "neg": 2}
    assert (found["repeated_ids"], found["conflicting_at"], found["bad"]) == (
        1, ["lines 2 and 5"], ["line 7: the row has no text"]
    )  # fmt: skip
    tokens = found["tokens"]
    assert tokens["truncated"] == 1
    assert tokens["longest"] > 100
    assert sum(tokens["histogram"].values()) == 6
    assert [word for word in ("two labels", "longer than 50", "fewer than 10", "cannot be read") if not any(
        word in advice for advice in found["advice"])] == []  # fmt: skip


def test_labels_that_are_numbers_are_offered_to_the_tasks_that_order_them(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("label,text\n" + "".join(f"{i % 3 - 1},文{i}\n" for i in range(30)), encoding="utf-8")
    (advice,) = check_file(str(path), "starter", 50)["advice"]
    assert "--task ordinal" in advice
    assert "--task continuous" in advice
    path.write_text("label,text\n" + "".join(f"{i % 2},文{i}\n" for i in range(30)), encoding="utf-8")
    assert check_file(str(path), "starter", 50)["advice"] == []  # two labels have no order to learn


def test_labels_and_ids_that_look_like_missing_values_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("id,text,label\nNA,良い,NA\nnan,悪い,nan\nNA,null,None\n01,NA,nan\n,良い,\n", encoding="utf-8")
    found = check_file(str(path), "starter", 50)
    assert list(found["labels"].items()) == [("nan", 2), ("NA", 1), ("None", 1)]
    assert {key: found[key] for key in ("rows", "repeated_ids", "duplicates", "conflicting_at")} == {
        "rows": 5, "repeated_ids": 1, "duplicates": 1, "conflicting_at": ["lines 2 and 6"],
    }  # fmt: skip
    path.write_text("id,text\n1,\n", encoding="utf-8")
    assert sum(check_file(str(path), "starter", 50)["tokens"]["histogram"].values()) == 0


def test_copies_within_one_page_of_the_api_are_counted(tmp_path: Path) -> None:
    """The tweets of a page share one line."""
    path = tmp_path / "page.json"
    path.write_text(json.dumps({"data": [{"id": str(i), "text": "同じ日"} for i in range(3)]}), encoding="utf-8")
    assert check_file(str(path), "starter", 50)["duplicates"] == 2


def test_the_command_checks_a_file_of_tweets(tweetscore: Run, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"id":1,"text":"良い"}\n{"data":[{"id":"2","text":"悪い"}]}\n', encoding="utf-8")
    said = tweetscore("data", "check", str(path), "--json")
    found = json.loads(said.stdout)
    assert (said.returncode, found["rows"], found["advice"]) == (0, 2, [])
    shown = tweetscore("data", "check", str(path))
    assert "up to 8" in shown.stdout
    assert tweetscore("data", "check", str(tmp_path / "none.csv")).returncode == 2
    with pytest.raises(BadSource):
        check_file(str(tmp_path / "none.csv"), "starter", 50)


# --- deleting


def test_a_deleted_tweet_is_gone_from_stream_tables_and_dead_letters(bench: Bench) -> None:
    bench.promote()
    bench.stream.publish([wire(i, author_id="a" if i % 2 else "b") for i in range(40)])
    bench.worker().drain()
    bench.stream.publish([wire(100, author_id="a"), wire(101, author_id="b"), b'{"id":"7","author_id":"a"}'])
    with bench.database.begin() as session:
        for i, payload in enumerate((b'{"id":"x","author_id":"a"}', b"\xff", b'{"id":"y","author_id":"b","text":""}')):
            letter = {"record_id": f"{i}-0", "payload": payload, "other_fields": None, "reason": "r", "attempts": 1}
            predictions.bury(session, [{**letter, "buried_at": NOON}])
    gone = delete_tweets(bench.database, bench.stream, TweetFilter(authors=("a",)))
    assert gone == DeletedCounts(records=2, tweets=20, dead_letters=1)
    assert {row["author_id"] for row in bench.rows(Tweet)} == {"b"}
    assert len(bench.rows(Prediction)) == 20
    bench.worker().drain()
    assert len(bench.rows(Prediction)) == 21
    assert delete_tweets(bench.database, bench.stream, TweetFilter(tweet_ids=("0", "101"))) == DeletedCounts(0, 2, 0)
    assert (
        delete_tweets(bench.database, bench.stream, TweetFilter(before=datetime(2100, 1, 1, tzinfo=UTC))).tweets == 19
    )
    assert bench.rows(Prediction) == bench.rows(Tweet) == bench.rows(DeadLetter) == []


def test_deletion_waits_for_a_window_in_progress(lite: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    champion = lite.holding(Slow)
    lite.stream.publish([wire(1, author_id="a")])
    with draining(lite.worker(champion)):
        champion.model.begun.wait(PATIENCE_SECONDS)
        monkeypatch.setattr("worker.maintenance.deletion.WAIT_SECONDS", 0.3)
        with pytest.raises(StreamError, match="still holds 1"):
            delete_tweets(lite.database, lite.stream, TweetFilter(authors=("a",)))
        monkeypatch.setattr("worker.maintenance.deletion.WAIT_SECONDS", 60.0)
        threading.Timer(0.5, champion.model.go.set).start()
        delete_tweets(lite.database, lite.stream, TweetFilter(authors=("a",)))
    assert lite.rows(Tweet) == []


def rows_of(database: Database) -> int:
    with database.read() as session:
        return session.query(Tweet).count()


def test_nothing_of_a_deleted_tweet_is_left_in_the_home(
    tweetscore: Run, settings: Settings, home_database: Database, tiny_artifact: SimpleNamespace, promote: Any
) -> None:
    """Search every file in the home for the scored, waiting and dead-lettered texts, as UTF-8 and as JSON escapes."""
    database = home_database
    model_store(settings).folder.mkdir(parents=True)
    promote(database, model_store(settings).folder)
    tweets = [{"id": str(i), "text": f"普通の話{i}", "author_id": "b"} for i in range(50)]
    tweets += [{"id": f"9{i}", "text": f"{SECRET}{i}", "author_id": "a"} for i in range(50)]
    with embedded_valkey.owned(settings.home, 64) as server:
        stream = Stream(connect(server.url), settings.stream_key, settings.group)
        push = tweetscore("push", "-", stdin="".join(json.dumps(t) + "\n" for t in tweets))
        assert push.returncode == 0, push.stderr
        bench = Bench(database, stream, connect(server.url), tiny_artifact, promote)
        bench.worker().drain()
        stream.publish([json.dumps({"id": "999", "text": f"{SECRET}!", "author_id": "a"}, ensure_ascii=False).encode()])
        with database.begin() as session:
            dead = {"payload": f'{{"id":"998","author_id":"a","text":"{SECRET}'.encode() + b'"}', "other_fields": None}
            predictions.bury(session, [{"record_id": "1-0", "reason": "r", "attempts": 1, "buried_at": NOON, **dead}])
        assert found_in(settings.home), "the search finds nothing at all"
        said = tweetscore("delete", "--author", "a", "--json")
        assert said.returncode == 0, said.stderr
        assert json.loads(said.stdout) == {
            "records": 1, "tweets": 50, "dead_letters": 1, "not_rewritten": []
        }  # fmt: skip
        assert found_in(settings.home) == []
        assert rows_of(database) == 50
    assert found_in(settings.home) == []
    database.close()
    refused = tweetscore("delete")
    assert (refused.returncode, "nothing is selected" in refused.stderr) == (2, True)


def test_long_work_is_told_in_lines_where_there_is_no_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output, "errors", Console(stderr=True, highlight=False, width=100))
    monkeypatch.setattr(output, "PROGRESS_SECONDS", 0.0)
    with output.long_work("exporting") as tell:
        print("a row")
        tell(1_000, 2_000)
        tell(5, None, "5 tweets")
    said = capsys.readouterr()
    assert said.out == "a row\n"
    assert said.err.splitlines() == ["exporting: 1,000 of 2,000", "exporting: 5 tweets"]


def test_on_a_terminal_a_bar_is_drawn_on_standard_error_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = StringIO()
    monkeypatch.setattr(output, "errors", Console(file=drawn, force_terminal=True, width=100))
    with output.long_work("exporting", MofNCompleteColumn()) as tell:
        tell(1_000, 2_000)
        print("a row")
    assert capsys.readouterr().out == "a row\n"
    assert "1000/2000" in drawn.getvalue()
    assert "50%" in drawn.getvalue()
