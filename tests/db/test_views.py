"""The sums that triggers keep beside the predictions, and the views that answer from them."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from db import predictions
from db.session import Database
from tests.support.rows import (
    SUMS,
    answer,
    assert_counted,
    assign,
    make_version,
    prediction_row,
    run,
    some,
    tweet_row,
    write,
)


@pytest.mark.parametrize(
    ("remove", "left"),
    [
        ("DELETE FROM predictions WHERE tweet_id < '0050'", 160),
        ("DELETE FROM tweets WHERE tweet_id < '0050'", 160),
        ("DELETE FROM tweets", 0),
    ],
)
def test_sums_follow_whatever_is_stored_repeated_or_removed(database: Database, remove: str, left: int) -> None:
    old, new = make_version(database), make_version(database)
    write(database, *some(old, range(120)))
    write(database, *some(old, range(80, 160)))  # half of it is there already
    write(database, *some(new, range(100)))
    assert sum(row[3] for row in answer(database, SUMS)) == 260
    assert_counted(database)
    run(database, remove)
    assert_counted(database)
    assert sum(row[3] for row in answer(database, SUMS)) == left


def test_a_window_that_is_rolled_back_is_not_counted(database: Database) -> None:
    version = make_version(database)
    tweets, scored = some(version, range(10))
    with database.read() as session:  # which commits nothing
        predictions.add_tweets(session, tweets)
        predictions.add_predictions(session, scored)
    assert answer(database, SUMS) == []


def test_writers_of_the_same_hour_lose_nothing_and_never_deadlock(database: Database) -> None:
    version = make_version(database)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda n: write(database, *some(version, range(20 * n, 20 * n + 40))), range(16)))
    assert sum(row[3] for row in answer(database, SUMS)) == 20 * 15 + 40
    assert_counted(database)


def test_topics_are_shared_out_by_label_and_the_unnamed_is_null(database: Database) -> None:
    version = make_version(database)
    assign(database, version)
    labels = {"1": "positive", "2": "positive", "3": "negative", "4": "negative"}
    topics = {"1": "映画", "2": "映画", "3": "映画", "4": None}
    write(
        database,
        [tweet_row(id_, topic=topic) for id_, topic in topics.items()],
        [prediction_row(id_, version, label=label, score_signed=None) for id_, label in labels.items()],
    )
    rows = answer(
        database, "SELECT topic, label, tweets, share, mean_score FROM v_topic_sentiment ORDER BY tweets, topic"
    )
    assert sorted(rows, key=str) == sorted(
        [
            ("映画", "positive", 2, pytest.approx(2 / 3), None),
            ("映画", "negative", 1, pytest.approx(1 / 3), None),
            (None, "negative", 1, 1.0, None),
        ],
        key=str,
    )


def test_views_speak_of_the_present_champion_alone(database: Database) -> None:
    old, new = make_version(database), make_version(database)
    assign(database, old)
    write(database, [tweet_row("1")], [prediction_row("1", old, probability=0.5), prediction_row("1", new)])
    for view, expected in (("v_low_confidence", 1), ("v_topic_sentiment", 1), ("v_sentiment_hourly", 1)):
        assert len(answer(database, f"SELECT * FROM {view}")) == expected
    [(id_, said)] = answer(database, "SELECT tweet_id, probability FROM v_low_confidence")
    assert (id_, said) == ("1", 0.5)
    assign(database, new)
    assert answer(database, "SELECT * FROM v_low_confidence") == []
    assert answer(database, "SELECT tweets, mean_probability FROM v_sentiment_hourly") == [(1, 0.75)]
