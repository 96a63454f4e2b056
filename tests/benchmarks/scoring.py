"""Speed of scoring compared with other ways on the same machine: `python -m tests.benchmarks.scoring`.

Every figure is a ratio of two speeds measured alternately in one run, or a latency: median, least and greatest.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from tests.benchmarks import bulk, models, peers
from tests.benchmarks.last_layer import whole_engine
from tests.benchmarks.system import System, tweets
from tests.support.paths import ROOT
from training.model.artifact import load_artifact
from training.model.batching import pad_arrays, plan_batches
from training.text.tokenizer import TextEncoder, encode
from worker.scoring.engine_selection import choice_folder, load_engine
from worker.scoring.engine_trial import TrialRequest, run_trial
from worker.scoring.engines import Batch, Engine, hardware
from worker.scoring.scoring_model import ScoringModel
from worker.scoring.window import USUAL_WINDOW_TWEETS

# Real tweets if the file exists beside the project; else the sample's.
REAL_TWEETS = ROOT.parent / "shared" / "data" / "tweets-2011.jsonl"
SAMPLE_TWEETS = ROOT / "training" / "sample" / "unlabelled.jsonl"
LABELS = ["negative", "neutral", "positive"]


@dataclass(frozen=True)
class Size:
    """The amount of work: in full, or as little as proves that everything runs."""

    tweets: int = 1_000
    slow_tweets: int = 48  # for the guide's loop, which takes a fiftieth of the speed
    rounds: int = 5
    slow_rounds: int = 3
    single_tweets: int = 200
    bulk_rows: int = bulk.MILLION
    bulk_tweets: int = 4_096
    burst: int = bulk.RECORD_BURST
    published: int = 3_000
    small: bool = False


SMALL = Size(
    tweets=64, slow_tweets=8, rounds=1, slow_rounds=1, single_tweets=4, bulk_rows=2_000, bulk_tweets=64, burst=500,
    published=100, small=True,
)  # fmt: skip


@dataclass(frozen=True)
class Figure:
    """A median with its least and greatest value, and the values behind it."""

    value: float
    least: float
    greatest: float
    details: dict[str, Any] = field(default_factory=dict)


class Measured:
    """An artifact to measure: its tweets, its engine in this process, and a system of workers around it."""

    def __init__(self, bench: "Bench", name: str, make: Callable[[Path], str]) -> None:
        self.bench, self.name = bench, name
        self.folder = bench.scratch / name
        self.sha256 = make(self.folder)
        artifact = load_artifact(self.folder, self.sha256)
        device = torch.device("cpu")
        folders = [choice_folder(self.folder, self.sha256, device, "auto")]
        run_trial(TrialRequest(str(self.folder), self.sha256, "cpu", "auto", list(map(str, folders))))
        engine, choice, _ = load_engine(artifact, device, "auto", folders)
        self.model = ScoringModel(0, artifact, engine, choice)
        self.operations_per_token = models.operations_per_token(artifact.model)

    @cached_property
    def system(self) -> System:
        return self.bench.stack.enter_context(
            System(self.bench.scratch / f"home-{self.name}", self.folder, self.sha256, LABELS)
        )

    def end_to_end(self) -> float:
        """Tweets a second from XADD to committed row."""
        count = self.bench.size.tweets
        return count / self.system.score(tweets(count, self.bench.source))

    @cached_property
    def batches(self) -> list[list[Batch]]:
        """The batches of a worker's windows: tokenised, without equal rows, sorted, padded."""
        windows = _chunks(self.model.tokenise(self.bench.texts), USUAL_WINDOW_TWEETS)
        cut = []
        for window in windows:
            rows = list(dict.fromkeys(map(tuple, window)))
            plan = plan_batches([len(row) for row in rows], token_budget=self.model.token_budget)
            cut.append([pad_arrays([rows[i] for i in batch], 0) for batch in plan])
        return cut

    def bare(self, engine: Engine | None = None) -> float:
        """Tweets a second of the engine alone; by default the one that serves."""
        began = perf_counter()
        for window in self.batches:
            (engine or self.model.engine).run(window)
        return len(self.bench.texts) / (perf_counter() - began)

    def bare_gops(self) -> float:
        """1e9 operations a second of the engine alone, padding included."""
        tokens = sum(ids.size for window in self.batches for ids, _ in window)
        return self.bare() / len(self.bench.texts) * tokens * self.operations_per_token / 1e9


class Bench:
    def __init__(self, size: Size, source: Path, environment: Path, stack: ExitStack) -> None:
        self.size, self.environment, self.stack = size, environment, stack
        self.scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tweetscore-")))
        self.all_tweets = source
        with source.open(encoding="utf-8") as lines:
            kept = list(islice(lines, size.tweets))
        self.source = self.scratch / "tweets.jsonl"
        self.source.write_text("".join(kept), encoding="utf-8")
        self.texts: list[str] = [json.loads(line)["text"] for line in kept]
        # A shorter file is cycled.
        self.texts = [self.texts[i % len(self.texts)] for i in range(size.tweets)]

    @cached_property
    def base(self) -> Measured:
        return Measured(self, "base", lambda folder: models.base_artifact(folder, self.size.small))

    @cached_property
    def starter(self) -> Measured:
        if self.size.small:
            return self.base  # a second system would prove nothing more
        return Measured(self, "starter", models.starter_artifact)

    def ratio(self, ours: Callable[[], float], theirs: Callable[[], float], rounds: int) -> Figure:
        """Ours over theirs, measured alternately after a warm-up of ours."""
        ours()
        pairs = [(ours(), theirs()) if i % 2 else (theirs(), ours())[::-1] for i in range(rounds)]
        ratios = [left / right for left, right in pairs]
        speeds = {
            "ours": statistics.median(left for left, _ in pairs),
            "theirs": statistics.median(right for _, right in pairs),
        }
        return Figure(statistics.median(ratios), min(ratios), max(ratios), speeds)

    # --- the figures, by the name of their key

    def end_to_end_over_pipeline(self) -> Figure:
        classify = peers.pipeline(self.base.folder, self.texts)
        return self.ratio(self.base.end_to_end, _speed(classify, self.texts), self.size.slow_rounds)

    def end_to_end_over_infinity(self) -> Figure:
        with peers.infinity(self.base.folder, self.texts, self.environment) as seconds:
            return self.ratio(self.base.end_to_end, lambda: len(self.texts) / seconds(), self.size.slow_rounds)

    def end_to_end_over_guide(self) -> Figure:
        # Spread over the file, so that the few have the same lengths as all.
        few = self.texts[:: max(1, len(self.texts) // self.size.slow_tweets)][: self.size.slow_tweets]
        label = peers.guide(self.base.folder, few)
        return self.ratio(self.base.end_to_end, _speed(label, few), self.size.slow_rounds)

    def end_to_end_over_bare(self) -> Figure:
        return self.ratio(self.base.end_to_end, self.base.bare, self.size.rounds)

    def end_to_end_over_bare_starter(self) -> Figure:
        return self.ratio(self.starter.end_to_end, self.starter.bare, 3 * self.size.rounds)

    def bare_over_matmul(self) -> Figure:
        kind: peers.Kind = {"int8": "int8", "bfloat16": "bf16"}.get(  # type: ignore[assignment]
            self.base.model.engine.name.partition("-")[2], "fp32"
        )
        return self.ratio(self.base.bare_gops, lambda: peers.matmul_gops(kind), self.size.rounds)

    def starter_last_layer_over_whole(self) -> Figure:
        return self._last_layer(self.starter)

    def base_last_layer_over_whole(self) -> Figure:
        return self._last_layer(self.base)

    def _last_layer(self, measured: Measured) -> Figure:
        whole = whole_engine(measured.folder, measured.model.engine.name)
        return self.ratio(measured.bare, lambda: measured.bare(whole), 3 * self.size.rounds)

    def tokenise_over_reference(self) -> Figure:
        tokenizer = load_artifact(self.starter.folder).tokenizer
        if self.starter.model.tokenise(self.texts) != _reference_ids(tokenizer, self.texts):
            raise AssertionError("the fast tokenizer gives other ids than BertJapaneseTokenizer")
        fast = TextEncoder(tokenizer)
        ours = _speed(lambda: fast(self.texts, 200), self.texts)
        return self.ratio(ours, _speed(lambda: encode(tokenizer, self.texts, 200), self.texts), 2 * self.size.rounds)

    def publish_over_celery(self) -> Figure:
        payloads = tweets(self.size.published, self.all_tweets)
        texts = [json.loads(payload)["text"] for payload in payloads]
        url = self.starter.system.server.url
        return self.ratio(
            lambda: len(payloads) / peers.stream_publish(url, payloads),
            lambda: len(texts) / peers.celery_delay(url, texts),
            self.size.rounds,
        )

    def million_rows_sqlite(self) -> Figure:
        return self._million_rows("sqlite")

    def million_rows_postgresql(self) -> Figure:
        return self._million_rows("postgresql")

    def _million_rows(self, kind: str) -> Figure:
        size, starter = self.size, self.starter
        with bulk.two_databases(kind) as urls:
            found = bulk.million_rows(
                self.scratch / f"million-{kind}", starter.folder, starter.sha256, LABELS, urls, self.all_tweets,
                rows=size.bulk_rows, tweets_a_round=size.bulk_tweets, rounds=size.rounds,
            )  # fmt: skip
        ratios = [full / empty for full, empty in zip(found["rounds"]["full"], found["rounds"]["empty"], strict=True)]
        return Figure(found["ratio"], min(ratios), max(ratios), found)

    def idle_extra_ms_p50(self) -> Figure:
        return self._idle(50)

    def idle_extra_ms_p99(self) -> Figure:
        return self._idle(99)

    def _idle(self, percent: int) -> Figure:
        lingering, woken = self.idle_extra_ms
        details = {"lingering_ms": _percentile(lingering, percent), "woken_ms": _percentile(woken, percent)}
        both = lingering + woken
        return Figure(_percentile(both, percent), min(both), max(both), details)

    @cached_property
    def idle_extra_ms(self) -> tuple[list[float], list[float]]:
        """Latency of one tweet minus its bare forward: a worker that lingers, and one that must be nudged."""
        with System(
            self.scratch / "home-woken", self.starter.folder, self.starter.sha256, LABELS,
            environment={"TWEETSCORE_LINGER_SECONDS": "0"},
        ) as asleep:  # fmt: skip
            return self._extra_ms(self.starter.system), self._extra_ms(asleep)

    def _extra_ms(self, system: System) -> list[float]:
        extra = []
        for payload in tweets(self.size.single_tweets + 3, self.all_tweets):
            rows = self.starter.model.tokenise([json.loads(payload)["text"]])
            self.starter.model.forward(rows)
            began = perf_counter()
            self.starter.model.forward(rows)
            bare = perf_counter() - began
            extra.append(1000 * (system.latency(payload) - bare))
        return extra[3:]

    def two_workers(self) -> Figure:
        with System(self.scratch / "home-two", self.starter.folder, self.starter.sha256, LABELS, scorers=2) as system:
            found = bulk.two_workers(system, self.all_tweets, self.size.tweets)
        twice = found["scored"] - found["published"]
        return Figure(twice, twice, twice, found)

    def burst_seconds(self) -> Figure:
        found = bulk.burst(self.starter.system, self.all_tweets, self.size.burst)
        return Figure(found["total_seconds"], found["total_seconds"], found["total_seconds"], found)


# The figures and their targets: at least, or at most where less is better.
AT_LEAST = {
    "end_to_end_over_pipeline": 8.0,
    "end_to_end_over_infinity": 3.5,
    "end_to_end_over_guide": 35.0,
    "end_to_end_over_bare": 0.93,
    "end_to_end_over_bare_starter": 0.90,
    "bare_over_matmul": 0.75,
    "starter_last_layer_over_whole": 1.15,
    "base_last_layer_over_whole": 1.0,
    "tokenise_over_reference": 5.0,
    "publish_over_celery": 40.0,
    "million_rows_sqlite": 0.9,
    "million_rows_postgresql": 0.9,
}
AT_MOST = {"idle_extra_ms_p50": 20.0, "idle_extra_ms_p99": 60.0, "two_workers": 0.0}
KEYS = [*AT_LEAST, *AT_MOST, "burst_seconds"]


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    size = SMALL if options.small else Size()
    found: dict[str, Figure] = {}
    with ExitStack() as stack:
        bench = Bench(size, options.tweets, options.infinity_environment, stack)
        for key in options.only or [key for key in KEYS if not (size.small and key == "end_to_end_over_infinity")]:
            print(f"measuring {key}", file=sys.stderr, flush=True)
            found[key] = getattr(bench, key)()
        machine = f"{hardware(torch.device('cpu'))}, {platform.system()}, Python {platform.python_version()}"
    print(machine)
    print(f"{'figure':32}{'median':>10}{'least':>10}{'greatest':>10}  asked")
    for key, figure in found.items():
        # The small form has no targets: too few tweets.
        asked = "" if size.small else f"{_asked(key)} {_reached(key, figure)}"
        print(f"{key:32}{figure.value:10.3f}{figure.least:10.3f}{figure.greatest:10.3f}  {asked}")
    if options.json:
        written: dict[str, Any] = {"machine": machine, "cores": os.cpu_count()}
        written |= {key: figure.value for key, figure in found.items()}
        written["details"] = {
            key: {"min": f.least, "max": f.greatest, **f.details} for key, f in found.items()
        }  # fmt: skip
        options.json.write_text(json.dumps(written, indent=2, default=str), encoding="utf-8")
    return 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.scoring", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures and their details")
    parser.add_argument("--only", action="append", choices=KEYS, metavar="NAME", help=f"one of {', '.join(KEYS)}")
    parser.add_argument("--small", action="store_true", help="as little as proves that everything runs")
    parser.add_argument(
        "--tweets", type=Path, metavar="FILE", default=REAL_TWEETS if REAL_TWEETS.is_file() else SAMPLE_TWEETS,
        help="JSONL with an id and a text a line",
    )  # fmt: skip
    parser.add_argument(
        "--infinity-environment", type=Path, metavar="FOLDER", help="where infinity-emb is installed, once",
        default=Path("~/.cache/tweetscore/infinity").expanduser(),
    )  # fmt: skip
    return parser.parse_args(arguments)


def _asked(key: str) -> str:
    if key in AT_LEAST:
        return f"at least {AT_LEAST[key]:g}"
    return f"at most {AT_MOST[key]:g}" if key in AT_MOST else ""


def _reached(key: str, figure: Figure) -> str:
    missed = figure.value < AT_LEAST.get(key, figure.value) or figure.value > AT_MOST.get(key, figure.value)
    return "" if not _asked(key) else "missed" if missed else "reached"


def _speed(work: Callable[[], object], texts: Sequence[str]) -> Callable[[], float]:
    """Texts a second of a function that works on all of them."""

    def measure() -> float:
        began = perf_counter()
        work()
        return len(texts) / (perf_counter() - began)

    return measure


def _reference_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    from training.text.cleaning import clean

    return encode(tokenizer, [clean(text) for text in texts], 200)


def _percentile(values: Sequence[float], percent: int) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def _chunks(rows: list[list[int]], size: int) -> Iterator[list[list[int]]]:
    return (rows[start : start + size] for start in range(0, len(rows), size))


if __name__ == "__main__":
    sys.exit(main())
