"""What a window writes, the model registry, and the views for analysts."""

import random
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import func, select, text

from db import jobs, predictions, registry
from db.errors import NotFound
from db.models import DeadLetter, EpochMetric, ModelAlias, ModelVersion, Prediction, Tweet
from db.session import Database
from tests.support.rows import (
    NOON,
    answer,
    assign,
    everything,
    letter_row,
    make_version,
    prediction_row,
    tweet_row,
    write,
)


def test_replayed_window_changes_nothing(database: Database) -> None:
    version = make_version(database)
    write(database, [tweet_row("1"), tweet_row("2")], [prediction_row("1", version), prediction_row("2", version)])
    with database.begin() as session:
        predictions.bury(session, [letter_row("1-0")])
    before = everything(database)

    later = NOON + timedelta(hours=1)
    other = {"label": "negative", "probability": 0.6, "scored_at": later}
    write(
        database,
        [tweet_row("2", text="別の文", received_at=later), tweet_row("1", topic="天気")],
        [prediction_row("2", version, **other), prediction_row("1", version, **other)],
    )
    with database.begin() as session:
        predictions.bury(session, [letter_row("1-0", reason="another", attempts=9)])
    assert everything(database) == before


def test_window_that_overlaps_an_earlier_one_adds_only_what_is_new(database: Database) -> None:
    first, second = make_version(database), make_version(database)
    write(database, [tweet_row("1")], [prediction_row("1", first)])
    write(
        database,
        [tweet_row("1"), tweet_row("2"), tweet_row("2")],  # a producer that repeats itself within one window
        [prediction_row("1", first), prediction_row("2", first), prediction_row("2", first, label="negative")],
    )
    write(database, [tweet_row("1")], [prediction_row("1", second)])
    with database.read() as session:
        keys = session.execute(select(Prediction.tweet_id, Prediction.model_version_id)).all()
        assert session.scalar(select(func.count()).select_from(Tweet)) == 2
        assert (predictions.prediction_count(session), predictions.prediction_count(session, first)) == (3, 2)
    assert set(keys) == {("1", first), ("2", first), ("1", second)}


def test_window_beyond_the_bound_value_limit_is_stored_whole(database: Database) -> None:
    version = make_version(database)
    # Seven columns: more values than either database binds in one statement.
    ids = [str(i) for i in range(9_500)]
    write(database, [tweet_row(i) for i in ids], [prediction_row(i, version) for i in ids])
    with database.read() as session:
        assert session.scalar(select(func.count()).select_from(Tweet)) == len(ids)
        assert predictions.prediction_count(session) == len(ids)


def test_empty_window_writes_nothing(database: Database) -> None:
    write(database, [], [])
    with database.begin() as session:
        predictions.bury(session, [])
    assert everything(database) == {"tweets": [], "predictions": [], "dead_letters": []}


def test_dead_letter_keeps_its_payload_byte_for_byte(database: Database) -> None:
    payload = b'{"text": "\xff\x00\xed\xa0\x80"}'
    with database.begin() as session:
        predictions.bury(session, [letter_row("1-0", payload=payload)])
    with database.read() as session:
        assert session.scalars(select(DeadLetter.payload)).one() == payload


def test_writers_of_overlapping_windows_in_any_order_never_deadlock(database: Database) -> None:
    version = make_version(database)
    ids = [str(i) for i in range(400)]

    def write_shuffled(seed: int) -> None:
        order = random.Random(seed).sample(ids, 300)
        write(database, [tweet_row(i) for i in order], [prediction_row(i, version) for i in reversed(order)])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write_shuffled, range(16)))  # raises what a writer raised
    with database.read() as session:
        assert predictions.prediction_count(session) == len(ids)


def test_model_version_comes_back_with_its_figures(database: Database) -> None:
    version = ModelVersion(base_model="b", artifact_url="u", sha256="s", labels=["陰性", "陽性"], cleaner_version="1")
    with database.begin() as session:
        registry.add_version(
            session,
            version,
            [{"metric": "f1", "label": "陽性", "value": 0.1}, {"metric": "accuracy", "label": "", "value": 0.9}],
            [{"actual": "陰性", "predicted": "陽性", "count": 7}],
            [
                {"row_number": 12, "text": "文", "actual": "陰性", "predicted": "陽性", "probability": 0.6}
                | {"probabilities": {"陽性": 0.6, "陰性": 0.4}}
            ],
        )
    with database.read() as session:
        assert registry.get(session, version.id).labels == ["陰性", "陽性"]
        assert registry.metrics(session, version.id) == {("f1", "陽性"): 0.1, ("accuracy", ""): 0.9}
        assert registry.confusion(session, version.id) == {("陰性", "陽性"): 7}
        rows = session.execute(text("SELECT row_number, predicted FROM test_predictions")).all()
    assert rows == [(12, "陽性")]


def test_alias_keeps_its_history_and_a_rollback_is_one_row(database: Database) -> None:
    old, new = make_version(database), make_version(database)
    assign(database, old)
    assign(database, old, alias="challenger")
    assign(database, new)
    with database.read() as session:
        assert registry.assigned(session, "champion") == new
        assert registry.assigned(session, "challenger") == old

    assign(database, old)
    with database.read() as session:
        history = session.execute(select(ModelAlias.alias, ModelAlias.model_version_id).order_by(ModelAlias.id)).all()
        assert registry.assigned(session, "champion") == old
    assert history == [("champion", old), ("challenger", old), ("champion", new), ("champion", old)]


@pytest.mark.parametrize(("alias", "exists"), [("champ", True), ("champion", False)])
def test_unknown_alias_or_version_is_refused_and_leaves_the_champion(
    database: Database, alias: str, exists: bool
) -> None:
    version = make_version(database)
    assign(database, version)
    with pytest.raises(NotFound):
        assign(database, make_version(database) if exists else 999, alias=alias)
    with database.read() as session:
        assert registry.assigned(session, "champion") == version


def test_current_predictions_are_those_of_the_present_champion_alone(database: Database) -> None:
    old, new = make_version(database), make_version(database)
    write(
        database,
        [tweet_row("1"), tweet_row("2")],
        [prediction_row("1", old), prediction_row("2", old), prediction_row("1", new, label="negative")],
    )
    current = "SELECT tweet_id, label FROM v_predictions_current ORDER BY 1"
    assert answer(database, current) == []
    assign(database, old)
    assign(database, new, alias="challenger")
    assert answer(database, current) == [("1", "positive"), ("2", "positive")]
    assign(database, new)
    assert answer(database, current) == [("1", "negative")]
    assign(database, old)
    assert answer(database, current) == [("1", "positive"), ("2", "positive")]


@pytest.mark.parametrize(
    ("when", "hour_utc", "day_jst"),
    [
        ("2026-01-31T14:59:59.999999+00:00", "2026-01-31 14", "2026-01-31"),
        ("2026-01-31T15:00:00+00:00", "2026-01-31 15", "2026-02-01"),
        ("2026-02-01T00:00:00+09:00", "2026-01-31 15", "2026-02-01"),
        ("2025-12-31T23:59:59.999999+00:00", "2025-12-31 23", "2026-01-01"),
    ],
)
def test_tweet_counts_in_its_utc_hour_and_its_japanese_day(
    database: Database, when: str, hour_utc: str, day_jst: str
) -> None:
    version = make_version(database)
    assign(database, version)
    write(database, [tweet_row("1", tweet_created_at=datetime.fromisoformat(when))], [prediction_row("1", version)])
    [(hour,)] = answer(database, "SELECT hour_utc FROM v_sentiment_hourly")
    [(day,)] = answer(database, "SELECT day_jst FROM v_sentiment_daily_jst")
    hour = datetime.fromisoformat(hour) if isinstance(hour, str) else hour
    assert f"{hour.astimezone(UTC):%Y-%m-%d %H %M:%S}" == f"{hour_utc} 00:00"
    assert str(day) == day_jst


@pytest.mark.parametrize("view", ["v_sentiment_hourly", "v_sentiment_daily_jst"])
def test_sentiment_views_count_and_average_by_label(database: Database, view: str) -> None:
    version = make_version(database)
    assign(database, version)
    write(
        database,
        # The last has no time of its own: it counts when it arrived, in the same hour.
        [tweet_row("1", tweet_created_at=NOON), tweet_row("2", tweet_created_at=NOON), tweet_row("3")],
        [
            prediction_row("1", version),
            prediction_row("2", version, label="negative", score_signed=-0.5),
            prediction_row("3", version, probability=0.25, score_signed=0.0),
        ],
    )
    rows = answer(database, f"SELECT label, tweets, mean_probability, mean_score FROM {view} ORDER BY label")
    assert rows == [("negative", 1, 0.75, -0.5), ("positive", 2, 0.5, 0.25)]


def test_leaderboard_shows_whole_split_figures_and_versions_without_any(database: Database) -> None:
    measured = make_version(database, {("accuracy", ""): 0.9, ("f1_macro", ""): 0.8, ("f1_macro", "positive"): 0.99})
    bare = make_version(database)
    sql = "SELECT model_version_id, accuracy, f1_micro, f1_macro, tfidf_f1_macro FROM v_model_leaderboard ORDER BY 1"
    assert answer(database, sql) == [(measured, 0.9, None, 0.8, None), (bare, None, None, None, None)]


def test_jobs_view_shows_each_job_once_with_its_epochs_and_model(database: Database) -> None:
    with database.begin() as session:
        trained, waiting = (
            jobs.submit(session, request_id=name, dataset="d.csv", dataset_sha256=None, config={}).id for name in "ab"
        )
        others = dict.fromkeys(("train_loss", "learning_rate", "valid_loss", "valid_accuracy", "seconds"), 1.0)
        for epoch, f1 in ((1, 0.5), (2, 0.75), (3, 0.6)):
            session.add(EpochMetric(job_id=trained, epoch=epoch, valid_f1_macro=f1, **others))
    version = make_version(database, job_id=trained)
    sql = "SELECT id, state, model_version_id, epochs, best_valid_f1_macro FROM v_jobs ORDER BY id"
    assert answer(database, sql) == [(trained, "queued", version, 3, 0.75), (waiting, "queued", None, None, None)]
