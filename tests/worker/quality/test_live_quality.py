"""Live quality and drift: figures that are computed by hand, in the views and in Python."""

import sqlite3
from math import log, sqrt

import pytest
from sqlalchemy import delete, event

from db import registry
from db.admin import upkeep
from db.errors import DatabaseError
from db.models import Cascade, TrainingJob, utc_now
from db.quality import live
from db.session import Database
from tests.support.quality import days_ago, label, scored, version_tested
from tests.support.rows import answer, assign, cascade_row, prediction_row, run, tweet_row, write
from worker.quality.live_quality import Drift, measure

Z = 1.959963984540054


def half_width(p: float, n: float) -> float:
    """Half the length of Wilson's interval."""
    return Z * sqrt(p * (1 - p) / n + Z * Z / (4 * n * n)) / (1 + Z * Z / n)


def test_each_label_weighs_as_the_tweets_of_its_day_and_only_random_picks_count(database: Database) -> None:
    champion, other = version_tested(database, [], {"accuracy": 0.9}), version_tested(database, [])
    assign(database, champion)
    # Yesterday 2 of 8 tweets have a label, so that each stands for 4; the day before each of 2 stands for itself.
    yesterday = scored(database, champion, 1, ["positive"] * 8, probability=0.8)
    before = scored(database, champion, 2, ["negative", "positive"], probability=0.5)
    scored(database, champion, 10, ["positive"] * 5, probability=0.6)  # no label
    scored(database, other, 1, ["negative"], prefix="other")
    label(database, {yesterday[0]: "positive", yesterday[1]: "negative"})
    label(database, {before[0]: "negative", before[1]: "positive"})
    label(database, {yesterday[2]: "negative"}, reason="uncertain")
    label(database, {yesterday[3]: "negative"}, reason=None, source="import")
    label(database, {yesterday[4]: "negative"}, source="model")
    label(database, {"other-000": "positive"})

    week, month = measure(database).periods
    assert (week.days, week.labels, week.tweets, week.covered_tweets) == (7, 4, 10, 10)
    assert (month.days, month.labels, month.tweets, month.covered_tweets) == (30, 4, 15, 10)
    # (4 * 1 + 1 * 2) / 10; 10^2 / (16 + 16 + 1 + 1)
    assert (week.accuracy, week.effective_labels) == pytest.approx((0.6, 100 / 34))
    # Positive: 5 hits of 5 labels and 9 predictions. Negative: 1 hit of 5 labels and 1 prediction.
    f1_macro = (2 * 5 / 14 + 2 * 1 / 6) / 2
    assert week.f1_macro == pytest.approx(f1_macro)
    assert (week.accuracy_low, week.accuracy_high) == pytest.approx((0.1704, 0.9164), abs=1e-4)
    assert week.expected_accuracy == pytest.approx((8 * 0.8 + 2 * 0.5) / 10)
    assert month.expected_accuracy == pytest.approx((8 * 0.8 + 2 * 0.5 + 5 * 0.6) / 15)
    assert (week.test_accuracy, month.accuracy) == (0.9, week.accuracy)
    assert week.labels_needed is not None
    enough = week.labels_needed * (100 / 34) / 4  # as precise as so many labels of equal weight
    assert half_width(0.6, enough) <= 0.03 < half_width(0.6, enough - 1)
    assert week.f1_macro_low is not None
    assert week.f1_macro_high is not None
    assert 0 < week.f1_macro_low < f1_macro < week.f1_macro_high <= 1


def test_without_labels_the_labels_needed_follow_from_the_test_rows(database: Database) -> None:
    assign(database, version_tested(database, [], {"accuracy": 1.0}))
    week, month = measure(database).periods
    assert (week.labels, week.tweets, week.accuracy, week.f1_macro, week.expected_accuracy) == (0, 0, None, None, None)
    assert week.labels_needed == month.labels_needed == 61
    assert half_width(1.0, 61) <= 0.03 < half_width(1.0, 60)


def test_the_tweets_of_a_day_are_compared_with_the_test_rows_bin_by_bin(database: Database) -> None:
    champion = version_tested(
        database,
        [
            {"text": "あ" * (12 if i < 5 else 30), "predicted": "positive" if i % 2 else "negative",
             "probability": 0.9, "unknown_share": 0.03 if i < 2 else 0.0}
            for i in range(10)
        ],
    )  # fmt: skip
    assign(database, champion)
    texts = ["あ" * 12, "あ" * 12 + " https://t.co/0123456789", "@nyanko_1234 " + "あ" * 12, "あ" * 12]
    write(
        database,
        [tweet_row(str(i), text=text, received_at=days_ago(1)) for i, text in enumerate(texts)],
        [
            prediction_row(str(i), champion, label="negative" if i == 0 else "positive", unknown_share=i % 2 / 2)
            for i in range(4)
        ],
    )
    scored(database, champion, 95, ["positive"])
    [day] = measure(database).days
    assert (day.day, day.tweets, day.expected_accuracy) == (days_ago(1).date(), 4, 0.75)
    assert day.test_expected_accuracy == pytest.approx(0.9)
    assert day.psi_labels == pytest.approx(0.25 * log(1.5) - 0.25 * log(0.5))
    # All of the first bin; the empty second one counts as half a row of four.
    assert day.psi_length == pytest.approx(0.5 * log(2) + (0.125 - 0.5) * log(0.125 / 0.5))
    # The shares 0, 3 % and 50 %: 2, 0 and 2 tweets, and 8, 2 and 0 test rows.
    assert day.psi_unknown == pytest.approx(
        (0.5 - 0.8) * log(0.5 / 0.8) + (0.125 - 0.2) * log(0.125 / 0.2) + (0.5 - 0.05) * log(0.5 / 0.05)
    )


def test_the_drift_of_days_is_their_mean_by_tweets_beside_what_chance_gives(database: Database) -> None:
    champion = version_tested(database, [{"predicted": name} for name in ("positive", "negative")])
    assign(database, champion)
    scored(database, champion, 1, ["positive", "negative"])
    scored(database, champion, 2, ["positive"] * 3 + ["negative"] * 3 + ["positive"] * 12)
    report = measure(database)
    even, uneven = 0.0, (15 / 18 - 0.5) * log(15 / 18 / 0.5) + (3 / 18 - 0.5) * log(3 / 18 / 0.5)
    found = report.drift["labels"]
    assert (found.psi, found.chance) == pytest.approx(((2 * even + 18 * uneven) / 20, 2 / 20 + 1 / 2))
    assert "unknown" not in report.drift  # neither side has the share
    assert [Drift(psi, 0).verdict for psi in (0.09, 0.1, 0.25, 0.26)] == ["little", "some", "some", "much"]


def test_what_retention_deletes_stays_in_the_figures_and_what_is_deleted_by_name_does_not(database: Database) -> None:
    champion = version_tested(database, [{"predicted": name} for name in ("positive", "negative")])
    assign(database, champion)
    scored(database, champion, 1, ["positive"] * 3, probability=0.9, unknown_share=0.5)
    scored(database, champion, 20, ["positive", "negative", "negative"], probability=0.6)
    before = answer(database, "SELECT * FROM v_drift ORDER BY day"), answer(database, "SELECT * FROM v_live_quality")
    assert len(before[0]) == 2
    with database.begin() as session:
        assert upkeep.delete_received_before(session, days_ago(10), 10) == 3
    assert answer(database, "SELECT count(*) FROM predictions") == [(3,)]
    after = answer(database, "SELECT * FROM v_drift ORDER BY day"), answer(database, "SELECT * FROM v_live_quality")
    assert after == before
    run(database, "DELETE FROM tweets")
    assert answer(database, "SELECT tweets, expected_accuracy FROM v_drift") == [(3, pytest.approx(0.6))]


@pytest.mark.parametrize("task", ["multi_label", "continuous"])
def test_a_champion_without_single_labels_has_a_drift_of_texts_alone(database: Database, task: str) -> None:
    with database.begin() as session:
        job = TrainingJob(request_id="a", state="succeeded", config={"task": task}, dataset="d.csv")
        session.add(job)
        session.flush()
    champion = version_tested(database, [{"text": "あ" * 12}], job_id=job.id)
    assign(database, champion)
    ids = scored(database, champion, 1, ["positive"] * 3)
    label(database, {ids[0]: "positive"})
    report = measure(database)
    assert (report.periods, report.expected_accuracy, set(report.drift)) == ([], None, {"length"})


def test_an_sqlite_without_mathematical_functions_is_named(sqlite: Database) -> None:
    assign(sqlite, version_tested(sqlite, []))
    denied = {"ln"}

    def authorizer(action: int, _: str | None, name: str | None, *__: object) -> int:
        return sqlite3.SQLITE_DENY if action == sqlite3.SQLITE_FUNCTION and name in denied else sqlite3.SQLITE_OK

    sqlite.close()
    event.listen(sqlite.engine, "connect", lambda connection, _: connection.set_authorizer(authorizer))
    with pytest.raises(DatabaseError, match=r"^SQLite 3\.[0-9.]+ of this Python has no mathematical functions, which"):
        measure(sqlite)
    denied.clear()
    sqlite.close()
    assert measure(sqlite).days == []


def test_a_tweet_counts_on_its_day_in_utc_whatever_the_zone_of_the_session(database: Database) -> None:
    assign(database, champion := version_tested(database, []))
    start = utc_now().replace(hour=0, minute=30, second=0, microsecond=0)
    write(database, [tweet_row("1", received_at=start)], [prediction_row("1", champion)])
    if database.engine.dialect.name == "postgresql":
        run(database, f"ALTER DATABASE {database.engine.url.database} SET timezone = 'America/Los_Angeles'")
        database.close()
    assert [str(day) for (day,) in answer(database, "SELECT day FROM v_drift")] == [str(start.date())]


def test_labels_that_a_model_of_the_champions_cascade_learned_do_not_count(database: Database) -> None:
    with database.begin() as session:
        job = TrainingJob(request_id="a", state="succeeded", config={}, dataset="d.csv", labels_until=days_ago(2))
        session.add(job)
        session.flush()
    student, teacher, champion = (version_tested(database, [], job_id=id_) for id_ in (job.id, None, None))
    ids = scored(database, champion, 3, ["positive", "positive"])
    for id_, days in zip(ids, (3, 1), strict=True):  # one was labelled before the job read the labels
        label(database, {id_: "positive"}, version=champion, at=days_ago(days))
    assign(database, champion)
    counts = []
    for made_of in ((), (student, teacher), (teacher, student)):
        with database.begin() as session:
            session.execute(delete(Cascade))
            if made_of:
                registry.add_cascade(session, cascade_row(champion, *made_of))
        with database.read() as session:
            counts.append(len(live.labelled(session, champion, 7)))
        assert answer(database, "SELECT labels FROM v_live_quality WHERE days = 7") == [(counts[-1],)]
    assert counts == [2, 1, 1]
