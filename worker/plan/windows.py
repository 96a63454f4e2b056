"""A simulation of one scoring worker: tweets wait, are read in windows, share the device and are committed.

It follows the rules of `worker/scoring/pipeline.py`: a window takes what is there, at most as many as its size allows,
the size doubles, and at most four windows are in flight, on a CPU two of them before they have left it. Times are in
seconds.
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import numpy.typing as npt

from worker.plan.figures import WindowCost
from worker.scoring.overlap import UNSCORED_ON_CPU, WINDOWS_IN_FLIGHT
from worker.scoring.pipeline import BACKLOG_PARTS, BLOCK_MS, FIRST_WINDOW_TWEETS, LARGE_WINDOW_SECONDS
from worker.scoring.window import USUAL_WINDOW_TWEETS

Floats = npt.NDArray[np.float64]
FORWARDS = 2  # at the same time


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


@dataclass(eq=False)
class _Window:
    """What is left of a window's work, of 1, and how much of it is done in a second, alone and beside another one."""

    work: float
    speed: float
    shared_speed: float


class _Device:
    """A window alone takes `alone_ms`. Two share it, so that each of a backlog takes `period_ms`; others wait."""

    def __init__(self) -> None:
        self.now = 0.0
        self.ends: list[float] = []  # of the windows, in the order in which they entered
        self._not_ended: deque[_Window] = deque()
        self._unscored: deque[_Window] = deque()

    def enter(self, alone: float, period: float) -> None:
        window = _Window(1.0, 1 / alone, 1 / max(alone, FORWARDS * period))
        self._not_ended.append(window)
        self._unscored.append(window)

    def pass_time(self, until: float) -> None:
        while self._unscored and self.now < until:
            self._step(until)
        self.now = max(self.now, until)

    def wait(self, unscored: int, not_ended: int) -> None:
        """Until at most so many windows are left."""
        while len(self._unscored) > unscored or len(self._not_ended) > not_ended:
            self._step(math.inf)

    def _step(self, until: float) -> None:
        """Until the first window is scored, but not beyond `until`."""
        sharing = list(islice(self._unscored, FORWARDS))
        speeds = [window.speed if len(sharing) == 1 else window.shared_speed for window in sharing]
        needed = [window.work / speed for window, speed in zip(sharing, speeds, strict=True)]
        seconds = min(*needed, until - self.now)
        self.now += seconds
        for window, speed, most in zip(sharing, speeds, needed, strict=True):
            window.work -= seconds * speed
            if most <= seconds:
                self._unscored.remove(window)
                window.work = 0.0
        while self._not_ended and not self._not_ended[0].work:  # they are stored in their order
            self._not_ended.popleft()
            self.ends.append(self.now)


def simulate(arrivals: Floats, scorer: Scorer) -> Outcome:
    """Pass tweets that arrive at these times, in ascending order, through one scorer."""
    period, alone, cores = scorer.costs()
    device, sizes, done, core_seconds = _Device(), list[int](), 0, 0.0
    size, recent_tweets, recent_seconds = FIRST_WINDOW_TWEETS, 0.0, 0.0
    while done < len(arrivals):
        device.wait(scorer.most_unscored - 1, WINDOWS_IN_FLIGHT - 1)
        if arrivals[done] > device.now:  # the reader waits for the first tweet
            if arrivals[done] - device.now > BLOCK_MS / 1000:
                size = FIRST_WINDOW_TWEETS
            device.pass_time(float(arrivals[done]))
        waiting = int(np.searchsorted(arrivals, device.now, "right")) - done
        count = min(size, waiting, scorer.most_tweets)
        device.enter(alone[count], period[count])
        sizes.append(count)
        core_seconds += cores[count]
        done += count
        recent_tweets, recent_seconds = recent_tweets / 2 + count, recent_seconds / 2 + period[count]
        large = min((waiting - count) // BACKLOG_PARTS, int(LARGE_WINDOW_SECONDS * recent_tweets / recent_seconds))
        size = min(2 * size, scorer.most_tweets, max(USUAL_WINDOW_TWEETS, large))
    device.wait(0, 0)
    ends = np.repeat(device.ends, sizes)
    return Outcome(ends - arrivals, ends, np.array(sizes), core_seconds)
