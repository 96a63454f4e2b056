"""Overview, Tweets, Ask and Health, as Streamlit draws them over both databases."""

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from html import escape
from io import BytesIO
from typing import Any

import pandas as pd
import pytest
import streamlit as st
from streamlit.testing.v1 import AppTest

from db.errors import DatabaseError
from db.models import DeadLetter
from db.schema_page import EXAMPLES
from db.session import Database
from tests.support.console import HOSTILE, LABELS, fill
from tests.support.rows import url_of
from worker.connections import open_stream
from worker.console import charts, filters, queries, sentiment, text, tweet_search
from worker.console.context import Console
from worker.console.pages import ask, health
from worker.console.tweet_search import Wanted
from worker.errors import BadRequest, ServerFailed
from worker.settings import Access, load_settings

PAGES = ("overview", "tweets", "ask", "health")
TWEETS, DAYS = 200, 3.0


@pytest.fixture(autouse=True)
def _fresh() -> None:
    st.cache_data.clear()
    st.cache_resource.clear()


@pytest.fixture
def filled(database: Database) -> int:
    return fill(database, TWEETS, DAYS)


def console_of(database: Database, access: Access = "operate", **given: Any) -> Console:
    return Console(load_settings(database_url=url_of(database), **given), access, "花子")


def draw(page: str, monkeypatch: pytest.MonkeyPatch, database: Database, **query: str) -> AppTest:
    monkeypatch.setenv("DATABASE_URL", url_of(database))
    script = (
        f"from worker.console import signin\nfrom worker.console.pages import {page}\n{page}.render(signin.enter())"
    )
    app = AppTest.from_string(script, default_timeout=60)
    for name, value in query.items():
        app.query_params[name] = value
    return app.run()


def html(app: AppTest) -> str:
    return "\n".join(str(element.proto.body) for element in app.get("html"))


def chosen_of(console: Console, period: str, topic: str | None = None) -> filters.Chosen:
    champion = queries.champion(console)
    assert champion is not None
    span = queries.span(console, champion.version_id)
    assert span is not None
    return filters.Chosen(champion, period, topic, *filters.bounds(period, span, datetime.now(UTC)))


@pytest.mark.parametrize("page", PAGES)
def test_a_page_draws_over_a_filled_database(
    page: str, database: Database, filled: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = draw(page, monkeypatch, database)
    assert not app.exception
    assert app.title[0].value == page.capitalize()
    shown = {
        "overview": "Tweets in the period",
        "tweets": "Tweets 1 to 50",
        "ask": "tweet_id",
        "health": "2 dead letters",
    }
    assert shown[page] in html(app)


@pytest.mark.parametrize("page", PAGES)
def test_a_page_of_an_empty_database_names_the_next_step(
    page: str, sqlite: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = draw(page, monkeypatch, sqlite)
    assert not app.exception
    step = {"overview": "tweetscore demo", "tweets": "models promote", "ask": "tweetscore demo", "health": "up"}
    assert step[page] in html(app)


@pytest.mark.parametrize("number", range(len(HOSTILE)))
def test_a_hostile_tweet_is_shown_as_it_is(number: int, sqlite: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(sqlite, 40)
    tweet_id = str(1_700_000_000_000_000_000 + 10 * number)  # `fill` writes one into every tenth tweet
    app = draw("tweets", monkeypatch, sqlite, tweet=tweet_id)
    assert not app.exception
    assert escape(HOSTILE[number]) in html(app)
    assert HOSTILE[number] not in "".join(str(element.value) for element in app.markdown)


def test_sums_over_time_are_those_of_the_predictions_and_bins_without_tweets_are_zero(
    database: Database, filled: int
) -> None:
    console = console_of(database)
    for period, bins in (("7d", 7 * 24), ("30d", 30)):
        frame = sentiment.over_time(console, chosen_of(console, period))
        assert frame["tweets"].sum() == TWEETS
        assert list(dict.fromkeys(frame["label"])) == LABELS
        assert bins <= frame["at"].nunique() <= bins + 1
        assert len(frame) == frame["at"].nunique() * len(LABELS)
        totals = frame.groupby("at")[["tweets", "share"]].sum()
        assert (totals["tweets"] == 0).any()
        assert set(totals["share"].round(9)) == {0.0, 1.0}
    one = sentiment.over_time(console, chosen_of(console, "30d", "映画"))
    topics = sentiment.topics(console, chosen_of(console, "30d"), LABELS)
    assert one["tweets"].sum() == topics.loc[topics["topic"] == "映画", "tweets"].sum() > 0
    assert topics["tweets"].sum() == TWEETS


def test_scored_per_minute_has_a_row_for_every_minute(database: Database, filled: int) -> None:
    frame = sentiment.scored_per_minute(console_of(database))
    assert (len(frame), set(frame["tweets"])) == (60, {0, 60})


def test_every_condition_of_a_search_holds_and_pages_show_each_tweet_once(database: Database, filled: int) -> None:
    console = console_of(database)
    now = datetime.now(UTC)
    every = Wanted(filled, now - timedelta(days=30), now)
    seen: list[str] = []
    after = None
    while len(page := tweet_search.page(console, every, after, 60)):
        seen += list(page["tweet_id"])
        after = tweet_search.last_place(page)
    assert len(seen) == len(set(seen)) == TWEETS
    assert seen == sorted(seen, reverse=True)
    changed: dict[str, tuple[Any, Callable[[Any], bool]]] = {
        "text": ("カレーパン", lambda row: "カレーパン" in row["text"]),
        "label": ("positive", lambda row: row["label"] == "positive"),
        "author": ("1003", lambda row: row["author_id"] == "1003"),
        "topic": ("", lambda row: row["topic"] is None or pd.isna(row["topic"])),
        "probability": ((0.4, 0.6), lambda row: 0.4 <= row["probability"] <= 0.6),
        "start": (now - timedelta(days=1), lambda row: row["received_at"] >= now - timedelta(days=1)),
    }
    whole = tweet_search.all_of(console, every).to_dict("records")
    for name, (value, fits) in changed.items():
        given: dict[str, Any] = {name: value}
        found = tweet_search.all_of(console, dataclasses.replace(every, **given))
        assert 0 < len(found) < TWEETS
        assert sorted(found["tweet_id"]) == sorted(row["tweet_id"] for row in whole if fits(row)), name
    assert tweet_search.all_of(console, dataclasses.replace(every, text="100%_")).empty


def test_a_csv_file_holds_no_formula_and_a_parquet_file_the_text_as_it_is(sqlite: Database) -> None:
    frame = pd.DataFrame({"=x": ["=1+1", "@a", "-1", "＋1", "a"], "n": [-1, 2, 3, 4, 5], "j": [{"a": 1}] * 5})
    lines = text.as_csv(frame).decode("utf-8-sig").splitlines()
    assert lines[0] == "'=x,n,j"
    assert [line.split(",")[0] for line in lines[1:]] == ["'=1+1", "'@a", "'-1", "'＋1", "a"]
    assert lines[1].split(",")[1] == "-1"
    back = pd.read_parquet(BytesIO(text.as_parquet(frame)))
    assert list(back["=x"]) == list(frame["=x"])


def test_canned_questions_are_answered_and_every_answer_can_be_drawn(database: Database, filled: int) -> None:
    console = console_of(database)
    assert len(EXAMPLES) == 6
    for question, sql in EXAMPLES.items():
        answer = ask.ask(console, sql)
        assert answer.problem == "", question
        plain = ask.shown(answer.frame)
        x, y, colour, kind = ask.suggest(plain) if len(plain.columns) else ("", None, None, "")
        if y is not None and len(plain):
            assert charts.of_answer(plain, x, y, colour, kind).to_dict()["encoding"]["y"]["title"] == y


@pytest.mark.parametrize("sql", ["DELETE FROM tweets", "SELECT 1; DROP TABLE tweets", "SELECT nothing", "", "\x00"])
def test_what_the_database_refuses_is_shown_as_text_and_changes_nothing(
    sql: str, database: Database, filled: int
) -> None:
    answer = ask.ask(console_of(database), sql)
    assert answer.problem
    assert list(ask.ask(console_of(database), "SELECT count(*) AS n FROM tweets").frame["n"]) == [TWEETS]


def test_a_long_answer_is_cut_and_a_slow_one_is_stopped(sqlite: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    series = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n{}) SELECT {} FROM n"
    console = console_of(sqlite)
    answer = ask.ask(console, series.format(" WHERE i < 20000", "i"))
    assert (len(answer.frame), answer.cut) == (ask.SHOWN_ROWS, True)
    monkeypatch.setattr("db.querying.readonly.STATEMENT_TIMEOUT_MS", 300)
    assert "was stopped" in ask.ask(console, series.format("", "count(*)")).problem


def test_an_answer_with_equal_names_and_odd_values_is_shown(database: Database) -> None:
    answer = ask.ask(console_of(database), "SELECT 1 AS a, 2 AS a, NULL AS b, '<b>x</b>' AS \"c.d[0]\"")
    plain = ask.shown(answer.frame)
    assert list(plain.columns) == ["a", "a (2)", "b", "c.d[0]"]
    x, y, colour, kind = ask.suggest(plain)
    assert charts.of_answer(plain, x, y or "", colour, kind).to_dict()["encoding"]["x"]["title"] == "c.d[0]"


def test_sql_of_visitors_needs_a_role_that_can_only_read(database: Database) -> None:
    postgresql = database.engine.dialect.name == "postgresql"
    assert bool(ask.why_not(console_of(database, "look"))) == postgresql
    assert ask.why_not(console_of(database, "operate")) == ""
    assert ask.why_not(console_of(database, "look", reader_url=url_of(database))) == ""


def test_dead_letters_are_retried_and_dropped_by_those_who_may(database: Database, filled: int, server: Any) -> None:
    given = {"redis_url": server.url, "stream_key": "console-dead"}
    with pytest.raises(BadRequest, match="must be operate"):
        health.act(console_of(database, "label", **given), "drop", None)
    console = console_of(database, **given)
    assert "<script>" in health.payload(console, "2-0")
    assert health.act(console, "retry", ["1-0"]) == 1
    stream = open_stream(console.settings, server.url)
    assert stream.length() == 1
    assert health.act(console, "drop", None) == 1
    with database.read() as session:
        assert session.query(DeadLetter).count() == 0
    stream.remove([record.id for records in stream.scan(10) for record in records])


def test_dead_letters_stay_while_no_server_runs(sqlite: Database) -> None:
    fill(sqlite, 1)
    with pytest.raises(ServerFailed, match="tweetscore up"):
        health.act(console_of(sqlite), "retry", None)
    with sqlite.read() as session:
        assert session.query(DeadLetter).count() == 2


def test_a_database_that_is_away_is_reported_as_text(sqlite: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(load_settings(database_url="sqlite:////nowhere/x.db"), "look", "花子")
    with pytest.raises(DatabaseError, match="there is no database"):
        queries.champion(console)


def test_frames_have_the_types_of_the_schema_whatever_was_imported_before() -> None:
    program = "import db.querying.frames; print(db.querying.frames.SCHEMA['probabilities'].__name__)"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "JSON"
