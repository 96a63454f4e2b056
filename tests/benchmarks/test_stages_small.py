"""The benchmark of the stages apart: in its small form, and what it concludes."""

import json
from pathlib import Path

import pytest

from tests.benchmarks import stages
from tests.benchmarks.stages import Figures, limits, scorers_needed
from tests.support.paths import SAMPLE_TWEETS

# 20 core-ms per 1,000 tweets a scorer on a GPU, half of them without the lock.
FIGURES = Figures(
    {"read": 4, "batch, padded": 7, "store": 16}, {"read": 0, "batch, padded": 0, "store": 0.625}, 5, 15, writer=12.5
)


def test_the_wall_is_what_allows_the_fewest_tweets() -> None:
    assert limits(FIGURES, cores=2, gpu=60_000, scorers=8) == {
        "2 cores, servers included": 50_000,
        "the GPU": 60_000,
        "SQLite, one writer": 80_000,
        "Valkey, one thread": 200_000,
        "8 scorers, each a Python process": 800_000,
    }
    assert next(iter(limits(FIGURES, cores=16, gpu=1e6, scorers=8))) == "SQLite, one writer"
    assert scorers_needed(FIGURES, cores=2, gpu=60_000) == 1
    postgresql = Figures(FIGURES.stages, FIGURES.unlocked, 5, 15)
    assert scorers_needed(postgresql, cores=16, gpu=150_000) == 2


@pytest.mark.slow
def test_every_stage_is_measured_on_both_databases(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = tmp_path / "figures.json"
    small = ["--window", "256", "--rounds", "1", "--tweets", str(SAMPLE_TWEETS), "--json", str(written)]
    assert stages.main(small) == 0
    found = json.loads(written.read_text(encoding="utf-8"))
    for kind, one in found.items():
        assert one["stages"].keys() == one["unlocked"].keys() == stages.STAGES.keys()
        assert all(ms > 0 for ms in one["stages"].values())
        assert all(0 <= share <= 1 for share in one["unlocked"].values())
        assert one["broker"] > 0
        assert (one["writer"] > 0) == (kind == "sqlite")
        assert one["scorers_needed"] >= 1
    assert found.keys() == {"sqlite", "postgresql"}
    assert found["postgresql"]["tweets_per_second"]["the GPU"] == 60_000
    assert capsys.readouterr().out.count("the wall: ") == 2
