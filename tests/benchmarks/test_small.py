"""The benchmark in its small form: every figure is measured on real processes, and nothing is lost or done twice."""

import json
from pathlib import Path

import pytest

from tests.benchmarks import scoring


@pytest.mark.slow
def test_every_figure_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = tmp_path / "figures.json"
    assert scoring.main(["--small", "--tweets", str(scoring.SAMPLE_TWEETS), "--json", str(written)]) == 0
    found = json.loads(written.read_text(encoding="utf-8"))
    # infinity-emb wants an environment of its own, with a gigabyte of packages: by hand only.
    measured = set(scoring.KEYS) - {"end_to_end_over_infinity"}
    assert {key for key in found if key in scoring.KEYS} == measured
    assert all(found[key] > 0 for key in measured - {"two_workers", "idle_extra_ms_p50"})
    assert all(found["details"][key]["min"] <= found[key] <= found["details"][key]["max"] for key in measured)
    twice, burst = found["details"]["two_workers"], found["details"]["burst_seconds"]
    assert twice["scored"] == twice["published"] == 2 * scoring.SMALL.tweets
    assert twice["predictions"] == twice["rows"] == twice["tweets"]
    assert (twice["pending"], twice["lag"], twice["dead_letters"]) == (0, 0, 0)
    assert (burst["rows"], burst["lost"], burst["dead_letters"]) == (scoring.SMALL.burst, 0, 0)
    shown = capsys.readouterr().out
    assert all(key in shown for key in measured)
