"""What people do in the console, in a real Chromium: every key of Review, a promotion, a job from upload to model."""

from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, Page, expect
from sqlalchemy import select

from db import registry
from db.models import Label, ReviewAsk, TrainingJob
from db.session import Database
from tests.conftest import wait_until, write_labelled
from tests.support.commands import command, worker
from tests.support.console_pages import add_tested_version, score_hostile
from tests.support.rows import assign
from tests.support.world import World, on_sqlite
from tests.worker.console.conftest import PATIENCE_MS

pytestmark = pytest.mark.slow
LABELS = ("negative", "neutral", "positive")
PLACE = "() => document.querySelector('[class*=st-key-review-tweet-]')?.className.match(/review-tweet-(\\d+)/)[1]"
IDLE = "() => document.querySelector('[data-testid=stApp]')?.dataset.testScriptState === 'notRunning'"


class Visitor:
    """A page with what it said and asked for."""

    def __init__(self, page: Page, address: str) -> None:
        self.page, self.address = page, address
        self.said: list[str] = []
        self.asked: set[str] = set()
        page.set_default_timeout(PATIENCE_MS)
        page.on("console", lambda message: self.said.append(message.text))
        page.on("pageerror", lambda error: self.said.append(str(error)))
        page.on("request", lambda request: self.asked.add(urlsplit(request.url).netloc))

    def open(self, name: str) -> None:
        self.page.goto(self.address)
        self.page.get_by_role("link", name=name, exact=True).click()
        expect(self.page.locator("h1")).to_have_text(name)
        self.page.wait_for_function(IDLE)

    def button(self, name: str) -> None:
        self.page.get_by_role("button", name=name).click()

    def alone(self) -> None:
        """The page complained of nothing, and only the console was asked."""
        assert self.said == []
        assert {host for host in self.asked if host} == {urlsplit(self.address).netloc}


@pytest.fixture
def visitor(world: World, browser: Browser, tmp_path: Path) -> Iterator[Visitor]:
    """A visitor of a console over the test's database."""
    with command(tmp_path / "console.log", world.given, "console", "--port", "0") as running:
        running.says("Ctrl-C")
        page = browser.new_page(viewport={"width": 1300, "height": 900})
        yield Visitor(page, running.said().split()[0])
        page.close()


def labels_in(database: Database) -> list[tuple[str, str]]:
    with database.read() as session:
        rows = session.execute(select(Label.annotator, Label.label).order_by(Label.id))
        return [(annotator, label) for annotator, label in rows]


def press(page: Page, key: str) -> tuple[str, str]:
    """Press a key and wait for another tweet; returns the places of both."""
    before = page.evaluate(PLACE)
    page.keyboard.press(key)
    page.wait_for_function(f"before => ({PLACE})() && ({PLACE})() !== before", arg=before, polling=10)
    page.wait_for_function(IDLE)
    return before, page.evaluate(PLACE)


def test_every_key_of_review_does_what_it_says(world: World, visitor: Visitor) -> None:
    score_hostile(world.database, world.champion, 12)
    page = visitor.page
    visitor.open("Review")
    visitor.button("Annotator")
    name = page.get_by_role("textbox", name="Your name")
    name.fill("")
    name.press_sequentially("us123")
    name.press("Enter")
    expect(page.get_by_text("under the name us123.")).to_be_visible()
    page.keyboard.press("Escape")
    visitor.button("Pick 50 more")
    expect(page.get_by_text("Picked 12 tweets")).to_be_visible()
    page.wait_for_function(IDLE)
    assert labels_in(world.database) == []  # typing a name pressed no key

    for place, label in enumerate(LABELS, 1):
        press(page, str(place))
        assert labels_in(world.database)[-1] == ("us123", label)
    skipped, after = press(page, "s")
    assert press(page, "u") == (after, skipped)
    press(page, "S")
    with world.database.read() as session:
        states = list(session.scalars(select(ReviewAsk.state).order_by(ReviewAsk.at)))
    assert states == ["labelled"] * 3 + ["skipped", "asked"]
    name_again = page.get_by_role("button", name="Annotator")
    name_again.click()
    now = page.evaluate(PLACE)
    name.press_sequentially("3s")
    expect(name).to_have_value("3sus123")
    assert (page.evaluate(PLACE), len(labels_in(world.database))) == (now, 3)
    assert page.title() == "tweetscore"
    visitor.alone()


@on_sqlite
def test_thirty_tweets_are_labelled_faster_than_people_read(world: World, visitor: Visitor, report: object) -> None:
    """Twenty labels a minute leave three seconds for each; the page needs a small part of them."""
    score_hostile(world.database, world.champion, 40)
    page = visitor.page
    visitor.open("Review")
    visitor.button("Pick 50 more")
    expect(page.get_by_text("Picked 40 tweets")).to_be_visible()
    page.wait_for_function(IDLE)
    taken = []
    for i in range(30):
        began = page.evaluate("performance.now()")
        press(page, "123"[i % 3])
        taken.append((page.evaluate("performance.now()") - began) / 1000)
    assert len(labels_in(world.database)) == 30
    median = sorted(taken)[15]
    assert median < 1.5
    if callable(report):
        report(f"Review: {median:.2f} s from a key to the next tweet, {max(taken):.2f} s at most, of 30")


def test_a_promotion_goes_through_its_dialog(world: World, visitor: Visitor) -> None:
    good, bad = add_tested_version(world.database, 30, wrong=5), add_tested_version(world.database, 30, wrong=40)
    assign(world.database, good)
    page = visitor.page
    visitor.open("Models")
    page.get_by_role("combobox", name="Model").click()
    page.get_by_role("option", name=f"Model {bad}").click()
    visitor.button("Make it the champion")
    dialog = page.get_by_role("dialog")
    confirm = dialog.get_by_role("button", name=f"Make model {bad} the champion")
    expect(dialog.get_by_text("Against it: on 60 test rows in common")).to_be_visible()
    expect(confirm).to_be_disabled()
    dialog.get_by_text("Promote it all the same").click()
    confirm.click()
    expect(page.get_by_text(f"Model {bad} is the champion now.")).to_be_visible()

    visitor.button("Roll the champion back")
    dialog.get_by_role("button", name=f"Roll back to model {good}").click()
    expect(page.get_by_text(f"Model {good} is the champion again")).to_be_visible()
    with world.database.read() as session:
        history = [row.model_version_id for row in registry.history(session)]
    assert history == [world.champion, good, bad, good]
    visitor.alone()


@on_sqlite
@pytest.mark.usefixtures("clean_queue")
def test_a_job_goes_from_an_upload_to_a_model(world: World, visitor: Visitor, tmp_path: Path) -> None:
    page = visitor.page
    with worker(world.given, "train"):
        visitor.open("Jobs")
        page.locator("input[type=file]").set_input_files(write_labelled(tmp_path / "喜怒.csv"))
        page.get_by_role("spinbutton", name="Epochs").fill("2")
        visitor.button("Start the job")
        expect(page.get_by_text("Job 1 is queued.")).to_be_visible()
        wait_until(lambda: world.job(1).finished_at is not None)
        # The page changes by itself.
        expect(page.get_by_text("48 training, 6 validation, 6 test")).to_be_visible()
        expect(page.get_by_text("succeeded").filter(visible=True).first).to_be_visible()
        expect(page.locator("[data-testid=stVegaLiteChart]")).to_have_count(2)
    with world.database.read() as session:
        job = session.get_one(TrainingJob, 1)
        version = registry.of_job(session, 1)
    assert (job.state, job.config["epochs"]) == ("succeeded", 2)
    assert version is not None
    visitor.open("Models")
    page.get_by_role("combobox", name="Model").click()
    page.get_by_role("option", name=f"Model {version.id}").click()
    page.get_by_role("radio", name="Card").click()
    expect(page.get_by_text("Results on the test rows")).to_be_visible()
    visitor.alone()
