"""What the pages ask of the sums by hour, topic and label, and of the champion. No query reads all predictions."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

import pandas as pd

from worker.console.context import Console

Render = Callable[[Console], None]
Script = Callable[[], None]
JAPAN = "Asia/Tokyo"


@dataclass(frozen=True)
class Champion:
    """`since` is in Japan time."""

    version_id: int
    base_model: str
    labels: tuple[str, ...]
    since: pd.Timestamp


def champion(console: Console) -> Champion | None:
    found = console.frame(
        """SELECT m.id AS model_version_id, m.base_model, m.labels, a.assigned_at
           FROM model_aliases AS a JOIN model_versions AS m ON m.id = a.model_version_id
           WHERE a.alias = 'champion' ORDER BY a.id DESC LIMIT 1"""
    )
    if found.empty:
        return None
    row = found.iloc[0]
    return Champion(
        int(row["model_version_id"]), str(row["base_model"]), tuple(map(str, row["labels"])),
        row["assigned_at"].tz_convert(JAPAN),
    )  # fmt: skip


def topics(console: Console, version_id: int, limit: int = 300) -> list[str]:
    """Topics of the champion's tweets, those with most tweets first. The empty one are tweets without a topic."""
    found = console.frame(
        """SELECT topic, sum(tweets) AS n FROM sentiment_rollup WHERE model_version_id = :version
           GROUP BY topic HAVING sum(tweets) > 0 ORDER BY sum(tweets) DESC, topic LIMIT :top""",
        {"version": version_id, "top": limit},
    )
    return ["" if topic is None else str(topic) for topic in found["topic"]]


def span(console: Console, version_id: int) -> tuple[datetime, datetime] | None:
    """The first and the last hour, UTC, in which tweets of the model were written; None when it scored none."""
    found = console.frame(
        "SELECT min(hour) AS hour, max(hour) AS last_hour FROM sentiment_rollup WHERE model_version_id = :version",
        {"version": version_id},
    )
    first, last = found.iloc[0]
    if first is None or first is pd.NaT:
        return None
    return pd.Timestamp(first).to_pydatetime(), pd.Timestamp(last).to_pydatetime()


def stamp(at: datetime) -> str:
    """A time as a parameter of `Console.frame`: the text that SQLite stores, which PostgreSQL reads as a time."""
    return f"{at.astimezone(UTC):%Y-%m-%dT%H:%M:%S.%fZ}"


def is_sqlite(console: Console) -> bool:
    return console.settings.query_url.startswith("sqlite")
