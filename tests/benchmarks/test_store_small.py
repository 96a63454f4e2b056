"""The benchmarks of the store and of the upgrade to partitions, in small."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.benchmarks.store import SETTINGS
from tests.conftest import PATIENCE_SECONDS
from tests.support.paths import ROOT


@pytest.mark.slow
def test_the_benchmark_of_the_store_measures_writers_on_empty_and_on_filled_tables(tmp_path: Path) -> None:
    report = tmp_path / "store.json"
    command = [sys.executable, "-m", "tests.benchmarks.store", "--rows", "0", "3000", "--writers", "1", "2"]
    done = subprocess.run(
        [*command, "--seconds", "0.2", "--rounds", "1", "--json", str(report)],
        cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_SECONDS,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(report.read_text(encoding="utf-8"))
    assert found["settings"] == SETTINGS
    assert [(speed["rows"], speed["writers"]) for speed in found["speeds"]] == [(0, 1), (0, 2), (3000, 1), (3000, 2)]
    assert all(speed["rate"] > 100 and speed["limit"] > 100 and speed["wal"] > 100 for speed in found["speeds"])
    assert 300 < sum(found["bytes_per_tweet"].values()) < 3000


@pytest.mark.slow
def test_the_benchmark_of_the_upgrade_moves_a_filled_database_and_drops_its_rows_as_a_whole() -> None:
    command = [sys.executable, "-m", "tests.benchmarks.upgrade", "--rows", "2000"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    assert done.returncode == 0, done.stderr
    assert re.search(r"upgraded in [\d.]+ s\ndropped as a whole in \d+ ms, 0 rows kept", done.stdout)
