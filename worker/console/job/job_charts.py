"""Charts of the page Jobs: losses and validation figures of a run."""

import altair as alt
import pandas as pd

from worker.console.charts import PALETTE

POINTS_BELOW = 60  # rows up to which every point is marked: a single epoch is no line


def losses(frame: pd.DataFrame, counted: str) -> alt.Chart:
    """`frame` as `job_queries.losses` returns it; `counted` is what its x counts."""
    return _lines(frame, "loss", counted, "loss", alt.Scale(zero=True), ".4f")


def qualities(frame: pd.DataFrame) -> alt.Chart:
    return _lines(frame, "value", "epoch", "on the validation rows", alt.Scale(domain=[0, 1]), ".3f")


def _lines(frame: pd.DataFrame, column: str, counted: str, title: str, scale: alt.Scale, form: str) -> alt.Chart:
    lines = list(dict.fromkeys(frame["line"]))
    chart: alt.Chart = (
        alt.Chart(frame, height=320)
        .mark_line(point=len(frame) <= POINTS_BELOW or {"size": 12})
        .encode(
            x=alt.X("x:Q", title=counted, scale=alt.Scale(nice=False, zero=False),
                    axis=alt.Axis(tickMinStep=1, format="d", grid=False)),
            y=alt.Y(f"{column}:Q", title=title, scale=scale),
            color=alt.Color("line:N", title=None, sort=lines,
                            legend=alt.Legend(orient="top", columns=2, labelLimit=220),
                            scale=alt.Scale(domain=lines, range=list(PALETTE[: len(lines)]))),
            tooltip=[alt.Tooltip("line:N", title="figure"), alt.Tooltip("x:Q", title=counted, format="d"),
                     alt.Tooltip(f"{column}:Q", title=title, format=form)],
        )
    )  # fmt: skip
    return chart
