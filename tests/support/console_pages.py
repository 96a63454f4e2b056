"""Pages of the console drawn without a browser, and the models, jobs and picked tweets that they show."""

from typing import Any

import pytest
from streamlit.testing.v1 import AppTest

from db import registry
from db.models import ModelVersion, utc_now
from db.session import Database
from tests.support.console import HOSTILE
from tests.support.rows import prediction_row, tweet_row, url_of, write
from worker.console.context import Console
from worker.settings import Access, load_settings

LABELS = ["negative", "neutral", "positive"]


def console_of(database: Database, access: Access = "operate", **given: Any) -> Console:
    return Console(load_settings(database_url=url_of(database), **given), access, "花子")


def draw(
    page: str, monkeypatch: pytest.MonkeyPatch, database: Database, access: Access = "operate", **state: Any
) -> AppTest:
    """The page as a visitor sees it; `state` is the session's."""
    monkeypatch.setenv("DATABASE_URL", url_of(database))
    monkeypatch.setenv("TWEETSCORE_CONSOLE_ACCESS", access)
    script = (
        f"from worker.console import signin\nfrom worker.console.pages import {page}\n{page}.render(signin.enter())"
    )
    app = AppTest.from_string(script, default_timeout=60)
    for name, value in state.items():
        app.session_state[name] = value
    return app.run()


def html(app: AppTest) -> str:
    return "\n".join(str(element.proto.body) for element in app.get("html"))


def buttons(app: AppTest) -> list[str]:
    return [button.label for button in app.button]


def press(app: AppTest, label: str) -> AppTest:
    """Press the button whose label begins with these words."""
    return next(button for button in app.button if button.label.startswith(label)).click().run()


def add_tested_version(database: Database, right: int, wrong: int = 20, probability: float = 0.85) -> int:
    """A model that was tested on rows 0 to 59, of which it predicts those from `wrong` on correctly.

    The probability of the first `right` rows is 0.95, of the others `probability`. All texts are hostile.
    """
    rows = [
        {
            "row_number": i, "text": f"{HOSTILE[i % len(HOSTILE)]}{i}", "actual": LABELS[i % 3],
            "predicted": LABELS[(i + (i < wrong)) % 3], "probability": 0.95 if i < right else probability,
            "probabilities": dict.fromkeys(LABELS, 1 / 3), "unknown_share": 0.0,
        }
        for i in range(60)
    ]  # fmt: skip
    pairs = [(row["actual"], row["predicted"]) for row in rows]
    confusion = [{"actual": a, "predicted": p, "count": pairs.count((a, p))} for a, p in sorted(set(pairs))]
    figures = {("accuracy", ""): 1 - wrong / 60, ("f1_macro", ""): 0.7, ("f1_macro_low", ""): 0.6}
    figures |= {("f1_macro_high", ""): 0.8, **{("f1", label): 0.7 for label in LABELS}}
    metrics = [{"metric": metric, "label": label, "value": value} for (metric, label), value in figures.items()]
    version = ModelVersion(
        base_model="starter", artifact_url="file:///nowhere", sha256="0" * 64, labels=LABELS, cleaner_version="2"
    )
    with database.begin() as session:
        return registry.add_version(session, version, metrics, confusion, rows).id


def score_hostile(database: Database, version: int, tweets: int = len(HOSTILE)) -> list[str]:
    """Store hostile tweets that the model scored; returns their texts."""
    texts = [f"{HOSTILE[i % len(HOSTILE)]} {i}" for i in range(tweets)]
    write(
        database,
        [tweet_row(str(i), text=text, topic="<b>映画</b>", received_at=utc_now()) for i, text in enumerate(texts)],
        [
            prediction_row(str(i), version, label=LABELS[i % 3], probabilities=dict.fromkeys(LABELS, 1 / 3))
            for i in range(tweets)
        ],
    )
    return texts
