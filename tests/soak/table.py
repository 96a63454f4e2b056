"""The outcome of a soak as Markdown."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from tests.soak.memory import Trend


@dataclass
class Minute:
    """What was seen in one minute. Times in milliseconds, memory in MiB by process; `stored` are tweets in SQL."""

    number: int
    events: list[str] = field(default_factory=list)
    pushed: int = 0
    repeats: int = 0
    rows: int = 0
    latency_ms: Sequence[float] = ()
    visible_ms: Sequence[float] = ()
    depth: int = 0
    stored: int = 0
    memory: dict[str, float] = field(default_factory=dict)


def minutes_table(minutes: Sequence[Minute]) -> str:
    head = ["minute", "pushed", "again", "rows", "p50 ms", "p99 ms", "max ms", "visible p50", "visible p99", "deepest",
            "stored", "events"]  # fmt: skip
    rows = [
        [
            str(minute.number), f"{minute.pushed:,}", f"{minute.repeats:,}", f"{minute.rows:,}",
            *_quantiles(minute.latency_ms, (50, 99, 100)), *_quantiles(minute.visible_ms, (50, 99)),
            f"{minute.depth:,}", f"{minute.stored:,}",
            ", ".join(minute.events),
        ]
        for minute in minutes
    ]  # fmt: skip
    return _markdown(head, rows)


def memory_by_minute(minutes: Sequence[Minute]) -> str:
    """MiB of each process at the end of each minute."""
    names = sorted({name for minute in minutes for name in minute.memory})
    rows = [
        [str(minute.number), *(f"{minute.memory[name]:.0f}" if name in minute.memory else "" for name in names)]
        for minute in minutes
    ]
    return _markdown(["minute", *names], rows)


def memory_table(trends: Sequence[Trend]) -> str:
    head = ["process", "minutes", "mean MiB", "MiB an hour", "growth MiB", "noise MiB", ""]
    return _markdown(
        head,
        [
            [trend.name, f"{trend.minutes:.0f}", f"{trend.mean:.1f}", f"{trend.slope:+.1f} ± {trend.error:.1f}",
             f"{trend.growth:+.1f}", f"{trend.noise:.1f}", "flat" if trend.flat else "grows"]
            for trend in trends
        ],
    )  # fmt: skip


def _quantiles(values: Sequence[float], percents: Sequence[float]) -> list[str]:
    return [f"{value:,.0f}" for value in np.percentile(values, percents)] if len(values) else [""] * len(percents)


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
