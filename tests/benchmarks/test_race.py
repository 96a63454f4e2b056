"""How contestants take turns: a settled ratio costs no more rounds, and an open one goes on."""

from collections.abc import Callable, Iterator

import pytest

from tests.benchmarks.race import race, ratio, values


def counted(speeds: Iterator[float], done: list[str], name: str) -> Callable[[], float]:
    def run() -> float:
        done.append(name)
        return next(speeds)

    return run


def test_who_is_in_no_open_ratio_does_not_run_again() -> None:
    done: list[str] = []
    speeds = {
        "ours": counted(iter([100.0] * 9), done, "ours"),
        "steady": counted(iter([50.0, 50.5, 49.9, 50.1]), done, "steady"),
        "noisy": counted(iter([10.0, 20.0, 40.0, 10.0, 30.0, 25.0]), done, "noisy"),
    }
    rounds = race(speeds, [("ours", "steady"), ("ours", "noisy")], most_rounds=5)
    assert [done.count(name) for name in speeds] == [5, 3, 5]
    assert done[:6] == ["ours", "steady", "noisy", "steady", "noisy", "ours"]
    found = ratio(rounds, ("ours", "steady"))
    assert (found.value, found.rounds) == (2.0, 3)
    assert found.least == pytest.approx(100 / 50.5)
    assert values(rounds, ("ours", "noisy")) == [10.0, 5.0, 2.5, 10.0, pytest.approx(100 / 30)]


def test_a_race_ends_when_every_ratio_is_settled() -> None:
    done: list[str] = []
    speeds = {name: counted(iter([7.0] * 9), done, name) for name in ("ours", "theirs")}
    assert len(race(speeds, [("ours", "theirs")], most_rounds=9)) == 3
