"""Speeds measured in turns, and what is said of them: ratios within a round, so that a noisy machine hits both sides.

Knows nothing of what is measured.
"""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Speed = Callable[[], float]  # does one round and returns its speed
Pair = tuple[str, str]  # ours, theirs
Round = dict[str, float]

LEAST_ROUNDS = 3
# A ratio is settled when the middle half of its rounds lies within this share of the median.
SETTLED_SPREAD = 0.03


@dataclass(frozen=True)
class Figure:
    """A median with its least and greatest value, and the values behind it."""

    value: float
    least: float
    greatest: float
    rounds: int = 1
    details: dict[str, Any] = field(default_factory=dict)


def race(speeds: Mapping[str, Speed], ratios: Iterable[Pair], most_rounds: int) -> list[Round]:
    """Let the contestants of the ratios take turns until every ratio is settled, at least 3 rounds, at most so many.

    Who is in no ratio that is still open does not run again. The order turns with every round.
    """
    rounds: list[Round] = []
    pairs = list(ratios)
    for number in range(most_rounds):
        running = {name for pair in pairs if not settled(values(rounds, pair)) for name in pair}
        order = [name for name in speeds if name in running]
        if not order:
            break
        first = number % len(order)
        rounds.append({name: speeds[name]() for name in order[first:] + order[:first]})
    return rounds


def values(rounds: Sequence[Round], pair: Pair) -> list[float]:
    """Ours over theirs, of the rounds in which both ran."""
    ours, theirs = pair
    return [found[ours] / found[theirs] for found in rounds if ours in found and theirs in found]


def settled(found: Sequence[float]) -> bool:
    if len(found) < LEAST_ROUNDS:
        return False
    low, middle, high = statistics.quantiles(found, n=4, method="inclusive")
    return high - low <= SETTLED_SPREAD * middle


def speed_of(rounds: Sequence[Round], name: str) -> float:
    """The median speed of a contestant."""
    return statistics.median(found[name] for found in rounds if name in found)


def ratio(rounds: Sequence[Round], pair: Pair) -> Figure:
    ours, theirs = pair
    details = {"ours": speed_of(rounds, ours), "theirs": speed_of(rounds, theirs)}
    return figure(values(rounds, pair), details)


def figure(found: Sequence[float], details: dict[str, Any] | None = None) -> Figure:
    return Figure(statistics.median(found), min(found), max(found), len(found), details or {})
