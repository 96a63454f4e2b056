"""The page Overview: sentiment over time, topics, volume, the stream's lag and the champion's live quality."""

from datetime import UTC, datetime

import pandas as pd
import streamlit as st

from worker.console import charts, filters, queries, sentiment, stream_state, text
from worker.console.context import Console
from worker.console.filters import Chosen

REDRAW_SECONDS = 5
NUMBER, SHARE = "Number", "Share"


def render(console: Console) -> None:
    st.title("Overview")
    champion = queries.champion(console)
    if champion is None:
        text.hint(
            "No model is the champion yet, so nothing is scored. Train a model (page Jobs, or `tweetscore train`), "
            "then promote it (page Models, or `tweetscore models promote 1`). `tweetscore demo` does all of it."
        )
        return
    chosen = filters.choose(console, champion)
    if chosen is None:
        _stream(console)
        text.hint(
            f"Model {champion.version_id} has scored no tweets yet. Run `tweetscore up`, and publish tweets, such as "
            "with `tweetscore push tweets.jsonl`."
        )
        return
    _moving(console, chosen)


@st.fragment(run_every=REDRAW_SECONDS)
def _moving(console: Console, chosen: Chosen) -> None:
    """What changes while tweets come in. A relative period moves on with the clock."""
    if chosen.period != "all":
        start, end = filters.bounds(chosen.period, (chosen.start, chosen.end), datetime.now(UTC))
        chosen = Chosen(chosen.champion, chosen.period, chosen.topic, start, end)
    frame = sentiment.over_time(console, chosen)
    _figures(console, frame)
    _over_time(frame, chosen)
    left, right = st.columns((3, 2), gap="large")
    with left:
        _topics(console, chosen, list(dict.fromkeys(frame["label"])))
    with right:
        _quality(console, chosen)
        _volume(console)


def _stream(console: Console) -> None:
    state = stream_state.read(console.settings)
    if state.problem:
        text.warning(f"Stream: {state.problem}")
    elif state.depth is not None:
        text.facts([("Waiting in the stream", f"{state.depth.length:,}")])


def _figures(console: Console, frame: pd.DataFrame) -> None:
    state = stream_state.read(console.settings)
    score, received = sentiment.mean_score(frame), sentiment.newest(console)
    depth = state.depth
    text.facts(
        [
            ("Tweets in the period", f"{int(frame['tweets'].sum()):,}"),
            ("Mean score, -1 to 1", None if score is None else f"{score:+.2f}"),
            ("Newest tweet received", None if received is None else f"{stream_state.ago(received)} ago"),
            ("Not scored yet", None if depth is None or depth.lag is None else f"{depth.lag + depth.pending:,}"),
            ("Lag of the stream", stream_state.duration(state.lag_seconds)),
        ]
    )
    if state.problem:
        text.warning(f"Stream: {state.problem}")


def _over_time(frame: pd.DataFrame, chosen: Chosen) -> None:
    name, _ = sentiment.bin_of(chosen.start, chosen.end)
    title, choice = st.columns((3, 1), vertical_alignment="bottom")
    title.subheader(f"Tweets by label and {name}")
    unit = choice.segmented_control("Unit", [NUMBER, SHARE], default=NUMBER, key="unit", label_visibility="collapsed")
    if not frame["tweets"].any():
        text.hint("No tweet of this topic was written in this period. Choose a longer period or another topic.")
        return
    chart = charts.by_label(frame, list(dict.fromkeys(frame["label"])), name, unit == SHARE)
    st.altair_chart(chart, width="stretch")


def _topics(console: Console, chosen: Chosen, labels: list[str]) -> None:
    st.subheader("Topics")
    frame = sentiment.topics(console, chosen, labels)
    if frame.empty:
        text.note("No tweets in this period.")
        return
    st.altair_chart(charts.by_topic(frame, labels), width="stretch")
    counts = frame.groupby("topic", sort=False)["tweets"].sum().reset_index()
    st.dataframe(
        counts, hide_index=True, height=min(38 + 35 * len(counts), 260),
        column_config={"topic": "topic", "tweets": st.column_config.NumberColumn("tweets", format="localized")},
    )  # fmt: skip


def _quality(console: Console, chosen: Chosen) -> None:
    st.subheader("The champion's live quality")
    frame = sentiment.live_quality(console, chosen.champion.version_id)
    if frame.empty:
        text.note("Not measured yet: label tweets on the page Review.")
        return
    for row in frame.to_dict("records"):
        text.note(f"Last {row['days']} days, from {_count(row['labels'])} labels")
        text.facts(
            [
                ("Accuracy", _interval(row["accuracy"], row["accuracy_low"], row["accuracy_high"])),
                ("Macro-F1", _percent(row["f1_macro"])),
                ("Expected without labels", _percent(row["expected_accuracy"])),
                ("On the test rows", _percent(row["test_accuracy"])),
                ("More labels for ±3 points", _count(row["labels_needed"])),
            ]
        )


def _volume(console: Console) -> None:
    st.subheader("Scored in the last hour")
    st.altair_chart(charts.per_minute(sentiment.scored_per_minute(console)), width="stretch")


def _percent(value: float | None) -> str | None:
    return None if value is None or pd.isna(value) else f"{value:.1%}"


def _count(value: float | None) -> str | None:
    return None if value is None or pd.isna(value) else f"{int(value):,}"


def _interval(value: float | None, low: float | None, high: float | None) -> str | None:
    shown = _percent(value)
    if shown is None or low is None or high is None or pd.isna(low) or pd.isna(high):
        return shown
    return f"{shown} ({100 * low:.0f} to {100 * high:.0f})"
