"""Memory and time of loading a model: `python -m tests.benchmarks.loading [--small]`.

Each in a process of its own: load a model without a saved choice, so on float32 torch; try its engines; load it with
the saved engine. Memory is the anonymous memory of the process, at its peak and at the end; of a trial, which has its
own process, all of it.
"""

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

from tests.benchmarks.models import base_artifact, starter_artifact
from training.model.artifact import WEIGHTS, load_artifact
from training.store.paths import file_sha256
from training.store.sealed_folder import SUMS
from worker.engines.engine_selection import choice_folder, load_engine
from worker.engines.engine_trial import TrialRequest, run_trial

LOOK_SECONDS = 0.005


def anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])


def load(folder: Path, trial: bool) -> dict[str, object]:
    before, peak, done = 0 if trial else anonymous_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(LOOK_SECONDS):
            peak = max(peak, anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    began, sha256, device = time.perf_counter(), file_sha256(folder / SUMS), torch.device("cpu")
    folders = [choice_folder(folder, sha256, device, "auto")]
    if trial:
        run_trial(TrialRequest(str(folder), sha256, "cpu", "auto", list(map(str, folders))))
        name = "all"
    else:
        artifact = load_artifact(folder, sha256)
        engine, _, _ = load_engine(artifact, device, "auto", folders)
        name = engine.name
        del artifact  # a scoring worker keeps only the engine
    seconds = time.perf_counter() - began
    done.set()
    watcher.join()
    gc.collect()
    weights = (folder / WEIGHTS).stat().st_size
    return {
        "engine": name,
        "seconds": round(seconds, 1),
        "weights_mb": round(weights / 1e6),
        "peak_mb": round((peak - before) / 1e6),
        "peak_in_weights": round((peak - before) / weights, 2),
        "kept_in_weights": round((anonymous_bytes() - before) / weights, 2),
    }


def measure(small: bool) -> list[dict[str, object]]:
    """One line per load, for base size and the starter."""
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        made = {"base": Path(scratch) / "base", "starter": Path(scratch) / "starter"}
        base_artifact(made["base"], small)
        starter_artifact(made["starter"])
        for name, folder in made.items():
            for when in ("first", "trial", "again"):
                command = [sys.executable, "-m", "tests.benchmarks.loading", "--load", str(folder)]
                command += ["--trial"] if when == "trial" else []
                said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                found.append({"model": name, "when": when, **json.loads(said.splitlines()[-1])})
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--small", action="store_true", help="a few layers instead of base size")
    parser.add_argument("--load", type=Path)
    parser.add_argument("--trial", action="store_true", help="with --load: try the engines")
    given = parser.parse_args()
    if given.load:
        print(json.dumps(load(given.load, given.trial)))
    else:
        for line in measure(given.small):
            print(json.dumps(line), flush=True)
