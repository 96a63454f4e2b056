"""Find tweets: the newest first, page by page, with what the champion predicted of each."""

from dataclasses import dataclass
from datetime import datetime

import pandas as pd

from db.querying import frames
from worker.console import queries
from worker.console.context import Console
from worker.console.queries import stamp

PAGE_ROWS = 50
DOWNLOAD_ROWS = 100_000
COLUMNS = """t.tweet_id, t.text, t.author_id, t.lang, t.topic, t.tweet_created_at, t.received_at,
             p.model_version_id, p.label, p.probability, p.score_signed, p.scored_at"""
JOIN = """FROM tweets AS t {join} predictions AS p ON p.tweet_id = t.tweet_id AND p.model_version_id = :version"""
CERTAIN = (0.0, 1.0)


@dataclass(frozen=True)
class Wanted:
    """Conditions; an empty one is none. `topic`: None for all. `probability`: from and to, of the label."""

    version_id: int
    start: datetime
    end: datetime
    topic: str | None = None
    text: str = ""
    label: str = ""
    author: str = ""
    probability: tuple[float, float] = CERTAIN


@dataclass(frozen=True)
class Place:
    """The last row of a page, after which the next one begins."""

    received_at: str
    tweet_id: str


def page(console: Console, wanted: Wanted, after: Place | None, rows: int = PAGE_ROWS) -> pd.DataFrame:
    """Up to `rows` rows. The order is that of the index on `received_at`, so that a page needs no sorting."""
    sql, given = _query(console, wanted, after, rows)
    return console.frame(sql, given)


def all_of(console: Console, wanted: Wanted) -> pd.DataFrame:
    """What the conditions find, up to `DOWNLOAD_ROWS` rows. Not kept in memory for other visitors."""
    sql, given = _query(console, wanted, None, DOWNLOAD_ROWS)
    return frames.whole(console.settings.query_url, sql, given)


def _query(console: Console, wanted: Wanted, after: Place | None, rows: int) -> tuple[str, dict[str, object]]:
    conditions, given = _conditions(console, wanted)
    if after is not None:
        # Instead of a comparison of pairs: both databases then use the index on the time.
        conditions += ["t.received_at <= :before", "(t.received_at < :before OR t.tweet_id < :before_id)"]
        given |= {"before": after.received_at, "before_id": after.tweet_id}
    # A tweet that the champion has not scored is shown, unless a condition is about its prediction.
    scored = bool(wanted.label) or wanted.probability != CERTAIN
    join = JOIN.format(join="JOIN" if scored else "LEFT JOIN")
    where = " AND ".join(conditions)
    sql = f"SELECT {COLUMNS} {join} WHERE {where} ORDER BY t.received_at DESC, t.tweet_id DESC LIMIT :rows"
    return sql, {**given, "rows": rows}


def last_place(frame: pd.DataFrame) -> Place:
    row = frame.iloc[-1]
    return Place(stamp(row["received_at"].to_pydatetime()), str(row["tweet_id"]))


def _conditions(console: Console, wanted: Wanted) -> tuple[list[str], dict[str, object]]:
    written = "coalesce(t.tweet_created_at, t.received_at)"
    conditions = [f"{written} >= :start", f"{written} < :end"]
    given: dict[str, object] = {
        "version": wanted.version_id, "start": stamp(wanted.start), "end": stamp(wanted.end),
    }  # fmt: skip
    if wanted.topic is not None:
        conditions.append("t.topic = :topic" if wanted.topic else "(t.topic IS NULL OR t.topic = '')")
        given |= {"topic": wanted.topic} if wanted.topic else {}
    if wanted.text:
        like = "LIKE" if queries.is_sqlite(console) else "ILIKE"
        conditions.append(rf"t.text {like} :text ESCAPE '\'")
        given["text"] = f"%{_literally(wanted.text)}%"
    if wanted.label:
        conditions.append("p.label = :label")
        given["label"] = wanted.label
    if wanted.author:
        conditions.append("t.author_id = :author")
        given["author"] = wanted.author
    if wanted.probability != CERTAIN:
        conditions.append("p.probability BETWEEN :low AND :high")
        given |= {"low": wanted.probability[0], "high": wanted.probability[1]}
    return conditions, given


def _literally(text: str) -> str:
    """The text for LIKE, without its wildcards."""
    return text.replace("\\", "\\\\").replace("%", r"\%").replace("_", r"\_")


def one(console: Console, tweet_id: str) -> dict[str, object] | None:
    """Every column of a tweet; None when there is none."""
    found = console.frame("SELECT * FROM tweets WHERE tweet_id = :tweet_id", {"tweet_id": tweet_id})
    return None if found.empty else {str(name): value for name, value in found.iloc[0].items()}


def predictions_of(console: Console, tweet_id: str) -> pd.DataFrame:
    """Every model's prediction of a tweet, the newest model first."""
    return console.frame(
        """SELECT model_version_id, label, probability, score_signed, probabilities, scored_at
           FROM predictions WHERE tweet_id = :tweet_id ORDER BY model_version_id DESC""",
        {"tweet_id": tweet_id},
    )


def labels_of(console: Console, tweet_id: str) -> pd.DataFrame:
    return console.frame(
        """SELECT label, annotator, source, at AS labelled_at FROM labels
           WHERE tweet_id = :tweet_id ORDER BY id DESC""",
        {"tweet_id": tweet_id},
    )
