"""What tweets wait at peaks: in each hour of a day, and after a burst.

Scorers of a group share a stream evenly, so one of them is simulated with its share of the tweets.
"""

from dataclasses import dataclass
from math import ceil

import numpy as np

from worker.plan.arrivals import DAY_SECONDS, Floats, burst, steady
from worker.plan.capacity import Fleet
from worker.plan.windows import simulate

SEED = 1
# A part of the day is simulated for so long, and with so many tweets at most; its first fifth warms up.
SAMPLE_SECONDS, SAMPLE_TWEETS, WARM_UP = 60.0, 100_000, 0.2
# A burst hits a stream that has flowed for so long; what has not drained after the last is said to last longer.
BEFORE_BURST_SECONDS, AFTER_DRAIN_SECONDS, LONGEST_DRAIN_SECONDS = 10.0, 10.0, 3600.0
MINUTE = 60.0


@dataclass(frozen=True)
class Hour:
    """A part of the day: its beginning in hours, tweets a second, what waits at its end, and latencies in seconds.

    `utilisation` is the share of the scorers' speed that the rate takes; windows and cores are those of all scorers.
    """

    hour: float
    tweets_per_second: float
    utilisation: float
    windows_per_second: float
    busy_cores: float
    backlog: float
    p50_seconds: float
    p99_seconds: float


@dataclass(frozen=True)
class Minute:
    minute: int
    p50_seconds: float
    p99_seconds: float


@dataclass(frozen=True)
class Burst:
    """After a burst: the most tweets that waited, the seconds until none of them did (None: it never ends, or takes
    longer than an hour), and the latencies of the tweets that arrived in each minute from the burst on."""

    tweets: int
    backlog_peak: int
    drain_seconds: float | None
    minutes: list[Minute]


def day(fleet: Fleet, curve: Floats, rate: float) -> list[Hour]:
    """The second of two equal days. Where tweets are left over, they delay those of the next part."""
    part_seconds = DAY_SECONDS / len(curve)
    random, waiting = np.random.default_rng(SEED), 0.0
    speed = fleet.tweets_per_second
    samples = {share: _sample(random, fleet, rate * share) for share in np.unique(curve)}
    found: list[Hour] = []
    for index, share in enumerate([*curve, *curve]):
        arriving = rate * float(share)
        # The backlog changes in a straight line; while there is one, a tweet waits for all before it.
        line = np.maximum(0.0, waiting + (arriving - speed) * np.linspace(0.0, part_seconds, 1 + int(part_seconds)))
        latency, windows, cores = samples[share]
        queued = np.sort(np.random.default_rng(SEED).choice(line, len(latency)) / speed)
        latency = latency if not line.any() else np.maximum(latency, 0) + queued
        waiting = float(line[-1])
        if index >= len(curve):
            p50, p99 = (float(np.percentile(latency, percent)) for percent in (50, 99))
            hour = (index - len(curve)) * part_seconds / 3600
            found.append(Hour(hour, arriving, arriving / speed, windows, cores, waiting, p50, p99))
    return found


def _sample(random: np.random.Generator, fleet: Fleet, rate: float) -> tuple[Floats, float, float]:
    """Latencies of tweets that arrive at this rate, without a backlog from before; windows per second and busy cores
    of all scorers."""
    # More than the scorers can do leaves a backlog, which is not a matter of windows.
    share = min(rate, 0.98 * fleet.tweets_per_second) / fleet.scorers
    if share == 0:
        return np.zeros(1), 0.0, 0.0
    seconds = min(SAMPLE_SECONDS, SAMPLE_TWEETS / share)
    arrivals = steady(random, share, seconds)
    if not len(arrivals):
        return np.zeros(1), 0.0, 0.0
    outcome = simulate(arrivals, fleet.scorer)
    kept = outcome.latency[int(WARM_UP * len(arrivals)) :]
    times = fleet.scorers / max(seconds, float(outcome.ends[-1]))
    return kept, times * len(outcome.window_sizes), times * outcome.core_seconds


def after_burst(fleet: Fleet, rate: float, tweets: int) -> Burst:
    """A burst of so many tweets within a second, on top of a steady rate."""
    random, begin = np.random.default_rng(SEED), BEFORE_BURST_SECONDS
    share, more = rate / fleet.scorers, tweets / fleet.scorers
    spare = fleet.tweets_per_second / fleet.scorers - share
    expected = more / spare if spare > 0 else np.inf
    seconds = begin + min(LONGEST_DRAIN_SECONDS, 1.5 * expected + AFTER_DRAIN_SECONDS)
    arrivals = burst(random, share, more, begin, seconds)
    outcome = simulate(arrivals, fleet.scorer)
    times = np.sort(np.concatenate([arrivals, outcome.ends]))
    backlog = np.searchsorted(arrivals, times, "right") - np.searchsorted(outcome.ends, times, "right")
    before = float(np.percentile(outcome.latency[arrivals < begin], 99)) if (arrivals < begin).any() else 0.0
    # Drained: tweets wait no longer than before the burst, or than a full window takes.
    usual = max(2 * before, fleet.scorer.windows[-1].period_ms / 1000)
    late = (arrivals >= begin) & (outcome.latency > usual)
    drained = float(outcome.ends[late].max()) - begin if late.any() else 0.0
    minutes = []
    for minute in range(ceil((seconds - begin) / MINUTE)):
        inside = (arrivals >= begin + MINUTE * minute) & (arrivals < begin + MINUTE * (minute + 1))
        if inside.any():
            p50, p99 = (float(np.percentile(outcome.latency[inside], percent)) for percent in (50, 99))
            minutes.append(Minute(minute, p50, p99))
    lasting = spare <= 0 or drained >= LONGEST_DRAIN_SECONDS
    return Burst(tweets, int(backlog.max()) * fleet.scorers, None if lasting else drained, minutes)
