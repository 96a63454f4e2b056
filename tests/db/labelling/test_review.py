"""Queries of picks: which tweets may be picked, what a random draw changes, and whose labels are compared."""

from collections import Counter
from datetime import timedelta
from typing import Any

from db.labelling import labels, review
from db.models import ReviewTweet
from db.session import Database
from tests.support.rows import NOON, make_version, prediction_row, tweet_row, write


def pick_row(tweet_id: str, version: int, **values: object) -> dict[str, Any]:
    row = {"tweet_id": tweet_id, "reason": "random", "readers": 1, "place": int(tweet_id) + 1}
    return {**row, "model_version_id": version, "picked_at": NOON, **values}


def label_row(tweet_id: str, annotator: str, label: str = "positive", **values: object) -> dict[str, Any]:
    row = {"tweet_id": tweet_id, "annotator": annotator, "label": label, "source": "review", "at": NOON}
    return {**row, **values}


def scored(database: Database, count: int, **values: object) -> int:
    version = make_version(database)
    tweets = [tweet_row(str(i)) for i in range(count)]
    write(
        database, tweets, [prediction_row(str(i), version, probability=0.5 + i / 100, **values) for i in range(count)]
    )
    return version


def test_a_draw_is_uniform_over_tweets_not_drawn_before_whatever_they_were_picked_or_labelled_for(
    database: Database,
) -> None:
    version = scored(database, 48)
    other = make_version(database)
    old = tweet_row("old", received_at=NOON - timedelta(days=31))
    write(database, [old, tweet_row("unscored")], [prediction_row("old", version), prediction_row("unscored", other)])
    with database.begin() as session:
        review.add_picks(session, [pick_row(str(i), version, reason="uncertain") for i in range(10)])
        review.add_picks(session, [pick_row(str(i), version) for i in range(40, 48)])
        labels.add(session, [label_row(str(i), "ann", source="import") for i in range(10, 20)])
    draws, size = 400, 10
    drawn: Counter[str] = Counter()
    with database.read() as session:
        for _ in range(draws):
            once = review.draw(session, version, NOON - timedelta(days=30), size)
            assert len(set(once)) == size
            drawn.update(once)
    assert set(drawn) == {str(i) for i in range(40)}
    # Each count is 100 with a standard deviation of 8.7; six of them are exceeded once in ten million runs.
    assert all(abs(count - draws * size / 40) < 52 for count in drawn.values())
    half = sum(drawn[str(i)] for i in range(20))
    assert abs(half - draws * size / 2) < 6 * (draws * size * 0.25 * 30 / 39) ** 0.5


def test_only_tweets_that_are_neither_picked_nor_labelled_by_people_are_found(database: Database) -> None:
    champion = scored(database, 8)
    challenger = make_version(database)
    challenged = [
        prediction_row(str(i), challenger, label="positive" if i == 7 else "negative", probabilities={"negative": 0.9})
        for i in range(3, 8)
    ]
    write(database, [], challenged)
    with database.begin() as session:
        review.add_picks(session, [pick_row("0", champion), pick_row("4", champion)])
        labels.add(session, [label_row("1", "ann"), label_row("5", "ann"), label_row("2", "bert", source="model")])
    with database.read() as session:
        assert [row.tweet_id for row in review.least_certain(session, champion, 3)] == ["2", "3", "6"]
        found = review.disagreements(session, champion, challenger, 10)
        assert review.known(session, [str(i) for i in range(8)]) == {"0", "1", "4", "5"}
    assert {row.tweet_id for row in found} == {"3", "6"}
    assert found[0].challenged == {"negative": 0.9}


def test_a_tweet_that_is_drawn_counts_as_random_at_its_new_place_and_never_stops_to(database: Database) -> None:
    version = scored(database, 3)
    with database.begin() as session:
        review.add_picks(session, [pick_row("0", version, reason="uncertain", readers=2), pick_row("1", version)])
        review.add_picks(
            session,
            [
                pick_row("0", version, place=10),
                pick_row("1", version, place=11),
                pick_row("2", version, place=12, reason="spread"),
            ],
        )
        review.add_picks(session, [pick_row(i, version, place=20, reason="uncertain") for i in ("0", "2")])
        assert review.last_place(session) == 12
    with database.read() as session:
        rows = [session.get_one(ReviewTweet, i) for i in "012"]
    assert [(row.reason, row.place, row.readers) for row in rows] == [
        ("random", 10, 2),
        ("random", 2, 1),
        ("spread", 12, 1),
    ]


def test_pairs_are_the_newest_labels_of_two_people(database: Database) -> None:
    scored(database, 4)
    later = NOON + timedelta(minutes=1)
    rows = [
        label_row("0", "ann", "negative"), label_row("0", "ann", "positive", at=later), label_row("0", "bob"),
        label_row("1", "bob", "negative"), label_row("1", "ann"), label_row("1", "cid", "negative"),
        label_row("2", "ann"), label_row("2", "model", "negative", source="model"),
        label_row("3", "ann"), label_row("3", "ann", "negative"),
    ]  # fmt: skip
    with database.begin() as session:
        labels.add(session, rows)
        assert review.pairs(session) == [("positive", "positive"), ("positive", "negative")]
