"""The page Review: one tweet at a time, over both databases, as Streamlit draws it without a browser."""

from html import escape

import pytest
import streamlit as st
from sqlalchemy import select
from streamlit.testing.v1 import AppTest

from db import registry
from db.models import Label, ReviewTweet, TrainingJob
from db.session import Database
from tests.support.console_pages import (
    LABELS,
    add_tested_version,
    buttons,
    console_of,
    draw,
    html,
    press,
    score_hostile,
)
from tests.support.rows import assign
from worker.console import acting
from worker.console.pages import review as page
from worker.console.review_keys import button_text, keys_of, labels_a_minute


@pytest.fixture(autouse=True)
def _fresh() -> None:
    st.cache_data.clear()
    st.cache_resource.clear()


def scored(database: Database, tweets: int = 8) -> list[str]:
    """A champion that scored hostile tweets; returns their texts."""
    version = add_tested_version(database, 30)
    assign(database, version)
    return score_hostile(database, version, tweets)


def labels_in(database: Database) -> list[tuple[str, str, str]]:
    with database.read() as session:
        rows = session.execute(select(Label.annotator, Label.label, Label.source).order_by(Label.id))
        return [(annotator, label, source) for annotator, label, source in rows]


def shown_tweet(app: AppTest) -> str:
    """The id that the keys of the buttons name."""
    return next(str(button.key).split()[0] for button in app.button if button.label == "Skip")


def test_tweets_are_picked_labelled_skipped_and_undone(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = scored(database)
    app = draw("review", monkeypatch, database)
    app.text_input[0].set_value(" 花子 ").run()
    assert "No tweet is picked yet" in html(app)
    press(app, "Pick 50 more")
    assert "Picked 8 tweets" in html(app)
    assert {button.label: button.proto.shortcut for button in app.button} == {
        "negative": "1", "neutral": "2", "positive": "3", "Skip": "s", "Undo": "u",
    }  # fmt: skip
    first = shown_tweet(app)
    assert escape(texts[int(first)]) in html(app)
    assert not any(label in html(app) for label in LABELS)  # no prediction leads the reader

    press(app, "neutral")
    assert labels_in(database) == [("花子", "neutral", "review")]
    assert shown_tweet(app) != first
    press(app, "Undo")
    assert (shown_tweet(app), labels_in(database)) == (first, [])
    press(app, "Skip")
    assert shown_tweet(app) != first
    for _ in range(7):
        press(app, "positive")
    assert labels_in(database) == [("花子", "positive", "review")] * 7
    assert "Pick more to go on" in html(app)
    press(app, "Pick 50 more")
    assert "no tweet is left to pick" in html(app)
    assert not app.exception


def test_hostile_tweets_are_shown_as_text(sqlite: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = scored(sqlite, 4)
    app = press(draw("review", monkeypatch, sqlite), "Pick 50 more")
    seen = []
    while "Skip" in buttons(app):
        seen.append(shown_tweet(app))
        assert escape(texts[int(seen[-1])]) in html(app)
        assert "<script" not in html(app)
        assert "<b>映画" not in html(app)
        press(app, "Skip")
    assert sorted(seen) == ["0", "1", "2", "3"]
    assert not any(text in element.value for text in texts for element in app.markdown)


def test_a_late_key_changes_no_answer(sqlite: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second press of a key that was meant for the tweet before."""
    scored(sqlite)
    app = press(draw("review", monkeypatch, sqlite), "Pick 50 more")
    first = next(button for button in app.button if button.label == "negative")
    press(app, "positive")
    first.click()
    app.run()
    assert [label for _, label, _ in labels_in(sqlite)] == ["positive"]


def test_without_a_champion_the_page_names_the_next_step(sqlite: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    app = draw("review", monkeypatch, sqlite)
    assert not app.exception
    assert "there is no champion yet; train a model and promote it" in html(app)


def test_a_visitor_who_may_only_look_gives_no_label(sqlite: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    scored(sqlite)
    app = draw("review", monkeypatch, sqlite, "look")
    assert not app.exception
    assert buttons(app) == []
    assert escape("you need the access 'label'") in html(app)
    told: list[tuple[str, bool]] = []
    monkeypatch.setattr(acting, "tell", lambda sentence, done=True: told.append((sentence, done)))
    page._pick(console_of(sqlite, "look"))
    ((sentence, done),) = told
    assert (sentence.startswith("your access is 'look'"), done) == (True, False)
    with sqlite.read() as session:
        assert session.scalars(select(ReviewTweet)).all() == []


def test_a_tweet_of_a_multi_label_champion_can_have_several(sqlite: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    scored(sqlite)
    with sqlite.begin() as session:
        job = TrainingJob(request_id="r", dataset="d", config={"task": "multi_label"}, state="succeeded")
        session.add(job)
        session.flush()
        registry.get(session, 1).job_id = job.id
    app = press(draw("review", monkeypatch, sqlite), "Pick 50 more")
    assert next(button for button in app.button if button.label == "Save").disabled
    for label in ("positive", "neutral", "negative", "neutral"):
        press(app, label)
    press(app, "Save")
    assert [label for _, label, _ in labels_in(sqlite)] == ["negative|positive"]


def test_every_label_has_a_button_and_the_first_nine_a_key() -> None:
    keys = [key for _, key in keys_of([str(i) for i in range(11)])]
    assert keys == [*"123456789", None, None]


@pytest.mark.parametrize(
    "label", ["![x](http://a.invalid/p.png)", ":material/home:", "$x$", "**a** <b>", ":red[a]", " "]
)
def test_a_label_on_a_button_is_no_markup(label: str) -> None:
    said = button_text(label)
    unescaped = said.replace("\u2060", "").replace("\\", "")
    assert unescaped == (label.strip() or "(empty)")
    assert ":material/" not in said.replace("\\", "")
    for character in "![]()$*<>`":
        assert said.count(character) == said.count(f"\\{character}")


def test_the_rate_is_that_of_the_labels_without_long_pauses() -> None:
    assert labels_a_minute([]) is None
    assert labels_a_minute([5.0]) is None
    assert labels_a_minute([0.0, 2.0, 4.0, 1000.0, 1002.0]) == pytest.approx(30)
