"""Charts of the console's pages. Frames go in with real times, and axes show Japan time.

A chart's columns have fixed names: a label or a topic is a value and never the name of a field, which Vega would parse.
"""

from collections.abc import Sequence
from typing import Any

import altair as alt
import pandas as pd

JAPAN = "Asia/Tokyo"
# Told apart by colour-blind people, and 3:1 against the light and the dark background.
NEGATIVE, NEUTRAL, POSITIVE = "#d55e00", "#8c8c8c", "#2a8fd0"
PALETTE = ("#2a8fd0", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#8c8c8c", "#7a6ff0", "#56b4e9")
KNOWN = {
    **dict.fromkeys(("negative", "neg", "ネガティブ", "否定", "悲しい", "bad"), NEGATIVE),
    **dict.fromkeys(("neutral", "neu", "ニュートラル", "中立"), NEUTRAL),
    **dict.fromkeys(("positive", "pos", "ポジティブ", "肯定", "嬉しい", "good"), POSITIVE),
}
OTHER = "other labels"
# With legend and axes.
HEIGHT = 360


def colours(labels: Sequence[str]) -> dict[str, str]:
    """A colour for each label, the same on every page: labels come in the order of the model."""
    free = [colour for colour in PALETTE if colour not in {KNOWN.get(label.lower()) for label in labels}] or [*PALETTE]
    given, used = {}, 0
    for label in labels:
        known = KNOWN.get(label.lower())
        given[label] = known or free[used % len(free)]
        used += known is None
    return given


def label_color(labels: Sequence[str], column: str = "label") -> alt.Color:
    given = colours(labels)
    return alt.Color(
        f"{column}:N", title=None, sort=[*labels],
        scale=alt.Scale(domain=[*given], range=[*given.values()]), legend=alt.Legend(orient="top", columns=4),
    )  # fmt: skip


def wall_clock(times: "pd.Series[Any]") -> "pd.Series[Any]":
    """Times as Japan's clocks show them, marked as UTC, so that `time_axis` does not depend on the browser's zone."""
    shown: pd.Series[Any] = times.dt.tz_convert(JAPAN).dt.tz_localize(None).dt.tz_localize("UTC")
    return shown


def time_axis(column: str, title: str = "Japan time") -> alt.X:
    """The axis of a column of `wall_clock`. It reaches over all rows, so bins without tweets need rows too."""
    return alt.X(
        f"{column}:T", title=title, scale=alt.Scale(type="utc", nice=False),
        axis=alt.Axis(labelOverlap=True, grid=False, tickCount=8),
    )  # fmt: skip


def count_axis(column: str, title: str) -> alt.Y:
    """An axis of whole numbers from zero."""
    return alt.Y(f"{column}:Q", title=title, scale=alt.Scale(zero=True), axis=alt.Axis(tickMinStep=1, format="~s"))


def share_axis(column: str, title: str) -> alt.Y:
    return alt.Y(
        f"{column}:Q", title=title, scale=alt.Scale(domain=[0, 1], zero=True), axis=alt.Axis(format="%", tickCount=5)
    )


def by_label(frame: pd.DataFrame, labels: Sequence[str], bin_name: str, shares: bool) -> alt.Chart:
    """Stacked bars over time. `frame` has `at` and `until` (the bin's ends), `label`, `tweets` and `share`.

    The bars are stacked here: Vega stacks no bars that have both ends of their bin.
    """
    shown = frame.assign(at=wall_clock(frame["at"]), until=wall_clock(frame["until"]), rank=_ranks(frame, labels))
    shown = shown.sort_values(["at", "rank"], ignore_index=True)
    value = "share" if shares else "tweets"
    shown["high"] = shown.groupby("at")[value].cumsum()
    shown["low"] = shown["high"] - shown[value]
    y = share_axis("low", "share of tweets") if shares else count_axis("low", f"tweets per {bin_name}")
    chart: alt.Chart = (
        alt.Chart(shown, height=HEIGHT)
        .mark_rect()
        .encode(
            x=time_axis("at"), x2="until:T", y=y, y2="high:Q", color=label_color(labels),
            tooltip=[
                alt.Tooltip("at:T", title=f"{bin_name} from (Japan time)", format="%Y-%m-%d %H:%M", formatType="utc"),
                alt.Tooltip("label:N", title="label"), alt.Tooltip("tweets:Q", title="tweets", format=","),
                alt.Tooltip("share:Q", title="share", format=".1%"),
            ],
        )
    )  # fmt: skip
    return chart


def _ranks(frame: pd.DataFrame, labels: Sequence[str]) -> "pd.Series[Any]":
    place = {label: number for number, label in enumerate(labels)}
    return frame["label"].map(lambda label: place.get(label, len(place)))


def by_topic(frame: pd.DataFrame, labels: Sequence[str]) -> alt.Chart:
    """Label shares of each topic. `frame` has `topic`, `label`, `tweets`, `share`, in the order to show."""
    shown = frame.assign(rank=_ranks(frame, labels))
    topics = list(dict.fromkeys(shown["topic"]))
    chart: alt.Chart = (
        alt.Chart(shown, height=28 * len(topics) + 130)
        .mark_bar()
        .encode(
            y=alt.Y("topic:N", title=None, sort=topics, axis=alt.Axis(labelLimit=140)),
            x=alt.X("share:Q", title="share of the topic's tweets", axis=alt.Axis(format="%", tickCount=5),
                    scale=alt.Scale(domain=[0, 1])).stack("zero"),
            color=label_color(labels), order="rank:O",
            tooltip=["topic:N", "label:N", alt.Tooltip("tweets:Q", format=","), alt.Tooltip("share:Q", format=".1%")],
        )
    )  # fmt: skip
    return chart


def per_minute(frame: pd.DataFrame) -> alt.Chart:
    """Tweets scored in each minute. `frame` has `at`, `until` and `tweets`, with a row for minutes without any."""
    shown = frame.assign(at=wall_clock(frame["at"]), until=wall_clock(frame["until"]), zero=0)
    chart: alt.Chart = (
        alt.Chart(shown, height=220)
        .mark_rect(color=PALETTE[0])
        .encode(
            x=time_axis("at"), x2="until:T", y=count_axis("zero", "tweets per minute"), y2="tweets:Q",
            tooltip=[
                alt.Tooltip("at:T", title="minute (Japan time)", format="%H:%M", formatType="utc"),
                alt.Tooltip("tweets:Q", format=","),
            ],
        )
    )  # fmt: skip
    return chart


def probabilities(frame: pd.DataFrame, labels: Sequence[str]) -> alt.Chart:
    """Each model's probabilities of one tweet. `frame` has `model`, `label` and `probability`."""
    models = list(dict.fromkeys(frame["model"]))
    chart: alt.Chart = (
        alt.Chart(frame, height=max(150, 15 * len(models) * len(labels) + 110))
        .mark_bar()
        .encode(
            y=alt.Y("model:N", title=None, sort=models, axis=alt.Axis(labelLimit=120)),
            yOffset=alt.YOffset("label:N", sort=[*labels]),
            x=alt.X("probability:Q", title="probability", scale=alt.Scale(domain=[0, 1]), axis=alt.Axis(tickCount=5)),
            color=label_color(labels),
            tooltip=["model:N", "label:N", alt.Tooltip("probability:Q", format=".3f")],
        )
    )  # fmt: skip
    return chart


def of_answer(frame: pd.DataFrame, x: str, y: str, colour: str | None, kind: str) -> alt.Chart:
    """A chart of any frame. Its columns get plain names first: Vega would parse dots and brackets in them."""
    taken = {"x": frame[x], "y": frame[y], **({"c": list(map(str, frame[colour]))} if colour else {})}
    shown = pd.DataFrame(taken)
    for name in ("x", "y"):
        if isinstance(shown[name].dtype, pd.DatetimeTZDtype):
            shown[name] = wall_clock(shown[name])
        elif pd.api.types.is_datetime64_any_dtype(shown[name]):  # days
            shown[name] = shown[name].dt.tz_localize("UTC")
    timed = pd.api.types.is_datetime64_any_dtype(shown["x"])
    counted = pd.api.types.is_numeric_dtype(shown["x"])
    if timed:
        zoned = isinstance(frame[x].dtype, pd.DatetimeTZDtype)
        across = time_axis("x", f"{x} (Japan time)" if zoned else x)
    elif counted and kind != "Bars":
        across = alt.X("x:Q", title=x)
    else:
        shown["x"] = list(map(str, shown["x"]))
        across = alt.X("x:N", title=x, sort=None, axis=alt.Axis(labelLimit=140, labelOverlap=True))
    vertical = alt.Y("y:Q", title=y, scale=alt.Scale(zero=kind != "Points"))
    base = alt.Chart(shown, height=HEIGHT)
    marked = {
        "Bars": base.mark_bar, "Line": lambda: base.mark_line(point=True), "Points": base.mark_circle,
    }[kind]()  # fmt: skip
    beside = [alt.Tooltip("x", title=x), alt.Tooltip("y", title=y)]
    encoded: dict[str, Any] = {"x": across, "y": vertical, "tooltip": beside}
    if colour:
        order = list(dict.fromkeys(shown["c"]))
        encoded["color"] = label_color(order, "c")
        encoded["tooltip"].append(alt.Tooltip("c:N", title=colour))
    chart: alt.Chart = marked.encode(**encoded)
    return chart
