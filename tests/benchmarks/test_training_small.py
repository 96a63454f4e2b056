"""The training benchmark in its small form: every way really trains, every figure is there."""

import json
from pathlib import Path

import pytest

from tests.benchmarks import training
from tests.conftest import write_labelled


@pytest.mark.slow
def test_every_figure_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = write_labelled(tmp_path / "jrte-train.csv").read_text(encoding="utf-8")
    rows += "".join(f"neutral,ただの日だった{i}\n" for i in range(30))
    for name in ("jrte-train.csv", "jrte-dev.csv"):
        (tmp_path / name).write_text(rows, encoding="utf-8")
    written = tmp_path / "figures.json"
    assert training.main(["--small", "--jrte", str(tmp_path), "--json", str(written)]) == 0
    found = json.loads(written.read_text(encoding="utf-8"))
    assert {key for key in found if key in training.KEYS} == set(training.KEYS)
    for key in training.KEYS:
        details = found["details"][key]
        assert details["least"] <= found[key] <= details["greatest"]
    assert all(found[key] > 0 for key in training.SPEEDS)
    assert min(found["details"]["over_guide_base"]["details"]["guide_base"]) > 0
    assert 0 <= found["ece_2"] <= 1
    shown = capsys.readouterr().out
    assert all(key in shown for key in training.KEYS)
