"""A simulation of one scoring worker: tweets wait, are read in windows, pass the device one after another and are
committed.

It follows the rules of `worker/scoring/pipeline.py`: a window takes what is there, at most as many as its size allows,
the size doubles, and at most four windows are in flight, on a CPU two of them before they have left it. Times are in
seconds.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from worker.plan.figures import WindowCost
from worker.scoring.overlap import UNSCORED_ON_CPU, WINDOWS_IN_FLIGHT
from worker.scoring.pipeline import BACKLOG_PARTS, BLOCK_MS, FIRST_WINDOW_TWEETS, LARGE_WINDOW_SECONDS
from worker.scoring.window import USUAL_WINDOW_TWEETS

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Scorer:
    """One scoring worker: the time a window takes, the most tweets in one, and the most windows that may be in flight
    before they have left the device."""

    windows: Sequence[WindowCost]
    most_tweets: int
    most_unscored: int = UNSCORED_ON_CPU

    @property
    def tweets_per_second(self) -> float:
        return max(1000 * cost.tweets / cost.period_ms for cost in self.windows)

    def costs(self) -> Floats:
        """(3, most_tweets + 1): seconds of period, alone and cores for a window of 0, 1, 2... tweets.

        Straight lines between what was measured; beyond it each tweet takes as long as in the largest window.
        """
        sizes = [cost.tweets for cost in self.windows]
        every = np.arange(self.most_tweets + 1)
        beyond = np.maximum(1.0, every / sizes[-1])
        of = [[getattr(cost, name) / 1000 for cost in self.windows] for name in ("period_ms", "alone_ms", "core_ms")]
        return np.stack([np.interp(every, sizes, seconds) * beyond for seconds in of])


@dataclass(frozen=True)
class Outcome:
    """`latency` (N,) from the arrival of each tweet to the commit of its row, `ends` (N,) when that was.

    `window_ends`, `window_sizes` (W,), and the seconds of cores that all windows took.
    """

    latency: Floats
    ends: Floats
    window_sizes: npt.NDArray[np.int64]
    core_seconds: float


def simulate(arrivals: Floats, scorer: Scorer) -> Outcome:
    """Pass tweets that arrive at these times, in ascending order, through one scorer."""
    period, alone, cores = scorer.costs()
    last = len(arrivals)
    ends, sizes = np.empty(last), []
    in_flight, unscored = deque[float](), deque[float]()  # when they end, and when they leave the device
    now = device_free = core_seconds = 0.0
    size, done, recent_tweets, recent_seconds = FIRST_WINDOW_TWEETS, 0, 0.0, 0.0
    while done < last:
        if len(in_flight) == WINDOWS_IN_FLIGHT:
            now = max(now, in_flight.popleft())
        if len(unscored) == scorer.most_unscored:
            now = max(now, unscored.popleft())
        if arrivals[done] > now:  # the reader waits for the first tweet
            if arrivals[done] - now > BLOCK_MS / 1000:
                size = FIRST_WINDOW_TWEETS
            now = float(arrivals[done])
        waiting = int(np.searchsorted(arrivals, now, "right")) - done
        count = min(size, waiting, scorer.most_tweets)
        started = max(now, device_free)
        device_free = started + period[count]
        # A window that waited for the device has passed the steps before it meanwhile.
        end = max(now + alone[count], device_free)
        end = max(end, in_flight[-1]) if in_flight else end
        in_flight.append(end)
        unscored.append(device_free)
        ends[done : done + count] = end
        sizes.append(count)
        core_seconds += cores[count]
        done += count
        recent_tweets, recent_seconds = recent_tweets / 2 + count, recent_seconds / 2 + period[count]
        large = min((waiting - count) // BACKLOG_PARTS, int(LARGE_WINDOW_SECONDS * recent_tweets / recent_seconds))
        size = min(2 * size, scorer.most_tweets, max(USUAL_WINDOW_TWEETS, large))
    return Outcome(ends - arrivals, ends, np.array(sizes), core_seconds)
