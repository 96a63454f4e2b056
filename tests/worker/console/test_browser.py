"""The console in a real browser: pages draw, tweets stay text, nobody else is asked, and visitors sign in."""

import socket
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, Page, expect

from db import migrate
from db.session import open_database
from tests.support.commands import command
from tests.support.console import fill
from tests.support.provider import CLIENT, provider
from tests.worker.console.conftest import PATIENCE_MS
from worker.settings import load_settings

pytestmark = pytest.mark.slow
NAMES = ("Overview", "Tweets", "Review", "Models", "Jobs", "Ask", "Health")
DESK = {"viewport": {"width": 1300, "height": 900}, "color_scheme": "light"}
AGENT = "Mozilla/5.0 (Linux; Android 15; Mobile) Chromium"
PHONE = {"viewport": {"width": 390, "height": 844}, "color_scheme": "dark", "user_agent": AGENT}
IDLE = "document.querySelector('[data-testid=stApp]')?.dataset.testScriptState === 'notRunning'"


@pytest.fixture(scope="module", params=["filled", "empty"])
def address(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A running `tweetscore console`, over a database with rows and over one without any."""
    home = tmp_path_factory.mktemp("console") / "home"
    home.mkdir()
    database = open_database(load_settings(home=home).sql_url)
    migrate.upgrade(database)
    if request.param == "filled":
        fill(database)
    database.close()
    with command(home.parent / "log", {"home": home}, "console", "--port", "0") as running:
        running.says("Ctrl-C")
        yield running.said().split()[0]


class Watched:
    """A page with everything it said and asked for."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.said: list[str] = []
        self.asked: set[str] = set()
        page.set_default_timeout(PATIENCE_MS)
        page.on("console", lambda message: self.said.append(message.text))
        page.on("pageerror", lambda error: self.said.append(str(error)))
        page.on("request", lambda request: self.asked.add(urlsplit(request.url).netloc))

    def open(self, name: str) -> None:
        """Go to a page as people do, and wait until it is drawn."""
        link = self.page.get_by_role("link", name=name, exact=True)
        expander = self.page.get_by_test_id("stExpandSidebarButton")
        if expander.is_visible():  # on a phone
            expander.click()
        link.click()
        self.drawn(name)

    def drawn(self, name: str) -> None:
        expect(self.page.locator("h1")).to_have_text(name, timeout=PATIENCE_MS)
        self.page.wait_for_function(IDLE)


@pytest.fixture(params=[DESK, PHONE], ids=["desk", "phone"])
def watched(browser: Browser, request: pytest.FixtureRequest) -> Iterator[Watched]:
    page = browser.new_page(**request.param)
    yield Watched(page)
    page.close()


def test_every_page_draws_and_nothing_else_happens(address: str, watched: Watched) -> None:
    page = watched.page
    page.goto(address)
    watched.drawn("Overview")
    for name in NAMES:
        watched.open(name)
        assert page.get_by_test_id("stException").count() == 0, name
        overflow = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert overflow <= 1, f"{name} is wider than the screen"
    assert page.title() != "taken"
    assert watched.said == []
    assert {host for host in watched.asked if host} == {urlsplit(address).netloc}


@pytest.mark.parametrize("address", ["filled"], indirect=True)
@pytest.mark.parametrize("watched", [DESK], indirect=True, ids=["desk"])
def test_a_shared_address_shows_the_same_period_topic_and_tweet(address: str, watched: Watched) -> None:
    page = watched.page
    page.goto(f"{address}?period=30d&topic=天気")
    watched.drawn("Overview")
    expect(page.get_by_role("combobox", name="Topic")).to_have_value("天気")
    watched.open("Tweets")
    expect(page.get_by_role("combobox", name="Period")).to_have_value("30 days")
    expect(page.get_by_role("combobox", name="Topic")).to_have_value("天気")
    page.wait_for_function("location.search.includes('period=30d') && location.search.includes('topic=')")
    page.goto(f"{address}tweets?tweet=1700000000000000000")
    watched.drawn("Tweets")
    expect(page.get_by_text("onerror").first).to_be_visible()
    page.get_by_text("Raw record").scroll_into_view_if_needed()  # charts are drawn where they are seen
    expect(page.get_by_test_id("stVegaLiteChart").locator("svg")).to_be_visible()
    assert (page.title(), page.locator("img[src=x]").count()) == ("tweetscore", 0)


@pytest.mark.parametrize("address", ["filled"], indirect=True)
@pytest.mark.parametrize("watched", [DESK], indirect=True, ids=["desk"])
def test_a_download_holds_every_tweet_and_no_formula(address: str, watched: Watched) -> None:
    page = watched.page
    page.goto(address)
    watched.drawn("Overview")
    watched.open("Tweets")
    with page.expect_download() as started:
        page.get_by_role("button", name="Download CSV").click()
    lines = Path(started.value.path()).read_text(encoding="utf-8-sig")
    assert lines.count("HYPERLINK") == lines.count("\"'=HYPERLINK") == 10
    assert watched.said == []


@pytest.mark.parametrize("watched", [DESK], indirect=True, ids=["desk"])
def test_visitors_sign_in_and_only_those_in_the_list_enter(
    watched: Watched, tmp_path: Path, migrated_file: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    page, address = watched.page, f"http://localhost:{port}/"
    with provider(sub="1", email="eve@example.org", email_verified=True) as signs_in:
        given = {
            "home": tmp_path / "home", "console_users": {"ann@example.org": "look"},
            "console_oidc_metadata_url": f"{signs_in.url}/.well-known/openid-configuration",
            "console_oidc_client_id": CLIENT["client_id"], "console_oidc_client_secret": CLIENT["client_secret"],
            "console_oidc_redirect_url": f"{address}oauth2callback",
        }  # fmt: skip
        with command(tmp_path / "log", given, "console", "--port", str(port), "--host", "0.0.0.0") as running:
            running.says("Ctrl-C")
            page.goto(address)
            expect(page.get_by_text("Sign in to see the tweets.")).to_be_visible()
            assert page.get_by_role("link", name="Tweets").count() == 0
            page.get_by_role("button", name="Sign in").click()
            expect(page.get_by_text("eve@example.org may not enter")).to_be_visible()
            assert page.get_by_role("link", name="Tweets").count() == 0
            page.get_by_role("button", name="Sign out").click()
            expect(page.get_by_role("button", name="Sign in")).to_be_visible()
            signs_in.claims["email"] = "Ann@example.org"
            page.get_by_role("button", name="Sign in").click()
            watched.drawn("Overview")
            expect(page.get_by_text("ann@example.org")).to_be_visible()
