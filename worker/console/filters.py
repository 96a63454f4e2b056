"""Period and topic, chosen once for Overview and Tweets, and kept in the address so that it can be shared."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import streamlit as st

from worker.console import queries
from worker.console.context import Console

PERIODS = {"24h": "24 hours", "7d": "7 days", "30d": "30 days", "90d": "90 days", "all": "All time"}
LENGTHS = {"24h": timedelta(hours=24), "7d": timedelta(days=7), "30d": timedelta(days=30), "90d": timedelta(days=90)}
ALL_TOPICS, NO_TOPIC = "All topics", "Without a topic"
# What the selector holds: all topics, or this and the topic, since any text may be the name of a topic.
ALL, ONE = "all", "topic:"


@dataclass(frozen=True)
class Chosen:
    """`topic`: None for all topics, empty for tweets without one. Times are UTC, `end` is past the last hour."""

    champion: queries.Champion
    period: str
    topic: str | None
    start: datetime
    end: datetime


def choose(console: Console, champion: queries.Champion) -> Chosen | None:
    """Draw the two selectors. None while the champion has scored nothing."""
    span = queries.span(console, champion.version_id)
    if span is None:
        return None
    _restore(span[1])
    options = [ALL, *(f"{ONE}{topic}" for topic in queries.topics(console, champion.version_id))]
    if st.session_state["topic"] not in options:
        options.append(st.session_state["topic"])  # from a shared address, or beyond the topics that are listed
    left, right, _ = st.columns((1, 1, 2))
    period = left.selectbox("Period", [*PERIODS], format_func=PERIODS.__getitem__, key="period")
    selected = right.selectbox("Topic", options, format_func=_shown, key="topic")
    topic = None if selected == ALL else selected.removeprefix(ONE)
    st.query_params["period"] = period
    if topic is None:
        st.query_params.pop("topic", None)
    else:
        st.query_params["topic"] = topic
    start, end = bounds(period, span, datetime.now(UTC))
    return Chosen(champion, period, topic, start, end)


def bounds(period: str, span: tuple[datetime, datetime], now: datetime) -> tuple[datetime, datetime]:
    """The period's ends at whole hours. All time reaches from the first to the last tweet, which may be long ago."""
    if period == "all":
        return span[0], span[1] + timedelta(hours=1)
    end = now.replace(minute=0, second=0, microsecond=0) + timedelta(hours=1)
    return end - LENGTHS[period], end


def _restore(newest: datetime) -> None:
    """Take the choice from the address, or else from the page before: a widget that is not drawn loses its value."""
    state, asked = st.session_state, st.query_params
    if "period" not in state:
        old = datetime.now(UTC) - newest > LENGTHS["7d"]
        state["period"] = asked.get("period", state.get("kept_period", "all" if old else "7d"))
        if state["period"] not in PERIODS:
            state["period"] = "7d"
    if "topic" not in state:
        state["topic"] = f"{ONE}{asked['topic']}" if "topic" in asked else state.get("kept_topic", ALL)
    state["kept_period"], state["kept_topic"] = state["period"], state["topic"]


def _shown(option: str) -> str:
    return ALL_TOPICS if option == ALL else option.removeprefix(ONE) or NO_TOPIC
