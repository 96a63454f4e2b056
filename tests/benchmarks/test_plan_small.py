"""What the benchmark of the plan computes from what it sees."""

import numpy as np
import pytest

from tests.benchmarks.plan import foretold, mean, seen
from worker.plan.figures import ModelFigures, WindowCost


def figures(ms: float, sizes: tuple[int, ...] = (1, 512)) -> ModelFigures:
    windows = [WindowCost(tweets=n, period_ms=n * ms, alone_ms=n * ms, core_ms=n * ms) for n in sizes]
    return ModelFigures(machine="a test", cores=2, windows=windows)


def test_the_figures_before_and_after_count_alike() -> None:
    both = mean(figures(1.0), figures(3.0, (1, 512, 1024)))
    assert [window.period_ms for window in both.windows] == [2.0, 1024.0]
    assert both.tweets_per_second == 500


def test_latency_counts_without_the_first_seconds_and_the_end_from_the_first_arrival() -> None:
    arrivals = np.arange(10.0)
    ends = arrivals + np.where(arrivals < 2, 5.0, 0.5)
    found = seen(arrivals, ends, core_seconds=19.0, windows=5)
    assert (found.p50_seconds, found.p99_seconds) == (0.5, 0.5)
    assert (found.end_seconds, found.busy_cores, found.tweets_per_window) == (9.5, 2.0, 2.0)


def test_what_is_foretold_is_what_the_simulated_worker_does() -> None:
    found = foretold(np.zeros(1_000), figures(2.0))
    assert found.end_seconds == pytest.approx(2.0)
    assert found.tweets_per_second == pytest.approx(500)
    assert found.busy_cores == pytest.approx(1.0)
