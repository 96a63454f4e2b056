"""`docs/schema.md` is what the code generates, and its example queries run."""

from pathlib import Path

import pytest

from db import schema_page
from db.models import Base, TrainingJob
from db.session import Database
from db.views import VIEWS
from tests.support.rows import NOON, answer, assign, make_version, prediction_row, tweet_row, write


def test_the_page_is_up_to_date() -> None:
    assert schema_page.main(["--check"]) == 0


def test_check_reports_a_missing_and_a_stale_page_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "docs" / "schema.md"
    monkeypatch.setattr(schema_page, "PAGE", page)
    assert schema_page.main(["--check"]) == 1
    assert not page.exists()
    assert schema_page.main([]) == 0
    assert schema_page.main(["--check"]) == 0
    page.write_text(page.read_text(encoding="utf-8").replace("UTC", "JST"), encoding="utf-8")
    assert schema_page.main(["--check"]) == 1
    assert "JST" in page.read_text(encoding="utf-8")
    assert f"{page} differs from the code; write it again with" in capsys.readouterr().err
    assert schema_page.main(["--chek"]) == 2


def test_the_page_describes_every_table_view_and_column() -> None:
    lines = schema_page.page().splitlines()
    sections = [line.removeprefix("### ") for line in lines if line.startswith("### ")]
    assert sections == [view.name for view in VIEWS] + sorted(Base.metadata.tables)
    rows = sum(line.startswith("| `") for line in lines)
    assert rows == sum(len(view.columns) for view in VIEWS) + sum(len(t.columns) for t in Base.metadata.tables.values())


def test_example_queries_answer_on_either_database(database: Database) -> None:
    champion = make_version(database, {("f1_macro", ""): 0.8, ("f1_macro_low", ""): 0.7, ("tfidf_f1_macro", ""): 0.6})
    challenger = make_version(database)
    assign(database, champion)
    assign(database, challenger, alias="challenger")
    ids = [str(i) for i in range(12)]
    write(
        database,
        [tweet_row(id_, topic="雨", tweet_created_at=NOON) for id_ in ids],
        [prediction_row(id_, champion, probability=0.55) for id_ in ids]
        + [prediction_row("1", challenger, label="negative")],
    )
    with database.begin() as session:
        session.add(TrainingJob(request_id="a", state="failed", config={}, dataset="d.csv", error="no rows"))
    found = {question: answer(database, sql) for question, sql in schema_page.EXAMPLES.items()}
    assert {question: len(rows) for question, rows in found.items()} == dict(
        zip(found, (1, 1, len(ids), 1, 1, 1), strict=True)
    )
    assert found["Which topics are the most negative?"] == [("雨", 12, 0.5)]
    assert found["Where do champion and challenger disagree?"] == [("1", "今日は嬉しい1", "positive", "negative")]
