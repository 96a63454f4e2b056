"""The tables of labels that people give to stored tweets, and of the tweets that are picked for them to read."""

from datetime import datetime
from typing import Any

from sqlalchemy import CheckConstraint, ForeignKey, ForeignKeyConstraint, Index
from sqlalchemy.orm import Mapped, mapped_column

from db.base import Base, TweetId, utc_now

# `model` marks labels that a model proposed. They are kept apart: no figure and no training counts them.
LABEL_SOURCES = ("review", "import", "model")
# Why a tweet was picked. Figures of quality count `random` alone: the other picks are not typical tweets.
PICK_REASONS = ("random", "uncertain", "disagreement", "spread")
ASK_STATES = ("asked", "labelled", "skipped")


def _one_of(column: str, values: tuple[str, ...]) -> CheckConstraint:
    return CheckConstraint(f"{column} IN ({', '.join(map(repr, values))})", name=column)


def on_sqlite(column: str, target: str, **more: Any) -> ForeignKeyConstraint:
    """A foreign key of SQLite alone. PostgreSQL drops whole partitions of tweets: triggers and functions of migration
    0006 do the work of the foreign keys to them."""
    return ForeignKeyConstraint([column], [target], info={"only_on": "sqlite"}, **more).ddl_if(dialect="sqlite")


def of_tweet() -> ForeignKeyConstraint:
    return on_sqlite("tweet_id", "tweets.tweet_id", ondelete="CASCADE")


class Label(Base):
    """Rows are added and not changed: a second label of the same annotator replaces the first one for readers."""

    __tablename__ = "labels"
    __table_args__ = (
        _one_of("source", LABEL_SOURCES),
        of_tweet(),
        Index(None, "tweet_id", "annotator"),
        Index(None, "at"),
        {"comment": "One row per label that an annotator gave to a tweet. The newest of a tweet and annotator counts."},
    )

    id: Mapped[int] = mapped_column(primary_key=True, comment="Id of the label, rising.")
    tweet_id: Mapped[str] = mapped_column(TweetId, comment="The tweet that was labelled.")
    label: Mapped[str] = mapped_column(comment="The label. Several labels of a multi-label task are joined with |.")
    annotator: Mapped[str] = mapped_column(comment="Name of the person, or of the model, that gave the label.")
    source: Mapped[str] = mapped_column(
        comment="Where it comes from: review, import, or model for labels that a model proposed."
    )
    at: Mapped[datetime] = mapped_column(default=utc_now, comment="Time at which the label was given, UTC.")


class ReviewTweet(Base):
    __tablename__ = "review_tweets"
    __table_args__ = (
        _one_of("reason", PICK_REASONS),
        of_tweet(),
        {"comment": "One row per tweet that was picked to be labelled."},
    )

    tweet_id: Mapped[str] = mapped_column(TweetId, primary_key=True, comment="The tweet that was picked.")
    reason: Mapped[str] = mapped_column(
        comment="Why it was picked: random, uncertain, disagreement (of champion and challenger) or spread."
    )
    readers: Mapped[int] = mapped_column(comment="Number of annotators that are to label it: 1, or 2 for a tenth.")
    place: Mapped[int] = mapped_column(index=True, comment="Order in which the tweets of all picks are asked, rising.")
    model_version_id: Mapped[int] = mapped_column(
        ForeignKey("model_versions.id"), comment="The champion whose predictions it was picked by."
    )
    picked_at: Mapped[datetime] = mapped_column(default=utc_now, comment="Time at which it was picked, UTC.")


class ReviewAsk(Base):
    __tablename__ = "review_asks"
    __table_args__ = (
        _one_of("state", ASK_STATES),
        {"comment": "One row per picked tweet and annotator who was asked about it."},
    )

    tweet_id: Mapped[str] = mapped_column(
        TweetId, ForeignKey("review_tweets.tweet_id", ondelete="CASCADE"), primary_key=True, comment="The picked tweet."
    )
    annotator: Mapped[str] = mapped_column(primary_key=True, comment="Name of the annotator.")
    state: Mapped[str] = mapped_column(comment="State of the question: asked, labelled or skipped.")
    at: Mapped[datetime] = mapped_column(
        default=utc_now, comment="Time of that state, UTC. A question without an answer is asked of others later."
    )
