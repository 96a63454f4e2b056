"""Labels of stored tweets: which one counts, taking one back, and what a model proposed kept apart."""

from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import func, select

from db import predictions
from db.admin import upkeep
from db.labelling import labels
from db.models import Label, ReviewAsk, ReviewTweet
from db.session import Database
from tests.support.rows import NOON, make_version, tweet_row, write


def label_row(
    tweet_id: str, label: str, annotator: str = "a", source: str = "review", minute: int = 0
) -> dict[str, Any]:
    at = NOON + timedelta(minutes=minute)
    return {"tweet_id": tweet_id, "label": label, "annotator": annotator, "source": source, "at": at}


def give(database: Database, *rows: dict[str, Any]) -> None:
    with database.begin() as session:
        labels.add(session, rows)


def counting(database: Database, since: datetime | None = None, topic: str | None = None) -> dict[str, tuple[Any, ...]]:
    with database.read() as session:
        return {row[0]: tuple(row[1:]) for row in labels.labelled(session, since, topic)}


def test_the_newest_label_of_each_annotator_counts_and_the_majority_wins(database: Database) -> None:
    write(database, [tweet_row("1", text="雨だ"), tweet_row("2", topic="映画"), tweet_row("3")], [])
    give(
        database,
        label_row("1", "positive", "a", minute=1),
        label_row("1", "negative", "a", minute=2),
        label_row("1", "positive", "b", minute=3),
        label_row("1", "negative", "c", minute=0),
        label_row("2", "positive", "a"),
        label_row("3", "positive", "a", source="model"),
    )
    found = counting(database)
    assert found["1"] == ("雨だ", "negative", 3, 2, NOON + timedelta(minutes=2))
    assert set(found) == {"1", "2"}
    assert set(counting(database, topic="映画")) == {"2"}
    assert counting(database, since=NOON + timedelta(seconds=1)) == {}
    with database.read() as session:
        assert [tuple(row[2:5]) for row in labels.proposed(session)] == [("positive", 1, 1)]
        assert labels.labelled_count(session) == 2
        assert [(label.annotator, label.label) for label in labels.of_tweets(session, ["1", "3"])] == [
            ("c", "negative"), ("a", "positive"), ("a", "negative"), ("b", "positive")
        ]  # fmt: skip
        assert [tuple(row) for row in labels.counts(session)] == [
            ("model", "a", "positive", 1),
            ("review", "a", "negative", 1), ("review", "a", "positive", 1),
            ("review", "b", "positive", 1), ("review", "c", "negative", 1),
        ]  # fmt: skip


def test_withdrawing_a_label_makes_the_one_before_it_count(database: Database) -> None:
    write(database, [tweet_row("1")], [])
    give(
        database,
        label_row("1", "positive", minute=1),
        label_row("1", "negative", minute=2),
        label_row("1", "neutral", "b", minute=3),
        label_row("1", "neutral", source="model", minute=4),
    )
    with database.begin() as session:
        taken = labels.withdraw(session, "1", "a")
    assert taken is not None
    assert (taken.label, taken.annotator) == ("negative", "a")
    with database.begin() as session:
        assert [(label.annotator, label.label) for label in labels.of_tweets(session, ["1"])] == [
            ("a", "positive"), ("b", "neutral"), ("a", "neutral")
        ]  # fmt: skip
        assert labels.withdraw(session, "1", "a") is not None
        assert labels.withdraw(session, "1", "a") is None  # what a model proposed stays
        assert session.scalar(select(func.count()).select_from(Label)) == 2


def test_deleting_a_tweet_deletes_its_labels_and_review_rows(database: Database) -> None:
    version = make_version(database)
    write(database, [tweet_row("1", author_id="x"), tweet_row("2"), tweet_row("3")], [])
    give(database, *(label_row(tweet, "positive") for tweet in "123"))
    with database.begin() as session:
        for place, tweet in enumerate("123"):
            session.add(ReviewTweet(tweet_id=tweet, reason="random", readers=1, place=place, model_version_id=version))
            session.flush()
            session.add(ReviewAsk(tweet_id=tweet, annotator="a", state="labelled"))
    with database.begin() as session:
        assert predictions.delete_tweets(session, [], ["x"], None, 10) == ["1"]
    with database.begin() as session:
        assert [session.scalars(select(table.tweet_id)).all() for table in (Label, ReviewTweet, ReviewAsk)] == [
            ["2", "3"]
        ] * 3
    with database.begin() as session:  # as the retention does
        assert upkeep.delete_received_before(session, NOON + timedelta(days=1), 1) == 1
    with database.begin() as session:
        assert [len(session.scalars(select(table.tweet_id)).all()) for table in (Label, ReviewTweet, ReviewAsk)] == [
            1
        ] * 3
