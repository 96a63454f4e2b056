"""Time from a promotion to the first rows of a scoring worker: `python -m tests.benchmarks.promotion [--base]`.

A worker without a model and a stream that is never empty: seconds until the first row and until the faster engine takes
over, and tweets a second before and after. `--base` takes a model of BERT-base size.
"""

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import psutil

from db import predictions, registry
from db.models import ModelVersion
from db.session import Database
from tests.benchmarks.models import base_artifact, starter_artifact
from training.data.sample import UNLABELLED
from worker.connections import open_sql, open_stream
from worker.engines.engine_choice import saved_choices
from worker.settings import Settings, load_settings
from worker.stream import embedded_valkey
from worker.stream.stream import Stream

LOOK_SECONDS = 0.02
AHEAD = 2_000  # tweets that are always in the stream
SPAN_SECONDS = 10.0
LONGEST_SECONDS = 600.0
IDLE_SECONDS = 1.0
TOOK_OVER = ("takes over", "stays;")


def measure(base: bool, limit: float) -> dict[str, object]:
    with tempfile.TemporaryDirectory(prefix="tweetscore-") as scratch:
        settings = load_settings(home=Path(scratch) / "home")
        made = settings.home / "models" / "model"
        sha256 = base_artifact(made) if base else starter_artifact(made)
        shutil.rmtree(made.with_name("model.engines"), ignore_errors=True)
        database = open_sql(settings)
        with embedded_valkey.owned(settings.home) as server:
            log = settings.home / "worker.log"
            with log.open("wb") as output:
                command = [sys.executable, "-m", "worker.cli", "worker", "score"]
                environment = {**os.environ, "TWEETSCORE_HOME": str(settings.home)}
                worker = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
            try:
                _wait(lambda: " ready." in _read(log))
                _wait_until_idle(worker.pid)
                stream = open_stream(settings, server.url)
                version = _promote(database, made, sha256)
                found = _watched(settings, database, stream, version, log, limit)
                tried = [trial for choice in saved_choices(made, settings.engines) for trial in choice.trials]
                return {**found, "trials": {trial.engine: trial.tweets_per_second for trial in tried}}
            finally:
                worker.terminate()
                worker.wait()


def _watched(
    settings: Settings, database: Database, stream: Stream, version: int, log: Path, limit: float
) -> dict[str, object]:
    began, began_at, told = time.monotonic(), datetime.now(UTC), iter(_tweets())
    counts: list[tuple[float, int]] = []
    took_over = None
    while time.monotonic() - began < limit:
        depth = stream.depth()
        if (depth.lag or 0) < AHEAD:
            stream.publish(list(itertools.islice(told, AHEAD)))
        with database.read() as session:
            counts.append((time.monotonic() - began, predictions.prediction_count(session, version)))
        if took_over is None and any(word in _read(log) for word in TOOK_OVER):
            took_over = time.monotonic() - began
        if took_over is not None and time.monotonic() - began > took_over + SPAN_SECONDS + 1:
            break
        time.sleep(LOOK_SECONDS)
    first = next((at for at, count in counts if count), None)
    last = counts[-1][0]
    return {
        "loaded_seconds": round((_said_at(log, ": torch-float32 serves until") - began_at).total_seconds(), 2),
        "first_row_seconds": first and round(first, 2),
        "took_over_seconds": took_over and round(took_over, 1),
        "plain_tweets_per_second": first and round(_rate(counts, first, took_over or last)),
        "later_tweets_per_second": round(_rate(counts, last - SPAN_SECONDS, last)),
        "rows": counts[-1][1],
        "log": [line for line in _read(log).splitlines() if "takes over" in line or "stays;" in line],
    }


def _rate(counts: list[tuple[float, int]], since: float, until: float) -> float:
    inside = [(at, count) for at, count in counts if since <= at <= until]
    (start, before), (end, after) = inside[0], inside[-1]
    return (after - before) / max(end - start, 1e-9)


def _tweets():  # type: ignore[no-untyped-def]
    texts = [json.loads(line)["text"] for line in UNLABELLED.read_text(encoding="utf-8").splitlines()]
    for number in itertools.count():
        text = f"{texts[number % len(texts)]} {number}"
        yield json.dumps({"v": 1, "id": str(number), "text": text}).encode()


def _promote(database: Database, folder: Path, sha256: str) -> int:
    with database.begin() as session:
        version = ModelVersion(
            base_model="starter", artifact_url=folder.as_uri(), sha256=sha256,
            labels=["negative", "neutral", "positive"], cleaner_version="2",
        )  # fmt: skip
        registry.add_version(session, version, [], [], [])
        registry.assign(session, registry.CHAMPION, version.id)
        return version.id


def _said_at(log: Path, words: str) -> datetime:
    line = next(line for line in _read(log).splitlines() if words in line)
    return datetime.fromisoformat(json.loads(line)["timestamp"])


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def _wait_until_idle(pid: int) -> None:
    """A worker that has just started imports what its first model needs."""
    process, used = psutil.Process(pid), [0.0]

    def idle() -> bool:
        time.sleep(IDLE_SECONDS)
        used.append(sum(process.cpu_times()[:2]))
        return used[-1] - used[-2] < 0.1 * IDLE_SECONDS

    _wait(idle)


def _wait(condition) -> None:  # type: ignore[no-untyped-def]
    until = time.monotonic() + LONGEST_SECONDS
    while not condition():
        assert time.monotonic() < until
        time.sleep(LOOK_SECONDS)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--base", action="store_true", help="a model of BERT-base size")
    parser.add_argument("--seconds", type=float, default=LONGEST_SECONDS, help="most seconds to measure")
    given = parser.parse_args()
    print(json.dumps(measure(given.base, given.seconds), ensure_ascii=False, indent=1))
