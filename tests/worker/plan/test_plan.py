"""`tweetscore plan`: what it computes, what it says is unknown, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.worker.plan.test_figures import written
from worker.cli.planning.plan import RECORD_BURST
from worker.plan import arrivals
from worker.plan.capacity import Hardware
from worker.plan.figures import load_figures
from worker.plan.plan import Plan, Request, make_plan

# One scorer of 2 cores scores 1,000 tweets a second; a database of round figures.
WINDOWS = [
    {"tweets": 1, "period_ms": 1, "alone_ms": 1, "core_ms": 2},
    {"tweets": 500, "period_ms": 500, "alone_ms": 500, "core_ms": 1000},
]
STORE = {"scorer_core_ms": 40, "locked_core_ms": 40, "store_core_ms": 10, "bytes_per_tweet": 500}
ROUND = {
    "models": {"round": {"machine": "a test", "cores": 2, "windows": WINDOWS, "gflop_per_tweet": 2.0}},
    "sqlite": {**STORE, "writer_ms": 20, "wal_bytes_per_tweet": 3500},
    "postgresql": {**STORE, "server_core_ms": [40, 50], "wal_bytes_per_tweet": 1500},
    "stream": {"core_ms": 10, "bytes_per_tweet": 200},
    "gpus": {"H100": {"tflops": 800, "share": 0.25, "assumed_window_ms": 10}},
}  # fmt: skip
FLAT = "1 1"


@pytest.fixture
def figures(tmp_path: Path) -> str:
    return written(tmp_path, ROUND)


@pytest.fixture
def flat(tmp_path: Path) -> str:
    """A day without peaks."""
    (tmp_path / "flat").write_text(FLAT)
    return str(tmp_path / "flat")


def planned(figures: str, rate: float, flat: str | None, *hardware: Any, **more: Any) -> Plan:
    return make_plan(load_figures([figures]), Request(rate, Hardware("round", *hardware), flat, **more))


def test_scorers_keep_the_busiest_hour_below_seven_tenths(figures: str, flat: str) -> None:
    assert planned(figures, 690, flat, 2).fleet.scorers == 1
    assert planned(figures, 710, flat, 2).fleet.scorers == 2
    assert planned(figures, 710, flat, 4).fleet.scorers == 1  # twice the cores
    assert planned(figures, 690, None, 2).fleet.scorers == 2  # the assumed day has an evening


def test_a_database_holds_the_tweets_of_its_retention(figures: str, flat: str) -> None:
    made = planned(figures, 100, flat, 2, retention_days=10, database="postgresql")
    assert made.storage.rows == 86_400_000
    assert made.storage.bytes == 86_400_000 * 500
    assert made.storage.bytes_per_second == 100 * 2000
    assert planned(figures, 100, flat, 2).storage.bytes is None


def test_the_stream_holds_the_busiest_hours_of_an_outage(figures: str, tmp_path: Path) -> None:
    curve = tmp_path / "curve"
    curve.write_text("\n".join(["0"] * 12 + ["2"] * 12))
    made = planned(figures, 100, str(curve), 2, outage_hours=3)
    assert made.stream.tweets == 200 * 3 * 3600
    assert made.stream.bytes == 200 * made.stream.tweets


def test_the_first_limit_is_the_part_that_allows_the_least(figures: str, flat: str) -> None:
    one = planned(figures, 100, flat, 2)
    assert (one.database, one.walls[0].part) == ("sqlite", "scoring device, 1 scorers")
    assert {wall.part: wall.tweets_per_second for wall in one.walls}["SQLite, one writer"] == 50_000
    many = planned(figures, 60_000, flat, 2, database_cores=4)
    limits = {wall.part: wall.tweets_per_second for wall in many.walls}
    assert (many.database, many.walls[0].part) == ("postgresql", "PostgreSQL server")
    assert limits["PostgreSQL server"] == 4 * 1e6 / 50
    assert limits["Valkey, one thread"] == 100_000
    assert (many.walls[-1].part, many.walls[-1].tweets_per_second) == ("disk of the database", None)


def test_the_speed_of_a_gpu_is_computed_and_a_measured_one_replaces_it(figures: str, flat: str) -> None:
    made = planned(figures, 50_000, flat, None, "h100")
    assert made.fleet.devices == 1
    assert made.fleet.scorers == 3  # each is one Python process of 25,000 tweets a second
    assert made.fleet.tweets_per_second == 3 * 25_000
    assert any("by arithmetic" in note for note in made.notes)
    given = planned(figures, 50_000, flat, None, "h100", 20_000)
    assert given.fleet.devices == 4
    assert not any("by arithmetic" in note for note in given.notes)


def test_what_does_not_fit_into_an_hour_is_left_over_for_the_next(figures: str, tmp_path: Path) -> None:
    curve = tmp_path / "curve"
    curve.write_text(" ".join(["0"] * 21 + ["8", "8", "8"]))
    hours = planned(figures, 150, str(curve), 2, None, None, 1).hours  # 1,200 a second for three hours, 1,000 scored
    left = [round(hour.backlog) for hour in hours]
    assert left[21:] == [pytest.approx(n * 200 * 3600, rel=0.01) for n in (1, 2, 3)]
    assert left[0] == 0  # the three hours left 36 minutes of work
    assert hours[23].p50_seconds == pytest.approx(2.5 * 200 * 3600 / 1000, rel=0.05)
    assert hours[10].tweets_per_second == hours[10].p50_seconds == 0


def test_a_burst_is_drained_with_what_the_stream_leaves_free(figures: str, flat: str) -> None:
    burst = planned(figures, 500, flat, 2, burst=10_000).burst
    assert burst.drain_seconds == pytest.approx(10_000 / 500, rel=0.1)
    # When the second ends, 500 of them are scored; two windows of up to an eighth of the rest are on the device.
    assert 10_000 - 500 < burst.backlog_peak < (10_000 - 500) * (1 + 1 / 8)
    assert burst.minutes[0].p99_seconds == pytest.approx(9_500 / 1_000, rel=0.1)
    full = planned(figures, 1_100, flat, 2, None, None, 1, burst=10_000).burst
    assert full.drain_seconds is None


def test_the_command_prints_tables_and_json(tweetscore: Any, figures: str) -> None:
    asked = ["plan", "--tweets-per-second", "1000", "--cores", "2", "--measured", figures, "--model", "round"]
    shown = tweetscore(*asked, "--retention-days", "365")
    assert shown.returncode == 0, shown.stderr
    for part in ("Limits, the first on top", "A burst of 143,199 tweets", "The curve of the day is assumed", "15.8 TB"):
        assert part in shown.stdout
    found = json.loads(tweetscore(*asked, "--json").stdout)
    assert found["fleet"]["scorers"] == 3
    assert [hour["hour"] for hour in found["hours"]] == list(range(24))
    assert found["walls"][0]["part"] == "scoring device, 3 scorers"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--cores", "2", "--gpu", "H100"], "--cores is for scoring on CPUs and --gpu for GPUs"),
        (["--gpu", "A100"], "no figure of a GPU 'A100'"),
        (["--model", "large"], "no figures of a model 'large'; use one of base, starter"),
        (["--database", "mysql"], "'mysql' is not a database"),
        (["--curve", "/none"], "is not a curve"),
        (["--measure", "/none/here.json"], "no champion to measure"),
    ],
)
def test_what_cannot_be_planned_is_refused_in_one_sentence(tweetscore: Any, options: list[str], reason: str) -> None:
    refused = tweetscore("plan", "--tweets-per-second", "10", *options)
    assert (refused.returncode, len(refused.stderr.splitlines())) == (2, 1), refused.stderr
    assert reason in refused.stderr


def test_the_burst_of_the_option_is_the_recorded_one() -> None:
    assert RECORD_BURST == arrivals.RECORD_BURST
