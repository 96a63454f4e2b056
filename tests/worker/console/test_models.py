"""The page Models over both databases: figures, the card, comparisons, promotions that are asked twice."""

import shutil
from pathlib import Path

import pytest
import streamlit as st
from sqlalchemy import select

from db import registry
from db.models import Evaluation, ModelAlias, TrainingJob
from db.session import Database
from tests.support.console import HOSTILE
from tests.support.console_pages import (
    LABELS,
    add_tested_version,
    buttons,
    console_of,
    draw,
    html,
    press,
    score_hostile,
)  # fmt: skip
from tests.support.rows import assign, make_version
from training.errors import BadArtifact
from training.store.paths import file_sha256
from training.store.sealed_folder import new_sealed_folder, read_sums
from worker.connections import model_store
from worker.console import acting
from worker.console.model import card, comparing, model_queries, promoting
from worker.console.pages.models import SECTIONS
from worker.settings import Access, load_settings


@pytest.fixture(autouse=True)
def _fresh() -> None:
    st.cache_data.clear()
    st.cache_resource.clear()


@pytest.fixture
def two(database: Database) -> tuple[int, int]:
    """The champion, and a model that is worse on the same test rows beyond chance."""
    good, bad = add_tested_version(database, 30, wrong=5), add_tested_version(database, 30, wrong=40)
    assign(database, good)
    score_hostile(database, good)
    score_hostile(database, bad)
    with database.begin() as session:
        registry.add_evaluation(
            session,
            Evaluation(model_version_id=good, dataset=HOSTILE[0], dataset_sha256="1" * 64, rows=9),
            [{"metric": "f1_macro", "label": "", "value": 0.5}],
        )
    return good, bad


def aliases(database: Database) -> list[tuple[str, int]]:
    with database.read() as session:
        rows = session.execute(select(ModelAlias.alias, ModelAlias.model_version_id).order_by(ModelAlias.id))
        return [(alias, version) for alias, version in rows]


def test_every_section_of_a_model_is_drawn(
    database: Database, two: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = {
        "Figures": "0.700 (0.600 to 0.800)", "Confusion": "right ones are on the diagonal",
        "Calibration": "a dash marks a bin without rows", "Wrong test rows": "5 most certain errors",
        "Card": "lies outside", "Evaluations": "", "Compare": "could be chance",
    }  # fmt: skip
    assert tuple(shown) == SECTIONS
    app = draw("models", monkeypatch, database)
    for section, sentence in shown.items():
        app.session_state["models_section"] = section
        assert not app.run().exception, section
        assert sentence in html(app) or section == "Compare", section
        assert "<script" not in html(app)
    assert "Of 60 test rows in common, only model 1 is right on 35, and only model 2 on 0: beyond chance" in html(app)
    press(app, "Compare on tweets")
    assert not app.exception
    assert "Both scored 4 tweets, and differ on 0 (0.0%)" in html(app)


def test_without_a_model_the_page_names_the_next_step(sqlite: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    app = draw("models", monkeypatch, sqlite)
    assert not app.exception
    assert "There is no model yet" in html(app)


def test_a_model_without_test_figures_has_every_section(sqlite: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    make_version(sqlite)
    app = draw("models", monkeypatch, sqlite)
    assert "<code>tweetscore models evaluate 1 labelled.csv</code>" in html(app)
    for section in SECTIONS:
        app.session_state["models_section"] = section
        assert not app.run().exception, section


def test_bins_and_cells_without_rows_are_there(database: Database, two: tuple[int, int]) -> None:
    console = console_of(database)
    found = model_queries.model(console, two[0])
    assert found is not None
    bins = model_queries.reliability(console, found)
    assert list(bins["rows"]) == [0] * 8 + [30, 30]
    # Rows 0 to 29 have the probability 0.95, and the first five of them are wrong.
    assert list(bins["right"][8:]) == pytest.approx([1.0, 25 / 30])
    assert list(bins["probability"][8:]) == pytest.approx([0.85, 0.95])
    assert bins["right_low"][9] < 25 / 30 < bins["right_high"][9] < 1
    assert bins["right"][:8].isna().all()
    cells = model_queries.confusion(console, found)
    assert list(zip(cells["actual"], cells["predicted"], strict=True)) == [(a, p) for a in LABELS for p in LABELS]
    assert cells["rows"].sum() == 60
    assert (cells["rows"] == 0).sum() == 3
    assert cells.groupby("actual")["share"].sum().round(9).eq(1).all()


def test_each_label_of_a_multi_label_model_counts_in_its_calibration(sqlite: Database) -> None:
    version = add_tested_version(sqlite, 0)
    with sqlite.begin() as session:
        job = TrainingJob(request_id="r", dataset="d", config={"task": "multi_label"}, state="succeeded")
        session.add(job)
        session.flush()
        registry.get(session, version).job_id = job.id
    found = model_queries.model(console_of(sqlite), version)
    assert found is not None
    bins = model_queries.reliability(console_of(sqlite), found)
    assert (list(bins["rows"]), bins["right"][3]) == ([0, 0, 0, 180, 0, 0, 0, 0, 0, 0], pytest.approx(1 / 3))


def test_a_promotion_is_asked_again_with_the_reasons_against_it(
    database: Database, two: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a browser a dialog closes at the next click; `test_in_a_browser.py` goes through it."""
    good, bad = two
    app = press(draw("models", monkeypatch, database, models_chosen=bad), "Make it the champion")
    assert f"Model {bad} becomes the champion; model {good} is the champion now." in html(app)
    assert "Against it: on 60 test rows in common" in html(app)
    assert next(button for button in app.button if button.label == f"Make model {bad} the champion").disabled
    press(app, "Make it the challenger")
    assert not next(button for button in app.button if button.label == f"Make model {bad} the challenger").disabled
    assert aliases(database) == [("champion", good)]
    assert not app.exception


def test_a_worse_model_is_promoted_by_force_alone_and_rolled_back(
    database: Database, two: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    good, bad = two
    console = console_of(database)
    told: list[str] = []
    monkeypatch.setattr(acting, "tell", lambda sentence, done=True: told.append(sentence))
    promoting.promote(console, bad, "champion", force=False)
    assert aliases(database) == [("champion", good)]
    promoting.promote(console, bad, "champion", force=True)
    assert promoting.previous(console, "champion") == (bad, good)
    promoting.roll_back(console, "champion")
    assert aliases(database) == [("champion", good), ("champion", bad), ("champion", good)]
    assert told[0].startswith(f"model {bad} was not promoted: on 60 test rows in common")
    assert told[1:] == [
        f"Model {bad} is the champion now.", f"Model {good} is the champion again, in place of model {bad}."
    ]  # fmt: skip


@pytest.mark.parametrize("access", ["look", "label"])
def test_who_may_not_operate_promotes_nothing(
    access: Access, sqlite: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = add_tested_version(sqlite, 30)
    app = draw("models", monkeypatch, sqlite, access)
    assert not app.exception
    assert not any("champion" in label or "challenger" in label for label in buttons(app))
    told: list[str] = []
    monkeypatch.setattr(acting, "tell", lambda sentence, done=True: told.append(sentence))
    promoting.promote(console_of(sqlite, access), version, "champion", force=True)
    promoting.roll_back(console_of(sqlite, access), "champion")
    assert [f"your access is {access!r}" in sentence for sentence in told] == [True, True]
    assert aliases(sqlite) == []


# --- the card

MARKDOWN = """---
language: ja
---
# Model <script>alert(1)</script>

Labels: `<b>嬉しい</b>`, **bold** [link](http://a.invalid) $x$.

| label | rows |
| --- | ---: |
| `=cmd` | <img src=x> |

![Confusion](confusion.png)

- one :material/home:

```python
print("<i>")
```
"""


def store_card(store: Path | str, tmp_path: Path) -> tuple[str, str]:
    """An artifact that is a card and a picture, in a store; returns its URL and its sha256."""
    with new_sealed_folder(tmp_path / "made") as draft:
        (draft / "README.md").write_text(MARKDOWN, encoding="utf-8")
        (draft / "confusion.png").write_bytes(b"PNG")
        (draft / "model.safetensors").write_bytes(b"large")
    sha256 = file_sha256(tmp_path / "made" / "SHA256SUMS")

    def write(folder: Path) -> str:
        shutil.copytree(tmp_path / "made", folder)
        return sha256

    opened = model_store(load_settings(model_store=store))
    opened.publish("one", write)
    return opened.url_of("one"), sha256


@pytest.mark.parametrize("kind", ["folder", "memory://console-cards"])
def test_the_card_of_an_artifact_is_read_without_its_weights(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = str(tmp_path / "models") if kind == "folder" else kind
    monkeypatch.setenv("TWEETSCORE_MODEL_STORE", store)
    url, sha256 = store_card(store, tmp_path)
    found = card.fetch(url, sha256)
    assert found.captioned() == [("Confusion", b"PNG")]
    assert found.markdown.startswith("# Model")
    assert len(read_sums(tmp_path / "made")) == 3
    with pytest.raises(BadArtifact, match="is not the artifact that was registered"):
        card.fetch(url, "f" * 64)


def test_a_damaged_card_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TWEETSCORE_MODEL_STORE", str(tmp_path / "models"))
    url, sha256 = store_card(str(tmp_path / "models"), tmp_path)
    (tmp_path / "models" / "one" / "README.md").write_text("# Another")
    with pytest.raises(BadArtifact, match="is damaged"):
        card.fetch(url, sha256)


def test_text_in_a_card_is_no_markup() -> None:
    html = card.as_html(card._without_metadata(MARKDOWN))
    for tag in ("<script", "<img", "<b>嬉しい", "<i>", "<a ", "confusion.png", "language: ja"):
        assert tag not in html
    for part in ("<code>&lt;b&gt;嬉しい&lt;/b&gt;</code>", "<b>bold</b>", "[link](http://a.invalid) $x$",
                 "<li>one :material/home:</li>", "print(&quot;&lt;i&gt;&quot;)", "&lt;img src=x&gt;</td>"):  # fmt: skip
        assert part in html
    assert html.count("<tr>") == 2


def test_metrics_of_two_models_are_compared_without_those_of_baselines(sqlite: Database) -> None:
    one = make_version(sqlite, {("accuracy", ""): 0.5, ("tfidf_accuracy", ""): 0.4})
    other = make_version(sqlite, {("accuracy", ""): 0.75, ("f1", "positive"): 0.1})
    assert comparing.metrics(console_of(sqlite), one, other) == [
        {"metric": "accuracy", "label": "", "model 1": 0.5, "model 2": 0.75, "difference": 0.25},
        {"metric": "f1", "label": "positive", "model 1": None, "model 2": 0.1, "difference": None},
    ]
