"""The contestants of a scoring benchmark: tweetscore's models, alone and as whole systems, and their peers.

Every contestant is a function that does one round and returns tweets a second. It is warmed up when it is built.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from itertools import cycle, islice
from pathlib import Path
from time import perf_counter

import numpy as np
import torch

from tests.benchmarks import models, peers
from tests.benchmarks.cpu import Cpu, Kind, Product, best_product
from tests.benchmarks.isolated import INFINITY, OPTIMUM, Isolated, isolated
from tests.benchmarks.last_layer import whole_engine
from tests.benchmarks.race import Speed
from tests.benchmarks.system import System, tweets
from training.evaluation.decisions import highest
from training.model.artifact import load_artifact
from training.model.batching import Batch
from training.model.cascade import CascadePart, CascadeSpec, save_cascade
from worker.engines.engine_selection import choice_folder, load_engine
from worker.engines.engine_trial import TrialRequest, run_trial
from worker.engines.engines import Engine
from worker.scoring.scoring_model import ScoringModel
from worker.scoring.window import USUAL_WINDOW_TWEETS

# A round of a slow contestant takes about this long, so that a slow CPU does not take all day; yet it has enough tweets
# for their lengths to be those of all.
ROUND_SECONDS = 4.0
LEAST_TWEETS = 192
LEAST_PEER_TWEETS = 128
# The share of the tweets that the measured cascade passes on to its teacher.
PASSED_ON = 0.2
GUIDE_TWEETS = 24  # every text costs the same there
# Settings of a peer are chosen by its speed on this many.
PROBE_TWEETS = 96


class Measured:
    """An artifact to measure: its tweets, its engine in this process, and systems of workers around it."""

    def __init__(self, scratch: Path, name: str, make: Callable[[Path], str], source: Path, most_tweets: int) -> None:
        self.scratch, self.name, self.source = scratch, name, source
        self.folder = scratch / name
        self.sha256 = make(self.folder)
        artifact = load_artifact(self.folder, self.sha256)
        device = torch.device("cpu")
        folders = [choice_folder(self.folder, self.sha256, device, "auto")]
        run_trial(TrialRequest(str(self.folder), self.sha256, "cpu", "auto", list(map(str, folders))))
        engine, choice, _ = load_engine(artifact, device, "auto", folders)
        self.model = ScoringModel(0, artifact, engine, choice)
        self._network = artifact.model
        self.texts = texts_of(source, most_tweets)
        if most_tweets > LEAST_TWEETS:
            few = Measured.bare_of(self, spread(self.texts, LEAST_TWEETS))
            few()
            self.texts = spread(self.texts, max(LEAST_TWEETS, int(ROUND_SECONDS * few())))
        # Seconds of cores per tweet, of every round of one scorer.
        self.cpu_seconds_a_tweet: list[float] = []
        self._systems: dict[int, System] = {}
        self._stack = ExitStack()

    def system(self, scorers: int = 1) -> System:
        """The system with so many scoring workers; started once."""
        if scorers not in self._systems:
            home = self.scratch / f"home-{self.name}-{scorers}"
            folder, sha256 = self.champion
            system = System(home, folder, sha256, models.LABELS, scorers=scorers)
            self._systems[scorers] = self._stack.enter_context(system)
        return self._systems[scorers]

    @property
    def champion(self) -> tuple[Path, str]:
        """Folder and digest of the artifact that the systems score with."""
        return self.folder, self.sha256

    def close(self) -> None:
        """Stop the systems."""
        self._systems.clear()
        self._stack.close()

    def end_to_end(self, scorers: int = 1) -> Speed:
        """From XADD to committed row."""
        system = self.system(scorers)

        def run() -> float:
            payloads = tweets(len(self.texts), self.texts)
            before = system.cpu_seconds()
            seconds = system.score(payloads)
            system.drain()
            if scorers == 1:
                self.cpu_seconds_a_tweet.append((system.cpu_seconds() - before) / len(payloads))
            return len(payloads) / seconds

        run()
        self.cpu_seconds_a_tweet.clear()
        return run

    def bare(self) -> Speed:
        """The engine alone."""
        run = self.bare_of(self.texts)
        run()
        return run

    def whole(self) -> Speed:
        """The same engine with a last layer that computes every position."""
        run = self.bare_of(self.texts, whole_engine(self.folder, self.model.engine.name))
        run()
        return run

    def bare_of(self, texts: Sequence[str], engine: Engine | None = None) -> Speed:
        """An engine, by default the one that serves."""
        windows = self.batches(texts)

        def run() -> float:
            began = perf_counter()
            for window in windows:
                (engine or self.model.engine).run(window)
            return len(texts) / (perf_counter() - began)

        return run

    def batches(self, texts: Sequence[str]) -> list[list[Batch]]:
        """The batches of a worker's windows: tokenised, without equal rows, sorted, padded."""
        cut = []
        for window in _chunks(self.model.tokenise(list(texts)), USUAL_WINDOW_TWEETS):
            rows = list(dict.fromkeys(map(tuple, window)))
            cut.append(self.model.engine.batches(rows, self.model.token_budget))
        return cut

    def product(self, products: dict[Kind, Product], cpu: Cpu) -> Speed:
        """The tweets a second whose matrix products, padding included, the CPU could do if nothing else was to be done:
        with the fastest plain product of the type that the engine multiplies in."""
        batches = [batch.arrays[0].shape for window in self.batches(self.texts) for batch in window]
        rows, tokens = sum(count for count, _ in batches), sum(count * length for count, length in batches)
        per_tweet = models.operations(self._network, tokens, rows) / len(self.texts)
        product = products.get(kind := self.kind(cpu)) or best_product(kind)
        return lambda: product.round() * 1e9 / per_tweet

    def kind(self, cpu: Cpu) -> Kind:
        """The type the engine multiplies in. Without int8 instructions its int8 weights become float32."""
        name = self.model.engine.name
        if "bf" in name:
            return "bf16"
        return "int8" if "int8" in name and cpu.has("int8") else "fp32"


class Cascade(Measured):
    """A cascade of two measured models, with a threshold that passes on `PASSED_ON` of the student's tweets."""

    def __init__(self, student: Measured, teacher: Measured) -> None:
        vars(self).update(vars(student))
        self.name = "cascade"
        self.cpu_seconds_a_tweet, self._systems, self._stack = [], {}, ExitStack()
        certain = highest(student.model.forward(student.model.tokenise(student.texts)).probabilities)
        # The only version of the systems' databases is that of the cascade.
        first, second = (CascadePart(1, part.folder.name, part.sha256, 1.0) for part in (student, teacher))
        spec = CascadeSpec(first, second, float(np.quantile(certain, PASSED_ON)), PASSED_ON, 1.0, "estimate", 0, [])
        folder = self.scratch / self.name
        self._champion = folder, save_cascade(folder, spec)

    @property
    def champion(self) -> tuple[Path, str]:
        return self._champion


class Peers:
    """The other ways to the same labels, over the artifact of a model and its tweets."""

    def __init__(self, measured: Measured, cpu: Cpu, environments: Path, stack: ExitStack) -> None:
        self._folder, self._texts = measured.folder, measured.texts
        self._cpu, self._environments, self._stack = cpu, environments, stack
        # What each contestant was measured with.
        self.settings: dict[str, str] = {}

    def pipeline(self) -> Speed:
        self.settings["pipeline"] = str(peers.PipelineSettings())
        return self._speed(_timed(peers.pipeline(self._folder)), LEAST_PEER_TWEETS)

    def best_pipeline(self) -> Speed:
        few = spread(self._texts, PROBE_TWEETS)
        settings, classify = peers.best_pipeline(self._folder, few, bf16=self._cpu.has("bf16"))
        self.settings["best_pipeline"] = str(settings)
        return self._speed(_timed(classify), LEAST_TWEETS)

    def guide(self) -> Speed:
        self.settings["guide"] = "float32, batches of 8, padded to 200 tokens"
        return self._speed(_timed(peers.guide(self._folder)), GUIDE_TWEETS, GUIDE_TWEETS)

    def infinity(self) -> Speed:
        return self._isolated(INFINITY)

    def optimum(self) -> Speed:
        return self._isolated(OPTIMUM)

    def _isolated(self, kind: Isolated) -> Speed:
        few = spread(self._texts, PROBE_TWEETS)
        peer = self._stack.enter_context(isolated(kind, self._folder, few, self._environments))
        self.settings[kind.name] = peer.settings
        return self._speed(peer.seconds, LEAST_TWEETS)

    def _speed(self, seconds: Callable[[Sequence[str]], float], least: int, most: int | None = None) -> Speed:
        """Rounds of as many tweets as a round's time allows."""
        texts = spread(self._texts, least)
        speed = len(texts) / seconds(texts)
        texts = spread(self._texts, min(most or len(self._texts), max(least, int(ROUND_SECONDS * speed))))
        return lambda: len(texts) / seconds(texts)


def _timed(classify: peers.Classify) -> Callable[[Sequence[str]], float]:
    def seconds(texts: Sequence[str]) -> float:
        began = perf_counter()
        classify(texts)
        return perf_counter() - began

    return seconds


def texts_of(source: Path, n: int) -> list[str]:
    """The texts of a JSONL file whose lines have a `text`; a shorter file is cycled."""
    with source.open(encoding="utf-8") as lines:
        kept = [json.loads(line)["text"] for line in islice(lines, n) if line.strip()]
    return list(islice(cycle(kept), n))


def spread(texts: Sequence[str], n: int) -> list[str]:
    """`n` of the texts, evenly over all, so that the few have the same lengths as all; all if there are no more."""
    n = min(n, len(texts))
    return [texts[i * len(texts) // n] for i in range(n)]


def _chunks(rows: list[list[int]], size: int) -> Iterator[list[list[int]]]:
    return (rows[start : start + size] for start in range(0, len(rows), size))
