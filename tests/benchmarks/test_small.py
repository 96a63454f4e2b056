"""The benchmark in its small form: every figure is measured on real processes, and nothing is lost or done twice."""

import json
from pathlib import Path

import pytest

from tests.benchmarks import scoring
from tests.support.paths import SAMPLE_TWEETS


@pytest.mark.slow
def test_every_figure_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = tmp_path / "figures.json"
    assert scoring.main(["--small", "--tweets", str(SAMPLE_TWEETS), "--json", str(written)]) == 0
    found = json.loads(written.read_text(encoding="utf-8"))
    # infinity-emb and optimum-intel want environments of their own, with a gigabyte of packages each: by hand only.
    measured = set(scoring.KEYS) - set(scoring.ISOLATED)
    assert {key for key in found if key in scoring.KEYS} == measured
    assert all(found[key] > 0 for key in measured - {"two_workers", "idle_extra_ms_p50"})
    assert all(found["details"][key]["min"] <= found[key] <= found["details"][key]["max"] for key in measured)
    twice, burst = found["details"]["two_workers"], found["details"]["burst_seconds"]
    assert twice["scored"] == twice["published"] == 2 * scoring.SMALL.base_tweets
    assert twice["predictions"] == twice["rows"] == twice["tweets"]
    assert (twice["pending"], twice["lag"], twice["dead_letters"]) == (0, 0, 0)
    assert (burst["rows"], burst["lost"], burst["dead_letters"]) == (scoring.SMALL.burst, 0, 0)
    assert found["machine"]["name"]
    assert found["products"]["fp32"]["gops"] > 0
    assert found["tweets_per_second"].keys() >= {"base", "base_engine", "pipeline", "best_pipeline", "guide"}
    shown = capsys.readouterr().out
    assert all(key in shown for key in measured)
