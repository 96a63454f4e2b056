"""`tweetscore plot`: pictures of what the database holds. Knows views and figures, not how they came."""

from collections.abc import Callable, Sequence
from datetime import date, datetime, timedelta
from typing import Any

import matplotlib.dates as mdates
import numpy as np
from matplotlib.figure import Figure
from scipy.special import expit, logit, softmax
from sqlalchemy import select, text

from db import registry
from db.errors import NotFound
from db.models import ModelVersion, ScoringWindow, TestPrediction
from db.session import Database
from training.columns import MULTI_LABEL_SEPARATOR
from training.decide import Floats
from training.plots import LABEL_SHOWN, confusion, drawable, reliability_diagram

FEW_DAYS = 4  # below this hours say more
WINDOWS_SHOWN = 20_000
STAGES = ("read_ms", "tokenise_ms", "forward_ms", "store_ms")


def draw(database: Database, picture: str, model: int | None = None) -> Figure:
    """One of `PICTURES`, of a model version (None: the champion). Raises `NotFound` when there is nothing to draw."""
    return PICTURES[picture](database, model)


def _sentiment(database: Database, model: int | None) -> Figure:
    """Tweets by label over time, and their mean score."""
    if model is not None:
        raise NotFound("sentiment is drawn of the champion; promote the model first")
    with database.read() as session:
        rows = [tuple(row) for row in session.execute(text("SELECT * FROM v_sentiment_daily_jst ORDER BY 1"))]
        unit = "day in Japan"
        if len({row[0] for row in rows}) < FEW_DAYS:
            rows = [tuple(row) for row in session.execute(text("SELECT * FROM v_sentiment_hourly ORDER BY 1"))]
            unit = "hour (UTC)"
    if not rows:
        raise NotFound("the champion has scored nothing yet; push tweets first")
    times = sorted({_when(row[0]) for row in rows})
    figure = Figure(figsize=(9, 5), layout="constrained")
    counts, scores = figure.subplots(2, 1, height_ratios=(2, 1), sharex=True)
    labels = sorted({row[1] for row in rows})
    heights = {label: np.zeros(len(times)) for label in labels}
    sums, weights = np.zeros(len(times)), np.zeros(len(times))
    for when, label, tweets, _, score in rows:
        at = times.index(_when(when))
        heights[label][at] = tweets
        if score is not None:
            sums[at] += tweets * score
            weights[at] += tweets
    width = 0.9 * (timedelta(days=1) if unit.startswith("day") else timedelta(hours=1)) / timedelta(days=1)
    base, places = np.zeros(len(times)), mdates.date2num(times)  # type: ignore[no-untyped-call]
    for label in labels:
        counts.bar(places, heights[label], width, bottom=base, label=drawable(label, LABEL_SHOWN))
        base += heights[label]
    counts.set_ylabel(f"tweets a {unit.split()[0]}")
    counts.legend(loc="upper left")
    known = weights > 0
    scores.plot(places[known], sums[known] / weights[known], "o-", markersize=3)
    scores.axhline(0, color="gray", linewidth=0.8)
    scores.set_ylim(-1.05, 1.05)
    scores.set_ylabel("mean score")
    scores.set_xlabel(unit)
    _time_axis(scores)
    return figure


def _throughput(database: Database, model: int | None) -> Figure:
    """Tweets a second of the newest windows by minute, and where a window's time went."""
    columns = (ScoringWindow.started_at, ScoringWindow.tweets, *(getattr(ScoringWindow, stage) for stage in STAGES))
    query = select(*columns).order_by(ScoringWindow.started_at.desc()).limit(WINDOWS_SHOWN)
    if model is not None:
        query = query.where(ScoringWindow.model_version_id == model)
    with database.read() as session:
        rows = [tuple(row) for row in session.execute(query)]
    if not rows:
        raise NotFound("nothing was scored from the stream yet; push tweets first")
    minutes: dict[datetime, np.ndarray[Any, Any]] = {}
    for started, *values in rows:
        minute = started.replace(second=0, microsecond=0)
        minutes[minute] = minutes.get(minute, np.zeros(len(values))) + np.array(values, float)
    times = sorted(minutes)
    table = np.array([minutes[time] for time in times])  # (M, 1 + stages)
    places = mdates.date2num(times)  # type: ignore[no-untyped-call]
    figure = Figure(figsize=(9, 5), layout="constrained")
    rate, stages = figure.subplots(2, 1, sharex=True)
    rate.plot(places, table[:, 0] / 60, "o-", markersize=3)
    rate.set_ylim(bottom=0)
    rate.set_ylabel("tweets a second\n(mean of a minute)")
    base = np.zeros(len(times))
    for number, stage in enumerate(STAGES, start=1):
        each = table[:, number] / np.maximum(table[:, 0], 1)
        stages.bar(places, each, 0.9 / (24 * 60), bottom=base, label=stage.removesuffix("_ms"))
        base += each
    stages.set_ylabel("ms a tweet")
    stages.set_xlabel("minute (UTC)")
    stages.legend(loc="upper left", ncols=len(STAGES))
    _time_axis(stages)
    return figure


def _confusion(database: Database, model: int | None) -> Figure:
    version, task, targets, probabilities = _test_rows(database, model)
    return confusion(targets, probabilities, version.labels, task)


def _calibration(database: Database, model: int | None) -> Figure:
    version, task, targets, probabilities = _test_rows(database, model)
    # What is stored is after scaling. Its logarithms are the logits divided by the temperature, up to a constant.
    safe = np.clip(probabilities, 1e-7, 1 - 1e-7)
    multi = task == "multi_label"
    raw = expit(logit(safe) * version.temperature) if multi else softmax(np.log(safe) * version.temperature, axis=1)
    return reliability_diagram(targets, raw.astype(np.float32), probabilities, task)


PICTURES: dict[str, Callable[[Database, int | None], Figure]] = {
    "sentiment": _sentiment, "confusion": _confusion, "calibration": _calibration, "throughput": _throughput,
}  # fmt: skip


def _test_rows(database: Database, model: int | None) -> tuple[ModelVersion, str, Floats, Floats]:
    """A version, its task, and its test rows' `targets` and calibrated `probabilities` (N, K)."""
    with database.read() as session:
        wanted = model if model is not None else registry.assigned(session, registry.CHAMPION)
        if wanted is None:
            raise NotFound("there is no champion yet; name a model with --model")
        version = registry.get(session, wanted)
        query = select(TestPrediction.actual, TestPrediction.probabilities)
        rows = session.execute(query.where(TestPrediction.model_version_id == wanted)).all()
    if not rows:
        raise NotFound(f"model {wanted} has no test rows")
    sums = [sum(said.values()) for _, said in rows]
    task = "single_label" if max(abs(total - 1) for total in sums) < 1e-3 else "multi_label"
    targets = np.zeros((len(rows), len(version.labels)), np.float32)
    for row, (actual, _) in enumerate(rows):
        for name in _names(actual, version.labels, task):
            targets[row, version.labels.index(name)] = 1
    probabilities = np.array([[said[label] for label in version.labels] for _, said in rows], np.float32)
    return version, task, targets, probabilities


def _names(actual: str, labels: Sequence[str], task: str) -> list[str]:
    if task == "single_label":
        return [actual]
    return [name for name in actual.split(MULTI_LABEL_SEPARATOR) if name in labels]


def _when(value: Any) -> datetime:
    """A day or an hour of a view, as either database gives it."""
    if isinstance(value, datetime):
        return value
    if isinstance(value, date):
        return datetime(value.year, value.month, value.day)  # noqa: DTZ001 - a day has no zone
    return datetime.fromisoformat(value)


def _time_axis(axes: Any) -> None:
    locator = mdates.AutoDateLocator()  # type: ignore[no-untyped-call]
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(mdates.ConciseDateFormatter(locator))  # type: ignore[no-untyped-call]
