"""Charts of the page Models: confusion matrix and reliability diagram."""

from typing import Any

import altair as alt
import pandas as pd

from worker.console.charts import NEUTRAL, PALETTE

# Height of a row of the confusion matrix in pixels.
ROW_PX = 54
# Height of the axis above the matrix and the legend below it in pixels.
AROUND_PX = 190
DARK_SHARE = 0.55


def confusion(cells: pd.DataFrame, labels: tuple[str, ...]) -> alt.LayerChart:
    """Counts in the cells, and shares of each row as colours. `cells` as `model_queries.confusion` returns them."""
    shown = cells.assign(said=[f"{row.rows:,} ({row.share:.0%})" for row in cells.itertuples()])
    base = alt.Chart(shown, height=ROW_PX * len(labels) + AROUND_PX).encode(
        x=alt.X("predicted:N", title="predicted label", sort=[*labels],
                axis=alt.Axis(labelAngle=0, labelLimit=110, orient="top")),
        y=alt.Y("actual:N", title="label in the dataset", sort=[*labels], axis=alt.Axis(labelLimit=110)),
        tooltip=[
            alt.Tooltip("actual:N", title="label in the dataset"), alt.Tooltip("predicted:N", title="predicted"),
            alt.Tooltip("rows:Q", title="test rows", format=","),
            alt.Tooltip("share:Q", title="share of rows with this label", format=".1%"),
        ],
    )  # fmt: skip
    colour = alt.Color(
        "share:Q", title="share of the row", scale=alt.Scale(domain=[0, 1], scheme="blues"),
        legend=alt.Legend(format="%", orient="bottom", gradientLength=160),
    )  # fmt: skip
    text_colour = alt.condition(f"datum.share > {DARK_SHARE}", alt.value("white"), alt.value("#222"))
    chart: alt.LayerChart = base.mark_rect().encode(color=colour) + base.mark_text(fontSize=14).encode(
        text="said:N", color=text_colour
    )
    return chart


def reliability(bins: pd.DataFrame, right: str) -> alt.LayerChart:
    """The share that is right in each bin, with its 95 % interval, beside the diagonal of a calibrated model.

    `bins` as `model_queries.reliability` returns them. A bin without rows is marked with a dash.
    """
    filled, empty = bins[bins["rows"] > 0], bins[bins["rows"] == 0].assign(middle=lambda f: (f["low"] + f["high"]) / 2)
    tooltip = [
        alt.Tooltip("low:Q", title="probability from", format=".1f"), alt.Tooltip("high:Q", title="to", format=".1f"),
        alt.Tooltip("probability:Q", title="mean probability", format=".3f"),
        alt.Tooltip("right:Q", title=right, format=".3f"), alt.Tooltip("rows:Q", title="count", format=","),
    ]  # fmt: skip
    y = alt.Y("right:Q", title=right, scale=alt.Scale(domain=[0, 1]), axis=alt.Axis(tickCount=6))
    bars = alt.Chart(filled).mark_bar(color=PALETTE[0], opacity=0.45, binSpacing=2).encode(
        x=_probability("low"), x2="high:Q", y=y, y2=alt.datum(0), tooltip=tooltip
    )  # fmt: skip
    intervals = alt.Chart(filled).mark_rule(color=PALETTE[0], strokeWidth=3).encode(
        x=_probability("probability"), y="right_low:Q", y2="right_high:Q", tooltip=tooltip
    )  # fmt: skip
    ends = pd.DataFrame({"low": [0.0, 1.0], "right": [0.0, 1.0]})
    diagonal = (
        alt.Chart(ends).mark_line(strokeDash=[6, 4], strokeWidth=2, color=PALETTE[1]).encode(x=_probability("low"), y=y)
    )
    dashes = alt.Chart(empty).mark_text(text="–", color=NEUTRAL, fontSize=16, baseline="bottom").encode(
        x=_probability("middle"), y=alt.datum(0), tooltip=[alt.Tooltip("rows:Q", title="count")]
    )  # fmt: skip
    layered: Any = alt.layer(bars, intervals, diagonal, dashes, height=340)
    layers: alt.LayerChart = layered
    return layers


def reliability_counts(bins: pd.DataFrame, counted: str) -> alt.LayerChart:
    """How many rows each bin of the reliability diagram has, those without any too."""
    shown = bins.assign(middle=(bins["low"] + bins["high"]) / 2)
    y = alt.Y("rows:Q", title=counted, scale=alt.Scale(zero=True), axis=alt.Axis(tickMinStep=1, tickCount=3))
    bars = alt.Chart(shown).mark_bar(color=NEUTRAL, binSpacing=2).encode(
        x=_probability("low"), x2="high:Q", y=y, y2=alt.datum(0),
        tooltip=[alt.Tooltip("low:Q", title="probability from", format=".1f"),
                 alt.Tooltip("high:Q", title="to", format=".1f"), alt.Tooltip("rows:Q", title=counted, format=",")],
    )  # fmt: skip
    numbers = alt.Chart(shown).mark_text(dy=-7, color=NEUTRAL).encode(
        x=_probability("middle"), y="rows:Q", text=alt.Text("rows:Q", format=",")
    )  # fmt: skip
    layered: Any = alt.layer(bars, numbers, height=190)
    layers: alt.LayerChart = layered
    return layers


def _probability(column: str) -> alt.X:
    return alt.X(
        f"{column}:Q", title="calibrated probability of the predicted label", scale=alt.Scale(domain=[0, 1]),
        axis=alt.Axis(tickCount=10, format=".1f"),
    )  # fmt: skip
