"""Figures of Overview, as frames that its charts draw. Bins and minutes without tweets have rows with zero."""

from datetime import UTC, datetime, timedelta

import pandas as pd

from worker.console import queries
from worker.console.charts import OTHER, PALETTE
from worker.console.context import Console
from worker.console.filters import Chosen
from worker.console.queries import JAPAN, stamp

TOP_TOPICS = 12
MINUTES = 60
# The day in Japan of an hour, and the minute of a window.
DAY = {True: "date(substr(hour, 1, 19), '+9 hours')", False: "(hour AT TIME ZONE 'Asia/Tokyo')::date"}
MINUTE = {True: "substr(started_at, 1, 16) || ':00Z'", False: "date_trunc('minute', started_at)"}

WITHIN = "model_version_id = :version AND hour >= :start AND hour < :end"
TOPICS = f"""SELECT topic, label, sum(tweets) AS tweets FROM sentiment_rollup WHERE {WITHIN} AND topic IN (
    SELECT topic FROM sentiment_rollup WHERE {WITHIN}
    GROUP BY topic HAVING sum(tweets) > 0 ORDER BY sum(tweets) DESC, topic LIMIT {TOP_TOPICS})
    GROUP BY topic, label"""  # noqa: S608 - constants
SUMS = f"""sum(tweets) AS tweets, sum(score_sum) AS score_sum, sum(with_score) AS with_score
    FROM sentiment_rollup WHERE {WITHIN}"""
WINDOWS = "sum(tweets) AS tweets FROM scoring_windows WHERE started_at >= :start AND started_at < :end"


def bin_of(start: datetime, end: datetime) -> tuple[str, timedelta]:
    """Name and length of a chart's bins."""
    if end - start <= timedelta(days=8):
        return "hour", timedelta(hours=1)
    return ("day", timedelta(days=1)) if end - start <= timedelta(days=400) else ("week", timedelta(days=7))


def over_time(console: Console, chosen: Chosen) -> pd.DataFrame:
    """`at`, `until` (UTC), `label`, `tweets`, `score_sum`, `with_score` and `share` of every bin and label."""
    name, step = bin_of(chosen.start, chosen.end)
    sqlite = queries.is_sqlite(console)
    group = "hour" if name == "hour" else f"{DAY[sqlite]} AS day_jst"
    found = console.frame(f"SELECT {group}, label, {SUMS} {_topic(chosen)} GROUP BY 1, 2", _parameters(chosen))
    if name == "hour":
        edges = pd.date_range(chosen.start, chosen.end, freq=step, inclusive="left")
        at = pd.to_datetime(found["hour"], utc=True)
    else:
        first = pd.Timestamp(chosen.start).tz_convert(JAPAN).normalize()
        edges = pd.date_range(first, pd.Timestamp(chosen.end).tz_convert(JAPAN), freq=step, inclusive="left")
        days = pd.to_datetime(found["day_jst"]).dt.tz_localize(JAPAN)
        at = (first + (days - first) // step * step).dt.tz_convert("UTC") if len(days) else days
    labels = shown_labels(chosen, found)
    found = found.assign(at=at, label=found["label"].where(found["label"].isin(labels), OTHER))
    sums = found.groupby(["at", "label"])[["tweets", "score_sum", "with_score"]].sum()
    every = pd.MultiIndex.from_product([edges.tz_convert("UTC"), labels], names=["at", "label"])
    filled = sums.reindex(every, fill_value=0).reset_index()
    return with_shares(filled.assign(until=filled["at"] + step), "at")


def shown_labels(chosen: Chosen, found: pd.DataFrame) -> list[str]:
    """The model's labels, then those that it joined, with the rarest gathered under one name."""
    totals = found.groupby("label")["tweets"].sum().sort_values(ascending=False)
    labels = [*chosen.champion.labels, *(label for label in totals.index if label not in chosen.champion.labels)]
    if len(labels) <= len(PALETTE):
        return labels
    frequent = set(totals.index[: len(PALETTE) - 1])
    return [*(label for label in labels if label in frequent), OTHER]


def topics(console: Console, chosen: Chosen, labels: list[str]) -> pd.DataFrame:
    """`topic`, `label`, `tweets` and `share` of the topics with most tweets in the period, whatever topic is chosen."""
    found = console.frame(TOPICS, {name: value for name, value in _parameters(chosen).items() if name != "topic"})
    found = found.assign(
        topic=[topic or "(without a topic)" for topic in found["topic"]],
        label=found["label"].where(found["label"].isin(labels), OTHER),
    )
    sums = found.groupby(["topic", "label"])["tweets"].sum().reset_index()
    totals = sums.groupby("topic")["tweets"].transform("sum")
    ordered = sums.assign(total=totals).sort_values(["total", "topic"], ascending=[False, True])
    return with_shares(ordered.reset_index(drop=True), "topic")


def with_shares(frame: pd.DataFrame, by: str) -> pd.DataFrame:
    """Add the share of each row's tweets in its group. It is zero where the group has none."""
    totals = frame.groupby(by)["tweets"].transform("sum")
    return frame.assign(share=(frame["tweets"] / totals.where(totals > 0)).fillna(0.0).astype(float))


def mean_score(frame: pd.DataFrame) -> float | None:
    """The mean polarity of a frame of `over_time`, -1 to 1; None when no label has a polarity."""
    counted = frame["with_score"].sum()
    return float(frame["score_sum"].sum() / counted) if counted > 0 else None


def scored_per_minute(console: Console, now: datetime | None = None) -> pd.DataFrame:
    """`at`, `until` and `tweets` of each minute of the last hour, by when a window began."""
    end = (now or datetime.now(UTC)).replace(second=0, microsecond=0) + timedelta(minutes=1)
    start = end - timedelta(minutes=MINUTES)
    minute = MINUTE[queries.is_sqlite(console)]
    found = console.frame(
        f"SELECT {minute} AS minute, {WINDOWS} GROUP BY 1", {"start": stamp(start), "end": stamp(end)}
    )
    edges = pd.date_range(start, end, freq="min", inclusive="left")
    sums = pd.Series(found["tweets"].to_numpy(), index=pd.to_datetime(found["minute"], utc=True), dtype="float64")
    counts = sums.reindex(edges, fill_value=0).astype("int64")
    return pd.DataFrame({"at": edges, "until": edges + timedelta(minutes=1), "tweets": counts.to_numpy()})


def live_quality(console: Console, version_id: int) -> pd.DataFrame:
    """Rows of `v_live_quality` of the champion, the shortest period first."""
    return console.slow_frame(
        "SELECT * FROM v_live_quality WHERE model_version_id = :version ORDER BY days", {"version": version_id}
    )


def _topic(chosen: Chosen) -> str:
    return "" if chosen.topic is None else "AND topic = :topic"


def _parameters(chosen: Chosen) -> dict[str, object]:
    given = {"version": chosen.champion.version_id, "start": stamp(chosen.start), "end": stamp(chosen.end)}
    return given if chosen.topic is None else {**given, "topic": chosen.topic}


def newest(console: Console) -> datetime | None:
    """When the newest tweet was received, UTC."""
    found = console.frame("SELECT max(received_at) AS received_at FROM tweets")["received_at"].iloc[0]
    return None if pd.isna(found) else pd.Timestamp(found).to_pydatetime()
