"""Does `tweetscore plan` foretell what happens? `python -m tests.benchmarks.plan [--json FILE]`.

A real scoring worker with the starter encoder, an embedded Valkey and SQLite get steady streams of two loads and a
burst. The figures are measured by `tweetscore plan --measure` immediately before and after each, and the simulation is
made from the mean of both, less the share of the cores that the publisher took. Printed are both and their ratio, plan
over reality. Nothing else must run on the machine.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks import models
from tests.benchmarks.contestants import Measured
from tests.benchmarks.system import System, tweets
from tests.support.paths import tweets_file
from worker.plan.arrivals import Floats, burst, steady
from worker.plan.capacity import CPU_MOST_TWEETS
from worker.plan.figures import ModelFigures, WindowCost
from worker.plan.windows import Scorer, simulate

LOADS = (0.4, 0.75)
SECONDS, BURST_SECONDS = 30.0, 4.0
# Tweets arrive together this often, in the plan as well: each call of a publisher takes a core from the worker for a
# moment, and the forward on the other one waits for it.
TICK_SECONDS = 0.02
WARM_UP_SECONDS = 3.0
# Of the worker, before anything is measured.
WARM_UP, WARM_UP_TWEETS_PER_SECOND = 30.0, 500.0


@dataclass(frozen=True)
class Seen:
    """Of the tweets of one stream. Seconds of latency count from the arrival to the commit; `end_seconds` is when the
    last row was committed, from the first arrival on. `busy_cores` are those of the scorer and the stream's server."""

    tweets_per_second: float
    busy_cores: float
    tweets_per_window: float
    p50_seconds: float
    p99_seconds: float
    end_seconds: float


def measured_figures(system: System, scratch: Path) -> ModelFigures:
    """As a user measures them: in another process, on the system's home."""
    file = scratch / "measured.json"
    environment = os.environ | {
        "TWEETSCORE_HOME": str(system.home), "TWEETSCORE_MODEL_STORE": str(system.artifact.absolute().parent),
    }  # fmt: skip
    command = [sys.executable, "-m", "worker.cli", "plan", "--tweets-per-second", "1", "--measure", str(file)]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    found = json.loads(file.read_text(encoding="utf-8"))
    return ModelFigures.model_validate(found["models"]["champion"])


def mean(one: ModelFigures, other: ModelFigures) -> ModelFigures:
    windows = [
        {name: (value + getattr(b, name)) / 2 if name != "tweets" else value for name, value in a.model_dump().items()}
        for a, b in zip(one.windows, other.windows, strict=False)  # a slower time has fewer sizes
    ]
    return one.model_copy(update={"windows": [WindowCost.model_validate(window) for window in windows]})


def in_reality(system: System, arrivals: Floats, source: Path) -> tuple[Seen, float]:
    """Publish tweets when they are due, and look at what was stored. Returns also the cores that publishing took.

    The first are followed by a nudge. More would cost the worker time: it reads the stream for some seconds after each
    tweet without them.
    """
    payloads = tweets(len(arrivals), source)
    system.drain()
    before, cpu_before = system.last_window(), system.cpu_seconds()
    publisher_before = time.process_time()
    first, began, done = int(json.loads(payloads[0])["id"]), time.time(), 0
    while done < len(payloads):
        due = int(np.searchsorted(arrivals, time.time() - began, "right"))
        if due > done:
            publish = system.stream.publish if done else system.publish
            publish(payloads[done:due])
            done = due
        if done < len(payloads):
            time.sleep(max(0.0, began + arrivals[done] - time.time()))
    publisher_cores = (time.process_time() - publisher_before) / float(arrivals[-1])
    system.drain()
    cpu_seconds = system.cpu_seconds() - cpu_before
    # The rows of a window have the time before its commit, which `store_ms` is a part of.
    store_ms = system.look.value("SELECT avg(store_ms) FROM scoring_windows WHERE id > ?", before)
    sql = """SELECT (julianday(scored_at) - 2440587.5) * 86400 FROM predictions
             WHERE length(tweet_id) = ? AND tweet_id >= ? ORDER BY tweet_id"""
    rows = system.look.rows(sql, len(str(first)), str(first))
    ends = np.array([row[0] for row in rows]) + store_ms / 1000 - began
    assert len(ends) == len(arrivals)
    windows = system.look.value("SELECT count(*) FROM scoring_windows WHERE id > ?", before)
    return seen(arrivals, ends, cpu_seconds, windows), publisher_cores


def foretold(arrivals: Floats, figures: ModelFigures, publisher_cores: float = 0.0) -> Seen:
    """`publisher_cores` are those of a publisher on the scorer's machine: the scorer is slower by its share."""
    slower = figures.cores / (figures.cores - publisher_cores)
    windows = [
        cost.model_copy(update={"period_ms": slower * cost.period_ms, "alone_ms": slower * cost.alone_ms})
        for cost in figures.windows
    ]
    found = simulate(arrivals, Scorer(windows, CPU_MOST_TWEETS))
    return seen(arrivals, found.ends, found.core_seconds, len(found.window_sizes))


def seen(arrivals: Floats, ends: Floats, core_seconds: float, windows: int) -> Seen:
    warm = arrivals >= min(WARM_UP_SECONDS, arrivals[-1] / 5)
    latency = (ends - arrivals)[warm]
    p50, p99 = (float(np.percentile(latency, percent)) for percent in (50, 99))
    end = float(ends.max())
    return Seen(len(arrivals) / end, core_seconds / end, len(arrivals) / windows, p50, p99, end)


def measure(system: System, source: Path, scratch: Path, seconds: float) -> dict[str, Any]:
    """What was foretold and what was seen of each stream."""
    random, found = np.random.default_rng(1), {}
    # A new worker meets shapes of batches that its engine has not seen: its first half minute is slower.
    in_reality(system, steady(random, WARM_UP_TWEETS_PER_SECOND, WARM_UP), source)
    figures = measured_figures(system, scratch)
    for name in (*(f"load {load:g}" for load in LOADS), "burst"):
        speed = figures.tweets_per_second
        if name == "burst":  # as many as are scored in some seconds, on a load of 0.4
            arrivals = burst(random, 0.4 * speed, BURST_SECONDS * speed, 2.0, seconds)
        else:
            arrivals = steady(random, float(name.split()[1]) * speed, seconds)
        arrivals = np.ceil(arrivals / TICK_SECONDS) * TICK_SECONDS
        reality, publisher_cores = in_reality(system, arrivals, source)
        after = measured_figures(system, scratch)
        plan = foretold(arrivals, mean(figures, after), publisher_cores)
        found[name] = {
            "plan": vars(plan), "reality": vars(reality),
            "ratios": {key: value / vars(reality)[key] for key, value in vars(plan).items()},
            "speeds": [speed, after.tweets_per_second], "figures": [figures.model_dump(), after.model_dump()],
        }  # fmt: skip
        show(name, found[name])
        figures = after
    return found


def show(name: str, found: dict[str, Any]) -> None:
    before, after = found["speeds"]
    print(f"\n{name} of {before:,.0f} tweets/s ({after:,.0f} measured afterwards)")
    print(f"  {'':18}{'plan':>12}{'reality':>12}{'plan / reality':>16}")
    for key, value in found["plan"].items():
        print(f"  {key:18}{value:12,.3f}{found['reality'][key]:12,.3f}{found['ratios'][key]:16.2f}", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.plan", description=__doc__)
    parser.add_argument("--seconds", type=float, default=SECONDS, metavar="N", help="of each stream")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    parser.add_argument("--tweets", type=Path, default=tweets_file())
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="tweetscore-") as scratch:
        measured = Measured(Path(scratch), "starter", models.starter_artifact, options.tweets, 0)
        try:
            found = measure(measured.system(), options.tweets, Path(scratch), options.seconds)
        finally:
            measured.close()
    if options.json:
        options.json.write_text(json.dumps(found, indent=2), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
