"""Two models on the tweets that both scored, and the guard that compares a candidate with the champion."""

import json
from itertools import pairwise

import pytest
from typer.testing import CliRunner

from db import registry
from db.errors import NotFound
from db.session import Database
from tests.support.quality import label, scored, version_tested
from tests.support.rows import assign, prediction_row, write
from worker.cli.main import app
from worker.errors import BadRequest, PromotionRefused
from worker.quality.comparison import Agreement, compare_live
from worker.quality.promotion import check_promotion, promote

# The exact McNemar test of 1 and 8: 2 (1 + 9) / 2^9.
P_1_OF_9 = 20 / 512
PEOPLE = ["positive"] * 10 + ["negative"] * 2


def both(database: Database, one: int, other: int) -> list[str]:
    """Twelve labelled tweets: both are right on 2, only the first on 8, only the second on 1, and none on 1."""
    first = [*["positive"] * 10, "positive", "positive"]
    second = ["positive"] * 2 + ["negative"] * 8 + ["negative", "positive"]
    ids = scored(database, one, 1, first)
    write(database, [], [prediction_row(id_, other, label=name) for id_, name in zip(ids, second, strict=True)])
    label(database, dict(zip(ids[:6], PEOPLE[:6], strict=True)))
    label(database, dict(zip(ids[6:], PEOPLE[6:], strict=True)), reason="uncertain")
    return ids


def test_two_models_are_compared_on_the_tweets_that_both_scored(database: Database) -> None:
    one, other = version_tested(database, []), version_tested(database, [])
    ids = both(database, one, other)
    scored(database, one, 2, ["positive"] * 3)  # which the other has not scored
    unlabelled = scored(database, one, 0, ["negative"])
    write(database, [], [prediction_row(unlabelled[0], other, probability=0.6)])
    found = compare_live(database, one, other)
    assert (found.tweets, found.differing) == (13, 10)
    assert found.confusion == {
        ("positive", "positive"): 3, ("positive", "negative"): 9, ("negative", "positive"): 1
    }  # fmt: skip
    assert found.labelled == Agreement(12, 2, 8, 1, pytest.approx(P_1_OF_9))
    assert found.random == Agreement(6, 2, 4, 0, pytest.approx(2 / 2**4))
    assert "model 1 is better, beyond chance" in found.labelled.sentence(1, 2)
    assert "could be chance" in found.random.sentence(1, 2)
    assert {example.tweet_id for example in found.examples} == {*ids[2:11], *unlabelled}
    last = found.examples[-1]  # after those with a label
    assert (last.tweet_id, last.first, last.second, last.second_probability, last.label) == (
        unlabelled[0], "negative", "positive", 0.6, None
    )  # fmt: skip
    for refused, words in (((one, one), "with itself"), ((one, 99), "no model 99")):
        with pytest.raises((BadRequest, NotFound), match=words):
            compare_live(database, *refused)


def test_the_champion_is_not_replaced_by_a_model_that_people_find_worse(database: Database) -> None:
    champion, candidate = version_tested(database, []), version_tested(database, [])
    assign(database, champion)
    both(database, champion, candidate)
    [reason] = check_promotion(database, candidate)
    assert reason.startswith("on 12 labelled tweets that both scored, only the champion (model 1) is right on 8, and")
    with pytest.raises(PromotionRefused, match=r"only model 2 on 1 \(exact McNemar test, p = 0.039\).*--force"):
        promote(database, candidate)
    promote(database, candidate, alias="challenger")
    with database.read() as session:
        assert registry.assigned(session, "challenger") == candidate
        assert registry.assigned(session, registry.CHAMPION) == champion
    assert promote(database, candidate, force=True).reasons == [reason]
    assert check_promotion(database, champion) == []  # it is the better one
    assert promote(database, champion).reasons == []
    with database.begin() as session:
        assert registry.rollback(session, registry.CHAMPION) == (champion, candidate)  # never refused
    with pytest.raises(NotFound, match="no model 99"):
        promote(database, 99)


def rows(right: int, wrong: int, text: str) -> list[dict[str, object]]:
    return [
        {"text": f"{text} {i}", "actual": "positive", "predicted": "positive" if i < right else "negative"}
        for i in range(right + wrong)
    ]


@pytest.mark.parametrize(
    ("champion", "candidate", "says"),
    [
        (rows(9, 0, "a"), rows(3, 6, "a"), "on 9 test rows in common, only the champion (model 1) is better on 6, and"),
        (rows(9, 0, "a"), rows(4, 5, "a"), None),  # p = 2 / 2^5
        (rows(18, 2, "a"), rows(9, 11, "b"), "right on 18 of 20 and model 2 on 9 of 20 (Fisher's exact test, p = 0.0"),
        (rows(18, 2, "a"), rows(13, 7, "b"), None),
        (rows(9, 11, "a"), rows(18, 2, "b"), None),
    ],
)
def test_test_rows_speak_against_a_candidate_only_beyond_chance(
    sqlite: Database, champion: list[dict[str, object]], candidate: list[dict[str, object]], says: str | None
) -> None:
    assign(sqlite, version_tested(sqlite, champion))
    reasons = check_promotion(sqlite, version_tested(sqlite, candidate))
    assert [says in reason for reason in reasons if says] == ([True] if says else [])
    assert len(reasons) == (1 if says else 0)


def test_a_model_without_figures_is_promoted_with_a_warning(sqlite: Database) -> None:
    first, imported = version_tested(sqlite, rows(9, 0, "a")), version_tested(sqlite, [])
    assert promote(sqlite, first).warnings == []  # there is no champion to compare it with
    [warning] = promote(sqlite, imported).warnings
    assert warning.startswith(f"nothing compares model {imported} with the champion, model {first}: label tweets that")


def test_the_commands_show_quality_comparison_and_refusal(home_database: Database) -> None:
    champion, candidate = (version_tested(home_database, rows(4, 0, "a"), {"accuracy": 1.0}) for _ in range(2))
    said = ask("quality", code=1)
    assert said == ""  # a champion is missing, which is an error
    assign(home_database, champion)
    said = ask("quality")
    assert "accuracy  7 days: no labels;  30 days: no labels;  test rows: 1.000" in said
    assert "`tweetscore review pick 100` picks tweets at random to label" in said
    assert "labels for plus or minus 3 points  7 days: 61 (there are 0)" in said
    assert "no tweet was scored by both model 1 and model 2" in ask("models", "compare", "1", "2", "--live")
    both(home_database, champion, candidate)
    said = ask("quality")
    assert "accuracy  7 days: 1.000 (95 %: 0.610 to 1.000), 6 labels;  30 days: " in said
    assert "length  " in said
    figures = ("accuracy  ", "macro-F1  ", "expected accuracy", "labels for", "labels  ", "length  ")
    below = [line for above, line in pairwise(said.splitlines()) if above.startswith(figures)]
    assert len(below) == len(figures)
    assert all(line.startswith("  does not see ") for line in below)
    said = json.loads(ask("quality", "--json"))
    assert [period["labels"] for period in said["periods"]] == [6, 6]
    assert said["drift"]["length"]["verdict"] == "much"
    said = ask("models", "compare", "1", "2", "--live")
    assert "12 tweets were scored by both; the labels differ on 9 (75.0%)" in said
    assert "all labels: of 12 tweets, only model 1 is right on 8 and only model 2 on 1 (exact McNemar test" in said
    said = json.loads(ask("models", "compare", "1", "2", "--live", "--json"))
    assert {(cell["first"], cell["second"]): cell["tweets"] for cell in said["confusion"]} == {
        ("positive", "positive"): 3, ("positive", "negative"): 9
    }  # fmt: skip
    refused = CliRunner().invoke(app, ["models", "promote", "2"])
    assert isinstance(refused.exception, PromotionRefused)
    forced = CliRunner().invoke(app, ["models", "promote", "2", "--force"])
    assert "warning: on 12 labelled tweets that both scored" in forced.stderr
    assert forced.stdout == "model 2 is the champion now\n"
    assert "model 1 is the champion now" in ask("models", "rollback")


def ask(*arguments: str, code: int = 0) -> str:
    done = CliRunner().invoke(app, list(arguments))
    assert done.exit_code == code, done.output
    return done.stdout
