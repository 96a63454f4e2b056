"""The dashboard in a real browser: pages open, charts draw, nothing is written, and no other host is asked."""

import asyncio
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import quote, urlsplit

import pytest
from datasette.app import Datasette
from playwright.sync_api import Browser, Page, sync_playwright

from db import migrate, predictions, registry
from db.models import ConfusionCell
from db.session import Database, open_database
from tests.support.commands import command
from tests.support.rows import assign, make_version, prediction_row, tweet_row, write
from worker.console import dashboard
from worker.console.dashboard import make_dashboard
from worker.errors import BadRequest
from worker.settings import Settings, load_settings

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
LABELS = ["悲しい", "嬉しい"]
HOSTILE = "<img src=x onerror=\"document.title='taken'\"> 映画が良い & 楽しい"
DESK = {"width": 1300, "height": 900}
PHONE = {"width": 390, "height": 844}


def fill(database: Database) -> None:
    version = make_version(database, {("accuracy", ""): 0.9, ("f1_macro", ""): 0.8})
    assign(database, version)
    now = datetime.now(UTC)
    with database.begin() as session:
        registry.get(session, version).labels = LABELS
        for actual in LABELS:
            for predicted in LABELS:
                session.add(ConfusionCell(model_version_id=version, actual=actual, predicted=predicted, count=5))
        for i in range(5):
            window = dict.fromkeys(("read_ms", "tokenise_ms", "forward_ms", "store_ms"), 1.0)
            window |= {"worker": "w", "model_version_id": version, "tweets": 60, "buried": 0, "tokens": 9}
            predictions.add_window(session, {**window, "padded_tokens": 9, "started_at": now - timedelta(minutes=i)})
    write(
        database,
        [tweet_row(str(i), text=HOSTILE, topic=["映画", None][i % 2], received_at=now) for i in range(40)],
        [
            prediction_row(str(i), version, label=LABELS[i % 2], score_signed=i % 2 - 0.5, scored_at=now)
            for i in range(40)
        ],
    )


@pytest.fixture(scope="module", params=["filled", "empty"])
def address(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A running `tweetscore dashboard`, over a database with rows and over one without any."""
    home = tmp_path_factory.mktemp("dashboard") / "home"
    database = open_database(load_settings(home=home).sql_url)
    migrate.upgrade(database)
    if request.param == "filled":
        fill(database)
    database.close()
    with command(home.parent / "log", {"home": home}, "dashboard", "--port", "0") as running:
        running.says("/-/dashboards/sentiment")
        running.says("Ctrl-C")
        yield running.said().split("/-/")[0].split()[-1]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("there is no Chromium; on Debian: apt install chromium")
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-background-networking"]
        )
        yield opened
        opened.close()


class Watched:
    """A page with everything it said and asked for."""

    def __init__(self, page: Page) -> None:
        self.page, self.said, self.asked = page, [], []
        page.on("console", lambda message: self.said.append(message.text))
        page.on("pageerror", lambda error: self.said.append(str(error)))
        page.on("request", lambda request: self.asked.append(request.url))
        page.on("response", lambda answer: answer.ok or self.said.append(f"{answer.status} {answer.url}"))


@pytest.fixture(params=[DESK, PHONE], ids=["desk", "phone"])
def watched(browser: Browser, request: pytest.FixtureRequest) -> Iterator[Watched]:
    page = browser.new_page(viewport=request.param)
    page.set_default_timeout(15_000)
    yield Watched(page)
    page.close()


@pytest.mark.slow
def test_every_chart_draws_and_nothing_else_happens(address: str, watched: Watched) -> None:
    page = watched.page
    page.goto(f"{address}/-/dashboards/sentiment", wait_until="networkidle")
    cards = page.locator(".dashboard-card-chart")
    assert cards.count() == 10
    page.wait_for_function("document.querySelectorAll('svg.marks, canvas.marks').length == 5")
    page.wait_for_function("[...document.querySelectorAll('.dashboard-card-chart')].every(e => e.childElementCount)")
    assert page.title() != "taken"
    assert page.locator("td img").count() == 0  # a tweet is text, whatever it holds
    assert watched.said == []
    assert {urlsplit(url).netloc for url in watched.asked if not url.startswith(("data:", "blob:"))} == {
        urlsplit(address).netloc
    }
    overflow = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert overflow <= 1, "the page is wider than the screen"


@pytest.mark.slow
@pytest.mark.parametrize("watched", [DESK], indirect=True, ids=["desk"])
@pytest.mark.parametrize("name", ["labels", "unsure", "wrong", "dead", "words?word=映画", "topic?topic=映画"])
def test_canned_questions_say_what_they_are_and_run(address: str, watched: Watched, name: str) -> None:
    watched.page.goto(f"{address}/tweetscore/{quote(name, safe='?=')}", wait_until="networkidle")
    assert watched.page.locator("h1").count() == 1
    assert watched.page.locator(".metadata-description").inner_text().strip().endswith(".")
    assert watched.page.locator("table.rows-and-columns, p.zero-results").count() == 1
    assert watched.said == []


@pytest.mark.slow
def test_the_front_page_leads_to_the_dashboard(address: str, watched: Watched) -> None:
    watched.page.goto(address, wait_until="networkidle")
    assert watched.page.locator("h1").inner_text() == "tweetscore"
    assert watched.page.locator("a[href='/-/dashboards']").count() == 1


# --- without a browser


@pytest.fixture
def filled(sqlite: Database, monkeypatch: pytest.MonkeyPatch) -> Datasette:
    """The application over a database with rows."""
    fill(sqlite)
    monkeypatch.setattr(dashboard, "QUERY_MS", 500)
    return make_dashboard(load_settings(database_url=sqlite.engine.url.render_as_string()))


def answered(application: Datasette, sql: str) -> tuple[int, Any]:
    """Status and JSON of a question."""
    answer = asyncio.run(application.client.get("/tweetscore.json", params={"sql": sql, "_shape": "objects"}))
    return answer.status_code, answer.json()


@pytest.mark.parametrize(
    "sql",
    [
        "INSERT INTO dead_letters VALUES ('1', 'x', NULL, 'r', 1, 'x')",
        "DROP TABLE tweets",
        "ATTACH DATABASE '/tmp/x.db' AS x",
        "PRAGMA writable_schema = ON",
        "SELECT 1; DELETE FROM tweets",
        "WITH x AS (SELECT 1) DELETE FROM tweets",
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n",
    ],
)
def test_nothing_can_be_written_or_go_on_for_ever(filled: Datasette, sql: str) -> None:
    status, said = answered(filled, sql)
    assert (status, said["ok"]) == (400, False)
    assert answered(filled, "SELECT count(*) AS n FROM tweets")[1]["rows"] == [{"n": 40}]


def test_connections_cannot_write_whatever_is_asked(filled: Datasette) -> None:
    """The file is opened read-only, whatever passes the pattern that questions must match."""
    connection = filled.get_database("tweetscore").connect()
    with pytest.raises(Exception, match="readonly"):
        connection.execute("DELETE FROM tweets")
    connection.close()


def test_another_database_is_refused_in_words(settings: Settings) -> None:
    with pytest.raises(BadRequest, match="reads SQLite"):
        make_dashboard(settings.model_copy(update={"database_url": "postgresql://somebody@host/name"}))


def test_a_port_that_is_taken_is_refused_in_words(tweetscore: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        ended = tweetscore("dashboard", "--port", str(taken.getsockname()[1]))
    assert (ended.returncode, "take another --port" in ended.stderr) == (2, True)
