"""The figures of a plan: the packaged ones, and files of a user over them."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks.stages import Figures as Stages
from worker.errors import BadRequest
from worker.plan.figures import load_figures


def written(folder: Path, value: Any) -> str:
    path = folder / "measured.json"
    path.write_text(json.dumps(value), encoding="utf-8")
    return str(path)


def test_the_packaged_figures_name_their_machine_and_hold_both_models() -> None:
    figures = load_figures([])
    assert "cores" in figures.machine
    assert figures.models.keys() == {"base", "starter"}
    assert figures.models["starter"].tweets_per_second > 3 * figures.models["base"].tweets_per_second


def test_a_part_of_the_form_replaces_that_part_alone(tmp_path: Path) -> None:
    figures = load_figures([written(tmp_path, {"postgresql": {"bytes_per_tweet": 400}})])
    assert figures.postgresql.bytes_per_tweet == 400
    assert figures.postgresql.wal_bytes_per_tweet == load_figures([]).postgresql.wal_bytes_per_tweet
    assert figures.sqlite == load_figures([]).sqlite


def test_the_output_of_the_stages_benchmark_is_understood(tmp_path: Path) -> None:
    stages = Stages({"read": 4, "batch, padded": 7, "store": 16}, {"read": 0, "batch, padded": 0, "store": 0.5}, 5, 15)
    figures = load_figures([written(tmp_path, {"postgresql": vars(stages)})])
    found = figures.postgresql
    assert (found.scorer_core_ms, found.locked_core_ms, found.store_core_ms) == (20, 12, 16)
    assert found.server_core_ms == (15, 15)
    assert figures.stream.core_ms == 5


def test_the_output_of_the_scoring_benchmark_scales_the_windows(tmp_path: Path) -> None:
    before = load_figures([]).models["starter"]
    speed = {"starter": 2 * before.tweets_per_second}
    output = {"tweets_per_second": speed, "core_hours_a_million_starter": 0.1, "details": {}}
    after = load_figures([written(tmp_path, output)]).models["starter"]
    assert after.tweets_per_second == pytest.approx(2 * before.tweets_per_second)
    assert after.core_ms_per_tweet == pytest.approx(0.36)
    assert [window.tweets for window in after.windows] == [window.tweets for window in before.windows]


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ([], "no JSON object"),
        ({"postgresql": {"bytes_per_tweet": -1}}, "postgresql.bytes_per_tweet: Input should be greater than 0"),
        ({"postgresqI": {"bytes_per_tweet": 1}}, "postgresqI: Extra inputs are not permitted"),
        ({"sqlite": {"stages": {"read": 1}}}, "not the complete output of a benchmark"),
    ],
)
def test_a_file_of_another_form_is_refused_with_the_place(value: Any, reason: str, tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match=reason):
        load_figures([written(tmp_path, value)])


def test_a_file_that_is_missing_or_not_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="No such file"):
        load_figures([str(tmp_path / "none.json")])
    (tmp_path / "text").write_text("text")
    with pytest.raises(BadRequest, match="not JSON"):
        load_figures([str(tmp_path / "text")])
