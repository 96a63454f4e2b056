"""Speed of scoring compared with other ways on the same machine: `python -m tests.benchmarks.scoring`.

It first measures what the CPU can do. Then contestants take turns. Every figure is a ratio of two speeds of the same
round, a cost or a latency: median, least and greatest. A ratio that is settled is not measured again.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from time import perf_counter
from typing import TypeVar

from transformers import PreTrainedTokenizerBase

from tests.benchmarks import bulk, models, peers, report
from tests.benchmarks.contestants import Cascade, Measured, Peers
from tests.benchmarks.cpu import KINDS, Kind, Product, best_product, this_cpu
from tests.benchmarks.isolated import ENVIRONMENTS, NotInstalled
from tests.benchmarks.models import LABELS
from tests.benchmarks.race import Figure, Pair, Round, Speed, figure, race, ratio
from tests.benchmarks.system import System, tweets
from tests.support.paths import tweets_file
from training.model.artifact import load_artifact
from training.text.cleaning import clean
from training.text.tokenizer import TextEncoder, encode

T = TypeVar("T")


@dataclass(frozen=True)
class Size:
    """The amount of work: in full, or as little as proves that everything runs."""

    base_tweets: int = 1_000
    starter_tweets: int = 3_000
    rounds: int = 4
    fast_rounds: int = 8  # of contestants whose round takes a second or two
    single_tweets: int = 200
    bulk_rows: int = bulk.MILLION
    bulk_tweets: int = 2_048
    burst: int = bulk.RECORD_BURST
    burst_seconds: float = 40.0  # a burst has no more tweets than the engine does in this time
    published: int = 3_000
    repeats: int = 15
    small: bool = False


SMALL = Size(
    base_tweets=64, starter_tweets=64, rounds=1, fast_rounds=1, single_tweets=4, bulk_rows=2_000, bulk_tweets=64,
    burst=500, published=100, repeats=1, small=True,
)  # fmt: skip

# Contestants at BERT-base size: ours over theirs. Other ways to score at base size, such as a cascade, are one more
# contestant (`Bench.contestant`) and one more ratio over the pipeline.
BASE_RATIOS: dict[str, Pair] = {
    "end_to_end_over_pipeline": ("base", "pipeline"),
    "end_to_end_over_best_pipeline": ("base", "best_pipeline"),
    "end_to_end_over_optimum": ("base", "optimum"),
    "end_to_end_over_infinity": ("base", "infinity"),
    "end_to_end_over_guide": ("base", "guide"),
    "end_to_end_over_bare": ("base", "base_engine"),
    "bare_over_matmul": ("base_engine", "base_product"),
    "base_last_layer_over_whole": ("base_engine", "base_whole"),
    "student_over_pipeline": ("starter", "pipeline"),
    "student_over_teacher": ("starter", "base"),
    "cascade_over_pipeline": ("cascade", "pipeline"),
    "cascade_over_teacher": ("cascade", "base"),
}
STARTER_RATIOS: dict[str, Pair] = {
    "end_to_end_over_bare_starter": ("starter", "starter_engine"),
    "bare_over_matmul_starter": ("starter_engine", "starter_product"),
    "starter_last_layer_over_whole": ("starter_engine", "starter_whole"),
}
SCORERS = [count for count in (2, 4) if count <= max(2, os.cpu_count() or 1)]
for count in SCORERS:
    BASE_RATIOS[f"scorers_{count}_over_1_base"] = (f"base_x{count}", "base")
    STARTER_RATIOS[f"scorers_{count}_over_1_starter"] = (f"starter_x{count}", "starter")
# Measured one by one, in this order, each by the method of its name.
SINGLE = (
    "core_hours_a_million_base", "core_hours_a_million_starter", "tokenise_over_reference", "publish_over_celery",
    "idle_extra_ms_p50", "idle_extra_ms_p99", "two_workers", "burst_seconds", "million_rows_sqlite",
    "million_rows_postgresql",
)  # fmt: skip
KEYS = [*BASE_RATIOS, *STARTER_RATIOS, *SINGLE]
# Without their packages, which are downloaded, these figures are left out.
ISOLATED = ("end_to_end_over_infinity", "end_to_end_over_optimum")


class Bench:
    def __init__(self, size: Size, source: Path, environments: Path, stack: ExitStack) -> None:
        self.size, self.source, self.stack = size, source, stack
        self.environments = environments
        self.scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tweetscore-")))
        self.cpu = this_cpu()
        # Contestants that could not be measured, with the reason; and the seconds of each part.
        self.missing: dict[str, str] = {}
        self.seconds: dict[str, float] = {}
        self.rounds: dict[str, list[Round]] = {}

    @cached_property
    def products(self) -> dict[Kind, Product]:
        # Without its instructions bfloat16 is emulated, which says nothing and takes minutes.
        kinds = [kind for kind in KINDS if kind != "bf16" or self.cpu.has("bf16")]
        return {kind: best_product(kind, self.size.repeats) for kind in kinds}

    @cached_property
    def base(self) -> Measured:
        make = partial(models.base_artifact, small=self.size.small)
        return self._measured("base", make, self.size.base_tweets)

    @cached_property
    def starter(self) -> Measured:
        if self.size.small:
            return self.base  # a second system would prove nothing more
        return self._measured("starter", models.starter_artifact, self.size.starter_tweets)

    def _measured(self, name: str, make: Callable[[Path], str], most_tweets: int) -> Measured:
        measured = self.timed(f"prepare {name}", lambda: Measured(self.scratch, name, make, self.source, most_tweets))
        self.stack.callback(measured.close)
        return measured

    @cached_property
    def cascade(self) -> Cascade:
        cascade = Cascade(self.starter, self.base)
        self.stack.callback(cascade.close)
        return cascade

    @cached_property
    def peers(self) -> Peers:
        return Peers(self.base, self.cpu, self.environments, self.stack)

    def timed(self, part: str, work: Callable[[], T]) -> T:
        print(f"{part} ...", file=sys.stderr, flush=True)
        began = perf_counter()
        try:
            return work()
        finally:
            self.seconds[part] = perf_counter() - began
            print(f"{part}: {self.seconds[part]:.0f} s", file=sys.stderr, flush=True)

    # --- contestants in turns

    def contestant(self, name: str) -> Speed:
        """A contestant by its name, warmed up. Raises `NotInstalled`."""
        model, _, form = name.partition("_")
        if model not in ("base", "starter", "cascade"):
            found: Speed = getattr(self.peers, name)()
            return found
        measured: Measured = getattr(self, model)
        if form == "engine":
            return measured.bare()
        if form == "whole":
            return measured.whole()
        if form == "product":
            return measured.product(self.products, self.cpu)
        return measured.end_to_end(int(form.removeprefix("x") or 1))

    def race(self, part: str, ratios: dict[str, Pair], most_rounds: int) -> dict[str, Figure]:
        speeds: dict[str, Speed] = {}
        for name in dict.fromkeys(name for pair in ratios.values() for name in pair):
            try:
                speeds[name] = self.timed(f"start {name}", partial(self.contestant, name))
            except NotInstalled as error:
                self.missing[name] = str(error)
        kept = {key: pair for key, pair in ratios.items() if not self.missing.keys() & set(pair)}
        rounds = self.timed(f"race {part}", lambda: race(speeds, kept.values(), most_rounds))
        self.rounds[part] = rounds
        return {key: ratio(rounds, pair) for key, pair in kept.items()}

    def alternate(self, ours: Speed, theirs: Speed) -> Figure:
        pair = ("ours", "theirs")
        return ratio(race({"ours": ours, "theirs": theirs}, [pair], self.size.fast_rounds), pair)

    # --- the figures that are no race, by the name of their key

    def core_hours_a_million_base(self) -> Figure:
        return self._core_hours(self.base, self.size.rounds)

    def core_hours_a_million_starter(self) -> Figure:
        return self._core_hours(self.starter, self.size.fast_rounds)

    def _core_hours(self, measured: Measured, rounds: int) -> Figure:
        """Of cores, not of the clock: all processes, end to end. The races have measured it already."""
        if not measured.cpu_seconds_a_tweet:
            speed = measured.end_to_end()
            for _ in range(min(3, rounds)):
                speed()
        hours = [seconds * 1e6 / 3600 for seconds in measured.cpu_seconds_a_tweet]
        return figure(hours, {"engine": measured.model.engine.name})

    def tokenise_over_reference(self) -> Figure:
        tokenizer, texts = load_artifact(self.starter.folder).tokenizer, self.starter.texts[: self.size.base_tweets]
        if self.starter.model.tokenise(texts) != _reference_ids(tokenizer, texts):
            raise AssertionError("the fast tokenizer gives other ids than BertJapaneseTokenizer")
        fast = TextEncoder(tokenizer)
        return self.alternate(
            _speed(lambda: fast(texts, 200), texts), _speed(lambda: encode(tokenizer, texts, 200), texts)
        )

    def publish_over_celery(self) -> Figure:
        payloads = tweets(self.size.published, self.source)
        texts = [json.loads(payload)["text"] for payload in payloads]
        url = self.starter.system().server.url
        return self.alternate(
            lambda: len(payloads) / peers.stream_publish(url, payloads),
            lambda: len(texts) / peers.celery_delay(url, texts),
        )

    def million_rows_sqlite(self) -> Figure:
        return self._million_rows("sqlite")

    def million_rows_postgresql(self) -> Figure:
        return self._million_rows("postgresql")

    def _million_rows(self, kind: str) -> Figure:
        size, starter = self.size, self.starter
        with bulk.two_databases(kind) as urls:
            found = bulk.million_rows(
                self.scratch / f"million-{kind}", starter.folder, starter.sha256, LABELS, urls, self.source,
                rows=size.bulk_rows, tweets_a_round=size.bulk_tweets, rounds=size.rounds,
            )  # fmt: skip
        ratios = [full / empty for full, empty in zip(found["rounds"]["full"], found["rounds"]["empty"], strict=True)]
        return Figure(found["ratio"], min(ratios), max(ratios), len(ratios), found)

    def idle_extra_ms_p50(self) -> Figure:
        return self._idle(50)

    def idle_extra_ms_p99(self) -> Figure:
        return self._idle(99)

    def _idle(self, percent: int) -> Figure:
        lingering, woken = self.idle_extra_ms
        details = {"lingering_ms": _percentile(lingering, percent), "woken_ms": _percentile(woken, percent)}
        both = lingering + woken
        return Figure(_percentile(both, percent), min(both), max(both), len(both), details)

    @cached_property
    def idle_extra_ms(self) -> tuple[list[float], list[float]]:
        """Latency of one tweet minus its bare forward: a worker that lingers, and one that must be nudged."""
        with System(
            self.scratch / "home-woken", self.starter.folder, self.starter.sha256, LABELS,
            environment={"TWEETSCORE_LINGER_SECONDS": "0"},
        ) as asleep:  # fmt: skip
            return self._extra_ms(self.starter.system()), self._extra_ms(asleep)

    def _extra_ms(self, system: System) -> list[float]:
        extra = []
        for payload in tweets(self.size.single_tweets + 3, self.source):
            rows = self.starter.model.tokenise([json.loads(payload)["text"]])
            self.starter.model.forward(rows)
            began = perf_counter()
            self.starter.model.forward(rows)
            bare = perf_counter() - began
            extra.append(1000 * (system.latency(payload) - bare))
        return extra[3:]

    def two_workers(self) -> Figure:
        found = bulk.two_workers(self.starter.system(2), self.source, self.size.base_tweets)
        twice = found["scored"] - found["published"]
        return Figure(twice, twice, twice, 1, found)

    def burst_seconds(self) -> Figure:
        size = self.size
        count = size.burst if size.small else min(size.burst, int(size.burst_seconds * self.starter.bare()()))
        found = bulk.burst(self.starter.system(), self.source, count)
        return Figure(found["total_seconds"], found["total_seconds"], found["total_seconds"], 1, found)


def measure(bench: Bench, keys: Sequence[str]) -> dict[str, Figure]:
    """The figures that can be measured here, in the order of `KEYS`."""
    found: dict[str, Figure] = {}
    bench.timed("products", lambda: bench.products)
    if base := {key: pair for key, pair in BASE_RATIOS.items() if key in keys}:
        found |= bench.race("base", base, bench.size.rounds)
    if "core_hours_a_million_base" in keys:
        found["core_hours_a_million_base"] = bench.core_hours_a_million_base()
    for name in ("base", "cascade"):
        if not bench.size.small and name in vars(bench):
            getattr(bench, name).close()  # frees memory, and cores that its workers poll with
    if starter := {key: pair for key, pair in STARTER_RATIOS.items() if key in keys}:
        found |= bench.race("starter", starter, bench.size.fast_rounds)
    for key in SINGLE:
        if key in keys and key not in found:
            found[key] = bench.timed(key, getattr(bench, key))
    return {key: found[key] for key in KEYS if key in found}


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    size = SMALL if options.small else Size()
    keys = options.only or [key for key in KEYS if not (size.small and key in ISOLATED)]
    began = perf_counter()
    with ExitStack() as stack:
        bench = Bench(size, options.tweets, options.environments, stack)
        found = measure(bench, keys)
        result = report.Result(
            bench.cpu, bench.products, found, bench.rounds, bench.seconds, bench.missing,
            engines={name: vars(bench)[name].model.engine.name for name in ("base", "starter") if name in vars(bench)},
            settings=bench.peers.settings if "peers" in vars(bench) else {},
        )  # fmt: skip
    # The small form has no targets: too few tweets.
    print(report.markdown(result, targets=not size.small))
    print(f"{perf_counter() - began:.0f} s in all", file=sys.stderr)
    if options.json:
        options.json.write_text(json.dumps(report.as_json(result), indent=2, default=str), encoding="utf-8")
    return 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.scoring", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures and their details")
    parser.add_argument("--only", action="append", choices=KEYS, metavar="NAME", help=f"one of {', '.join(KEYS)}")
    parser.add_argument("--small", action="store_true", help="as little as proves that everything runs")
    parser.add_argument(
        "--tweets", type=Path, metavar="FILE", default=tweets_file(),
        help="JSONL with an id and a text a line",
    )  # fmt: skip
    parser.add_argument(
        "--environments", type=Path, metavar="FOLDER", default=ENVIRONMENTS,
        help="where infinity-emb and optimum-intel are installed, once",
    )  # fmt: skip
    return parser.parse_args(arguments)


def _speed(work: Callable[[], object], texts: Sequence[str]) -> Speed:
    """Texts a second of a function that works on all of them."""

    def run() -> float:
        began = perf_counter()
        work()
        return len(texts) / (perf_counter() - began)

    return run


def _reference_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    return encode(tokenizer, [clean(text) for text in texts], 200)


def _percentile(values: Sequence[float], percent: int) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


if __name__ == "__main__":
    sys.exit(main())
