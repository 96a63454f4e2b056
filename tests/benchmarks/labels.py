"""How right a model is about real tweets, by the number of own labels: `python -m tests.benchmarks.labels`.

Needs 898 labelled real tweets beside the project, which are no part of it. They are split once, by the digest of their
ids, into a pool of 450, from which own labels are drawn, and 448 test tweets, on which nothing is fitted, chosen or
tuned. Every figure is macro-F1 on the test tweets: a mean of seeds with their standard deviation.
"""

import argparse
import csv
import hashlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from tests.benchmarks import setfit, trainers
from tests.support.paths import ROOT
from training.config import TrainConfig, make_config
from training.data import sample
from training.data.dataset import Dataset, Rows, Split, read_rows, split_rows
from training.evaluation.calibration import calibration_error, fit_temperature
from training.evaluation.decisions import Floats, to_probabilities
from training.evaluation.metrics import metrics
from training.evaluation.to_label import parts, pick_to_label, spread_over
from training.jobs.run import Prepared, prepare
from training.loop.checkpoints import Checkpoints
from training.loop.fit import Hooks, fit
from training.loop.predict import predict
from training.loop.sample_base import sample_trained
from training.model.base_model import STARTER, BaseModelFolder, resolve_base_model
from training.model.devices import pick_device
from training.store.cache import Cache
from training.text.cleaning import clean
from training.text.tokenizer import TextEncoder
from worker.cli.options import pairs
from worker.labelling.review import RANDOM_SHARE

LABELLED = ROOT.parent / "shared" / "data" / "tweets-2011-labelled.csv"
LABELS = ["negative", "neutral", "positive"]
POOL_ROWS = 450
COUNTS = (0, 50, 100, 200, 450)
SEEDS = (1, 2, 3, 4, 5)


@dataclass(frozen=True)
class Tweets:
    texts: list[str]
    labels: list[str]

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, index: Sequence[int]) -> "Tweets":
        return Tweets([self.texts[i] for i in index], [self.labels[i] for i in index])

    def __add__(self, other: "Tweets") -> "Tweets":
        return Tweets(self.texts + other.texts, self.labels + other.labels)

    @property
    def targets(self) -> Floats:
        return np.eye(len(LABELS), dtype=np.float32)[[LABELS.index(label) for label in self.labels]]

    @property
    def split(self) -> Split:
        return Split([clean(text) for text in self.texts], self.targets, list(range(len(self))))


def pool_and_test(path: Path) -> tuple[Tweets, Tweets]:
    """The tweets that own labels are drawn from, and those that are only measured on."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = sorted(csv.DictReader(file), key=lambda row: hashlib.sha256(row["id"].encode()).hexdigest())
    pool, test = rows[:POOL_ROWS], rows[POOL_ROWS:]
    return tuple(Tweets([r["text"] for r in part], [r["label"] for r in part]) for part in (pool, test))  # type: ignore[return-value]


def sample_tweets() -> Tweets:
    rows = read_rows(sample.LABELLED)
    return Tweets(rows.texts, rows.labels)


class Bench:
    """The ways to a model; each returns logits or scores (N, K) of the test tweets from own labels and a seed."""

    def __init__(
        self, encoder: BaseModelFolder, options: dict[str, Any], scratch: Path, labelled: Path = LABELLED
    ) -> None:
        self.encoder, self.options, self.scratch = encoder, options, scratch
        self.cache = Cache(scratch / "cache", 10**10)
        self.pool, self.test = pool_and_test(labelled)
        self.sample = sample_tweets()
        self._known: dict[tuple[tuple[int, ...], int], tuple[Floats, Floats]] = {}

    def draw(self, count: int, seed: int) -> list[int]:
        return [int(i) for i in np.random.default_rng(seed).permutation(len(self.pool))[:count]]

    # --- what a user gets by default: a job with the preset `fast`, which learns the sample before few own labels

    def default(self, count: int, seed: int) -> Floats:
        return self._ours(self.draw(count, seed), seed)[0]

    def chosen(self, count: int, seed: int) -> Floats:
        """As `default`, but the product chooses what to label, from the probabilities of the model without labels."""
        if count in (0, len(self.pool)):
            return self.default(count, seed)
        return self._ours(pick_to_label(self.pool.texts, self._unlearned(seed), count, seed), seed)[0]

    def review(self, count: int, seed: int) -> Floats:
        """As `chosen`, but as `tweetscore review` picks without a challenger; the tweets have no topics."""
        if count in (0, len(self.pool)):
            return self.default(count, seed)
        return self._ours(self.review_picks(count, seed), seed)[0]

    def review_picks(self, count: int, seed: int) -> list[int]:
        """Rows of the pool: a random half, then a spread over the rest, then the least certain of what is left."""
        wanted, probabilities = parts(count, RANDOM_SHARE, ["uncertain", "spread"]), self._unlearned(seed)
        picked = self.draw(wanted["random"], seed)
        for reason in ("spread", "uncertain"):
            rest = [i for i in range(len(self.pool)) if i not in picked]
            texts = [self.pool.texts[i] for i in rest]
            if reason == "spread":
                found = spread_over(texts, [None] * len(rest), wanted[reason], seed)
            else:
                found = pick_to_label(texts, probabilities[rest], wanted[reason], seed)
            picked = [*picked, *(rest[i] for i in found)]
        return picked

    def _unlearned(self, seed: int) -> Floats:
        """Probabilities (N, K) of the pool by the model without own labels."""
        probabilities: Floats = to_probabilities(torch.from_numpy(self._ours([], seed)[1]), "single_label").numpy()
        return probabilities

    def _ours(self, own: Sequence[int], seed: int) -> tuple[Floats, Floats]:
        """Logits of the test tweets and of the pool."""
        known = self._known.get((tuple(own), seed))
        if known is not None:
            return known
        config = make_config("fast", base_model=self.encoder.name, seed=seed, **self.options)
        tweets = self.pool.take(own) if len(own) else self.sample
        data = split_rows(Rows(tweets.texts, tweets.labels, list(range(len(tweets)))), config)
        with tempfile.TemporaryDirectory(dir=self.scratch) as folder, self.learned(data, config, folder) as base:
            prepared = prepare(base, data, config.for_rows(len(data.train)), "cpu")
            fit(
                prepared.model, prepared.fit_inputs(data), device=prepared.device, hooks=Hooks(),
                checkpoints=Checkpoints(Path(folder) / "job"), board_folder=Path(folder) / "board",
            )  # fmt: skip
        logits = self._logits(prepared, self.test), self._logits(prepared, self.pool)
        self._known[tuple(own), seed] = logits
        return logits

    def learned(self, data: Dataset, config: TrainConfig, folder: str) -> AbstractContextManager[BaseModelFolder]:
        checkpoints, device = Checkpoints(Path(folder) / "sample"), pick_device("cpu")
        return sample_trained(
            self.cache, self.encoder, data, config, device, checkpoints, lambda *step: None, lambda *rows: None
        )

    def _logits(self, prepared: Prepared, tweets: Tweets) -> Floats:
        config = prepared.config
        rows = TextEncoder(prepared.tokenizer)(
            [clean(text, config.cleaner) for text in tweets.texts], config.max_length
        )
        pad_id = prepared.tokenizer.pad_token_id
        return predict(prepared.model, rows, tweets.targets, config, 64, pad_id, prepared.device).logits

    # --- other ways on the same rows: the sample's and the own

    def tfidf(self, count: int, seed: int) -> Floats:
        train = self.sample + self.pool.take(self.draw(count, seed))
        vectors = TfidfVectorizer(analyzer="char", ngram_range=(1, 4), sublinear_tf=True)
        model = LogisticRegression(C=10.0, max_iter=1_000)
        model.fit(vectors.fit_transform(map(clean, train.texts)), train.labels)
        scores: Floats = model.predict_log_proba(vectors.transform(map(clean, self.test.texts))).astype(np.float32)
        return scores  # scikit-learn sorts the labels as LABELS are sorted

    def trainer(self, count: int, seed: int) -> Floats:
        """The Hugging Face Trainer with the epochs, batches and learning rate of the preset."""
        train = self.sample + self.pool.take(self.draw(count, seed))
        config = make_config("fast", seed=seed, **self.options).for_rows(len(train))
        _, logits = trainers.hugging_face(self.encoder.folder, train.split, self.test.split, config, LABELS)
        assert logits is not None
        return logits

    def setfit(self, count: int, seed: int) -> Floats:
        """SetFit on the own labels alone, in an environment of its own; it is made for few labels."""
        own = self.pool.take(self.draw(count, seed))
        targets = own.targets.argmax(axis=1).tolist()
        return setfit.fitted(self.encoder.folder, own.texts, targets, self.test.texts, LABELS, seed)

    # --- figures

    def f1(self, logits: Floats) -> float:
        probabilities = to_probabilities(torch.from_numpy(logits), "single_label").numpy()
        return metrics(self.test.targets, probabilities, LABELS, "single_label")["f1_macro", ""]

    def scaled_error(self, seed: int) -> float:
        """Expected calibration error on the test tweets of the model without own labels, scaled on the pool."""
        test, pool = self._ours([], seed)
        temperature = fit_temperature(pool, self.pool.targets, "single_label")
        probabilities = to_probabilities(torch.from_numpy(test), "single_label", temperature).numpy()
        return calibration_error(self.test.targets, probabilities, "single_label")


WAYS = {
    "default": "tweetscore, labels drawn at random",
    "chosen": "tweetscore, labels chosen by it",
    "review": "tweetscore, labels picked by review",
    "trainer": "Hugging Face Trainer",
    "tfidf": "TF-IDF and logistic regression",
    "setfit": "SetFit, own labels alone",
}


@dataclass(frozen=True)
class Point:
    """Macro-F1 of the seeds for one way and number of own labels."""

    way: str
    labels: int
    values: list[float]

    @property
    def mean(self) -> float:
        return statistics.mean(self.values)

    @property
    def spread(self) -> float:
        return statistics.stdev(self.values) if len(self.values) > 1 else 0.0


def measure(bench: Bench, ways: Sequence[str], counts: Sequence[int], seeds: Sequence[int]) -> list[Point]:
    points = []
    for way in ways:
        run: Callable[[int, int], Floats] = getattr(bench, way)
        for count in counts:
            if way == "setfit" and count == 0:
                continue
            began = time.monotonic()
            # TF-IDF without own labels, and with all of them, has nothing that a seed could change.
            drawn = seeds[:1] if way == "tfidf" and count in (0, len(bench.pool)) else seeds
            try:
                points.append(Point(way, count, [bench.f1(run(count, seed)) for seed in drawn]))
            except setfit.CannotInstall as error:
                say(f"{WAYS[way]}: left out, {error}")
                break
            shown, seconds = points[-1], (time.monotonic() - began) / len(drawn)
            say(f"{WAYS[way]}, {count} own labels: {shown.mean:.3f} (sd {shown.spread:.3f}), {seconds:.0f} s a seed")
    return points


def table(points: Sequence[Point], counts: Sequence[int]) -> str:
    """A Markdown table: mean and standard deviation by way and number of own labels."""
    found = {(point.way, point.labels): point for point in points}
    lines = ["| own labels | " + " | ".join(map(str, counts)) + " |", "|---" * (len(counts) + 1) + "|"]
    for way in dict.fromkeys(point.way for point in points):
        cells = [f"{p.mean:.3f} ± {p.spread:.3f}" if (p := found.get((way, n))) else "" for n in counts]
        lines.append(f"| {WAYS[way]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(points: Sequence[Point], path: Path, encoder: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for way in dict.fromkeys(point.way for point in points):
        of_way = [point for point in points if point.way == way]
        axes.errorbar(
            [p.labels for p in of_way], [p.mean for p in of_way], [p.spread for p in of_way],
            marker="o", capsize=3, label=WAYS[way],
        )  # fmt: skip
    axes.set(xlabel="own labels", ylabel="macro-F1 on 448 real tweets", title=f"Encoder: {encoder}")
    axes.set_ylim(0.4, 0.8)  # the same in every picture, so that pictures can be compared
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(str(path), dpi=120)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", default=STARTER, help="a base model: starter, a folder or a hub name")
    parser.add_argument("--ways", default=",".join(WAYS), help=f"some of {', '.join(WAYS)}")
    parser.add_argument("--counts", type=numbers, default=list(COUNTS), help="numbers of own labels")
    parser.add_argument("--seeds", type=numbers, default=list(SEEDS))
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a field of the preset `fast`")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--picture", type=Path, help="draw them into this file")
    given = parser.parse_args()
    if not LABELLED.is_file():
        sys.exit(f"{LABELLED} is missing: this benchmark needs labelled real tweets, which are no part of the project")
    encoder, ways = resolve_base_model(given.encoder, None, [Path("/")]), given.ways.split(",")
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(encoder, pairs("--set", given.set), Path(scratch))
        points = measure(bench, ways, given.counts, given.seeds)
        errors = [bench.scaled_error(seed) for seed in given.seeds] if "default" in ways and 0 in given.counts else []
    print(table(points, given.counts))
    if errors:
        print(f"\nexpected calibration error without own labels, scaled on the pool: {statistics.mean(errors):.3f}")
    if given.json:
        written = {"points": [asdict(point) for point in points], "calibration_errors": errors}
        given.json.write_text(json.dumps(written, indent=2), encoding="utf-8")
    if given.picture:
        draw(points, given.picture, given.encoder)


if __name__ == "__main__":
    main()
