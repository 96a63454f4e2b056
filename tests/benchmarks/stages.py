"""What keeps a GPU waiting: `python -m tests.benchmarks.stages [--cores 16] [--gpu-tweets-per-second 60000]`.

Two scorers in one process pass windows of real tweets stage by stage, on a real stream and database, without a model.
The time of a stage is that of its thread, as in `lean.py`. In every second round both pass a stage at once, in two
threads: what that saves is a share of the stage that runs without Python's global lock (GIL). The rest of all stages is
the most that one scorer, which is one Python process, can do, on however many cores. The share is a least one: a
machine without two free cores hides it. The rounds are short, and the least time of many counts.

The figures are computed for other numbers of cores from those of this machine. Publishers, the launches of kernels and
the copies to the GPU are not in them.
"""

import argparse
import json
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from sqlalchemy import text

from db import migrate
from db.session import Database, open_database
from tests.benchmarks import lean, models
from tests.benchmarks.bulk import two_databases
from tests.benchmarks.system import tweets
from tests.support.paths import tweets_file
from tests.support.rows import assign, make_version
from training.model.artifact import load_artifact
from training.model.batching import Batch, Logits
from worker.connections import open_stream
from worker.engines.engine_choice import Choice
from worker.engines.engines import Engine, PaddedEngine
from worker.engines.packed_engine import PackedEngine
from worker.scoring.scoring_model import ScoringModel
from worker.scoring.window import Window
from worker.settings import load_settings
from worker.stream import embedded_valkey
from worker.stream.redis_client import connect

# Stage -> its steps. A GPU has packed batches; padded ones are measured beside them.
STAGES = {
    "read": ("read", "parse"),
    "tokenise": ("clean", "tokenise"),
    "batch, padded": ("batch, padded",),
    "batch, packed": ("batch, packed",),
    "store": ("rows", "SQL", "ack"),
}
NOT_ON_A_GPU = "batch, padded"
TOKEN_BUDGET = 65_536


@dataclass
class Figures:
    """Core-milliseconds per 1,000 tweets: of the stages (least of the rounds), and of what all scorers share.

    `unlocked` is the share of each stage, 0 to 1, that two threads did at once. `broker` is the one thread of Valkey,
    publishing included, `database` all processes of PostgreSQL (mean of the rounds). `writer` is the transaction in
    SQLite, which only one process at a time may be in.
    """

    stages: dict[str, float] = field(default_factory=dict)
    unlocked: dict[str, float] = field(default_factory=dict)
    broker: float = 0.0
    database: float = 0.0
    writer: float = 0.0

    @property
    def scorer(self) -> float:
        return sum(ms for stage, ms in self.stages.items() if stage != NOT_ON_A_GPU)

    @property
    def locked(self) -> float:
        """The part of `scorer` that holds the GIL."""
        return sum(ms * (1 - self.unlocked[name]) for name, ms in self.stages.items() if name != NOT_ON_A_GPU)


def limits(figures: Figures, cores: int, gpu: float, scorers: int) -> dict[str, float]:
    """What each part allows, in tweets/s, the least first: that is the wall."""
    found = {
        "the GPU": gpu,
        f"{cores} cores, servers included": 1e6 * cores / (figures.scorer + figures.broker + figures.database),
        f"{scorers} scorers, each a Python process": 1e6 * scorers / figures.locked,
        "Valkey, one thread": 1e6 / figures.broker if figures.broker else 0.0,
        "SQLite, one writer": 1e6 / figures.writer if figures.writer else 0.0,
    }
    return dict(sorted(((part, speed) for part, speed in found.items() if speed), key=lambda pair: pair[1]))


def scorers_needed(figures: Figures, cores: int, gpu: float) -> int:
    """The fewest scorers that are not the wall."""
    reached = next(speed for part, speed in limits(figures, cores, gpu, 1).items() if "scorers" not in part)
    return ceil(reached * figures.locked / 1e6)


class NoModel:
    """Makes the batches of an engine; its logits are random."""

    seconds = 0.0

    def __init__(self, engine: Engine | PaddedEngine) -> None:
        self.name, self.batches = engine.name, engine.batches

    def run(self, batches: Sequence[Batch]) -> list[Logits]:
        random = np.random.default_rng(1)
        return [random.standard_normal((len(batch.rows), len(models.LABELS)), np.float32) for batch in batches]


class Scorer(lean.Steps):
    """One scorer's stages, each of which can run by itself."""

    def __init__(self, artifact: Any, url: str, server: str, window: int) -> None:
        encoder = artifact.model.encoder_config
        engines = [
            NoModel(PaddedEngine("padded", encoder.pad_token_id)),
            NoModel(PackedEngine("packed", artifact.model, torch.device("cpu"), torch.float32)),
        ]
        self.padded, self.packed = (
            ScoringModel(0, artifact, engine, Choice(engine.name, TOKEN_BUDGET, "", [])) for engine in engines
        )
        database = open_database(url)
        migrate.upgrade(database)
        self.packed.version_id = make_version(database)
        assign(database, self.packed.version_id)
        stream = open_stream(load_settings(), server)
        stream.ensure_group()
        super().__init__(stream, self.packed, engines[0], database, window)  # type: ignore[arg-type]
        self.seconds = defaultdict(list)
        self._window: Window | None = None

    def run(self, stage: str) -> None:
        if stage == "read":
            self._window = self.read()
            assert len(self._window.tweets) == self.window
            return
        assert self._window is not None
        if stage == "tokenise":
            self.tokenise(self._window)
        elif stage == "store":
            self.commit(self._window)
        else:
            self.forward(self._window, self.padded if stage == NOT_ON_A_GPU else self.packed, stage)


def measure(kind: str, source: Path, window: int, rounds: int, scratch: Path) -> Figures:
    artifact_folder = scratch / "starter"
    if not artifact_folder.exists():
        models.starter_artifact(artifact_folder)
    artifact = load_artifact(artifact_folder)
    with ExitStack() as stack:
        server = stack.enter_context(embedded_valkey.owned(scratch / kind, 4096))
        urls = stack.enter_context(two_databases(kind))
        scorers = [Scorer(artifact, url, server.url, window) for url in urls]
        for scorer in scorers:
            stack.callback(scorer.database.close)
        broker, database = broker_clock(server.url), database_clock(scorers[0].database)
        threads = stack.enter_context(ThreadPoolExecutor(2))
        payloads = tweets(2 * window * (1 + 2 * rounds), source)
        together: dict[str, list[float]] = defaultdict(list)
        served: list[float] = []  # seconds of the broker per round
        for number in range(1 + 2 * rounds):
            if number == 1:  # the first round warmed up
                began, served = database(), []
                for scorer in scorers:
                    scorer.seconds.clear()
            before = broker()
            at_once = number > 0 and number % 2 == 0
            scorers[0].stream.publish(payloads[2 * window * number : 2 * window * (number + 1)])
            for stage in STAGES:
                started = time.perf_counter()
                list((threads.map if at_once else map)(lambda scorer: scorer.run(stage), scorers))  # noqa: B023
                if at_once:
                    together[stage].append(time.perf_counter() - started)
            served.append(broker() - before)
        written = database() - began
    steps = {step: 1e6 * min(s for one in scorers for s in one.seconds[step]) / window for step in scorers[0].seconds}
    stages = {stage: sum(steps[step] for step in of) for stage, of in STAGES.items()}
    # Two threads that never wait for each other's lock need the time of one, otherwise up to that of both.
    locked = {stage: 1e6 * min(found) / (2 * window) for stage, found in together.items()}
    return Figures(
        stages,
        {stage: max(0.0, 1 - locked[stage] / ms) for stage, ms in stages.items()},
        broker=1e6 * min(served) / (2 * window),
        database=1e6 * written / (2 * window * 2 * rounds),
        writer=steps["SQL"] if kind == "sqlite" else 0.0,
    )


def broker_clock(url: str) -> Callable[[], float]:
    """A function that returns the seconds of CPU time of the server's main thread."""
    client = connect(url)

    def seconds() -> float:
        used = client.info("cpu")
        return float(used["used_cpu_user_main_thread"] + used["used_cpu_sys_main_thread"])

    return seconds


def database_clock(database: Database) -> Callable[[], float]:
    """A function that returns the seconds of CPU time of PostgreSQL's processes; always 0 for SQLite."""
    if database.engine.dialect.name == "sqlite":
        return lambda: 0.0
    with database.read() as session:
        backend = psutil.Process(session.execute(text("SELECT pg_backend_pid()")).scalar_one())
    parent = backend.parent()
    assert parent is not None

    def seconds() -> float:
        ended = parent.cpu_times()
        running = [process.cpu_times() for process in (parent, *parent.children())]
        return float(ended.children_user + ended.children_system + sum(used.user + used.system for used in running))

    return seconds


def show(kind: str, found: Figures, cores: int, gpu: float, scorers: int) -> None:
    print(f"\n{kind:16}{'core-ms per 1,000':>18}{'tweets/s a core':>17}{f'{cores} cores':>11}{'without GIL':>13}")
    rows = {**found.stages, "all, packed": found.scorer, "PostgreSQL": found.database, "Valkey": found.broker}
    for name, ms in rows.items():
        if ms:
            many = "" if name == "Valkey" else f"{1e6 * cores / ms:,.0f}"  # it uses one core for all
            free = f"{found.unlocked[name]:.0%}" if name in found.unlocked else ""
            print(f"  {name:14}{ms:18.2f}{1e6 / ms:17,.0f}{many:>11}{free:>13}")
    walls = limits(found, cores, gpu, scorers)
    print("  " + "; ".join(f"{part}: {speed:,.0f}" for part, speed in walls.items()) + " tweets/s")
    needed = scorers_needed(found, cores, gpu)
    print(f"  the wall: {next(iter(walls))}; one scorer: {1e6 / found.locked:,.0f} tweets/s; scorers needed: {needed}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.stages", description=__doc__)
    parser.add_argument("--cores", type=int, default=16, metavar="N", help="of the machine with the GPU")
    parser.add_argument("--gpu-tweets-per-second", type=float, default=60_000, metavar="N", help="of the engine alone")
    parser.add_argument("--scorers", type=int, default=8, metavar="N", help="that share the GPU")
    parser.add_argument("--database", choices=["sqlite", "postgresql"], action="append", help="both by default")
    parser.add_argument("--window", type=int, default=1024, metavar="TWEETS")
    parser.add_argument("--rounds", type=int, default=20, metavar="N", help="of each kind, one by one and at once")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    parser.add_argument("--tweets", type=Path, default=tweets_file())
    options = parser.parse_args(arguments)
    machine = (options.cores, options.gpu_tweets_per_second, options.scorers)
    written: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="tweetscore-") as scratch:
        for kind in options.database or ["sqlite", "postgresql"]:
            found = measure(kind, options.tweets, options.window, options.rounds, Path(scratch))
            show(kind, found, *machine)
            written[kind] = {
                **asdict(found), "tweets_per_second": limits(found, *machine),
                "scorers_needed": scorers_needed(found, options.cores, options.gpu_tweets_per_second),
            }  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps(written, indent=2), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
