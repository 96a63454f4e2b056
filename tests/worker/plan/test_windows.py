"""The simulated scorer: what queueing theory says of it in cases that are easy to compute."""

import numpy as np
import pytest

from worker.plan.arrivals import DAY_SECONDS, burst, in_busiest, read_curve, steady
from worker.plan.figures import WindowCost
from worker.plan.windows import Scorer, simulate


def cost(tweets: int, ms: float) -> WindowCost:
    return WindowCost(tweets=tweets, period_ms=ms, alone_ms=ms, core_ms=2 * ms)


# 1,000 tweets a second, however large the window.
PLAIN = Scorer([cost(1, 1), cost(512, 512)], 4096)


def test_a_tweet_that_comes_alone_waits_for_its_window_only() -> None:
    found = simulate(np.array([1.0, 2.0, 3.0]), PLAIN)
    assert found.latency == pytest.approx([0.001] * 3)
    assert list(found.window_sizes) == [1, 1, 1]
    assert found.core_seconds == pytest.approx(0.006)


def test_a_backlog_drains_at_the_speed_of_the_scorer() -> None:
    found = simulate(np.zeros(10_000), PLAIN)
    assert found.ends[-1] == pytest.approx(10.0)
    assert (np.diff(found.ends) >= 0).all()
    assert found.window_sizes.sum() == 10_000
    # As in a worker: the first windows are small, and large ones take an eighth of the backlog.
    assert list(found.window_sizes[:4]) == [64, 128, 256, 512]
    assert 512 < found.window_sizes.max() <= 10_000 / 8


def test_windows_grow_until_they_are_as_fast_as_tweets_arrive() -> None:
    # 10 ms a window and 1 ms a tweet: 100 of 111 ms are for 100 tweets, so windows of 40 keep up with 800 a second.
    fixed = Scorer([cost(1, 11), cost(1000, 1010)], 4096)
    arrivals = steady(np.random.default_rng(1), 800, 60)
    sizes = simulate(arrivals, fixed).window_sizes[100:]
    assert 35 < sizes.mean() < 55


def test_two_windows_share_the_device_and_a_lone_one_is_no_faster_for_it() -> None:
    # Of one window at a time 100 tweets a second, of two 200.
    halves = Scorer([cost(1, 5).model_copy(update={"alone_ms": 10})], 1)
    lone = simulate(np.array([0.0, 0.02]), halves)
    assert lone.ends == pytest.approx([0.01, 0.03])
    two = simulate(np.array([0.0, 0.005]), halves)
    assert two.ends == pytest.approx([0.01, 0.015])
    backlog = simulate(np.zeros(100), halves)
    assert backlog.ends[-1] == pytest.approx(0.5)
    whole = simulate(np.array([0.0, 0.0005]), Scorer([cost(1, 1)], 1))  # which one window uses, too
    assert whole.ends == pytest.approx([0.0015, 0.002])


def test_a_window_that_is_scored_before_an_earlier_one_is_stored_after_it() -> None:
    costs = Scorer([cost(1, 1), cost(64, 64)], 64)
    found = simulate(np.concatenate([np.zeros(64), [0.001]]), costs)
    assert found.ends[-1] == found.ends[0] == pytest.approx(0.065)


def test_latency_grows_with_the_load_and_without_end_beyond_it() -> None:
    waits = []
    for rate in (100, 500, 900, 1_200):
        latency = simulate(steady(np.random.default_rng(1), rate, 60), PLAIN).latency
        waits.append(float(np.median(latency)))
    assert waits == sorted(waits)
    # A fifth more than it can do for 60 s: half of the time in, 60 * 0.2 / 2 s of work wait, at 1.2 times the speed.
    # Besides, two windows of an eighth of that share the device.
    assert 0.5 * 60 * 0.2 < waits[-1] < 0.5 * 60 * 0.2 * (1 + 2 / 8)


def test_a_burst_is_on_top_of_the_stream() -> None:
    arrivals = burst(np.random.default_rng(1), 100, 5_000, 10, 30)
    inside = ((arrivals >= 10) & (arrivals < 11)).sum()
    assert inside == pytest.approx(5_100, abs=50)
    assert len(arrivals) == pytest.approx(3_000 + 5_000, abs=200)
    assert (np.diff(arrivals) >= 0).all()


def test_the_busiest_hours_are_found_across_midnight_and_in_parts() -> None:
    curve = np.array([3.0, 1.0, 0.0, 0.0, 0.0, 2.0])  # parts of four hours
    assert in_busiest(curve, 1.0, 4) == 3 * DAY_SECONDS / 6
    assert in_busiest(curve, 1.0, 8) == 5 * DAY_SECONDS / 6
    assert in_busiest(curve, 1.0, 2) == 1.5 * DAY_SECONDS / 6
    assert in_busiest(curve, 1.0, 24) == DAY_SECONDS
    assert in_busiest(curve, 2.0, 28) == 2 * DAY_SECONDS + 2 * 3 * DAY_SECONDS / 6


def test_the_assumed_curve_has_24_hours_and_its_mean_is_the_rate() -> None:
    curve = read_curve(None)
    assert len(curve) == 24
    assert curve.mean() == pytest.approx(1)
    assert (int(curve.argmin()), int(curve.argmax())) == (4, 22)
