"""How fast and how well a model is fine-tuned, beside other ways: `python -m tests.benchmarks.training`.

Speeds are ratios of training runs taken in turns, each in a process of its own: medians with their least and greatest.
Quality is of the starter encoder on JRTE rows, where they lie beside the project: fitted on the training rows, measured
on the development rows, a mean of seeds.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from transformers import BertConfig, BertModel

from tests.benchmarks import models, trainers
from tests.support.paths import ROOT, tweets_file
from training.config import TrainConfig, make_config
from training.data.dataset import Rows, Split, read_rows, split_rows
from training.evaluation.calibration import fit_temperature
from training.evaluation.metrics import model_figures
from training.loop.checkpoints import Checkpoints
from training.loop.fit import FitInputs, Hooks, fit
from training.loop.predict import predict
from training.model.base_model import STARTER, STARTER_FOLDER, BaseModelFolder
from training.model.classifier import build_model
from training.text.cleaning import clean
from training.text.tokenizer import TextEncoder, load_tokenizer
from worker.engines.engines import hardware

JRTE = ROOT.parent / "shared" / "data"
STRENGTHS = (1.0, 3.0, 10.0, 30.0, 100.0)

AT_LEAST = {
    "over_trainer_base": 2.5, "over_trainer_starter": 1.5, "over_guide_base": 8.0, "f1_minus_trainer": -0.005,
    "f1_minus_tfidf_2": 0.04, "f1_minus_tfidf_3": 0.045,
}  # fmt: skip
AT_MOST = {"memory_over_trainer": 1.0, "ece_2": 0.04, "ece_3": 0.04}
SPEEDS = ("over_trainer_base", "over_guide_base", "memory_over_trainer", "over_trainer_starter")
QUALITIES = ("f1_minus_tfidf_2", "ece_2", "f1_minus_tfidf_3", "ece_3", "f1_minus_trainer")
KEYS = (*SPEEDS, *QUALITIES)


@dataclass(frozen=True)
class Size:
    """How much is measured: in full, or as little as shows that all of it runs."""

    base_texts: int = 320
    guide_texts: int = 32  # every text costs the same there, and ten times what it costs elsewhere
    starter_texts: int = 1_024
    rounds: int = 3
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    quality_rows: int | None = None
    overrides: dict[str, Any] = field(default_factory=dict)
    small: bool = False


SMALL = Size(32, 4, 32, 1, (1,), 200, {"epochs": 1}, small=True)


@dataclass(frozen=True)
class Figure:
    """A median, or a mean of seeds, with its least and greatest, and what lies behind it."""

    value: float
    least: float
    greatest: float
    details: dict[str, Any]


class Speeds:
    """Runs of each way on each encoder, in turns."""

    def __init__(self, size: Size, source: Path, scratch: Path) -> None:
        self.size, self.scratch = size, scratch
        with source.open(encoding="utf-8") as lines:
            self._texts = [" ".join(json.loads(line)["text"].split()) for line in lines]

    def figures(self) -> dict[str, Figure]:
        base, starter = self._base(), STARTER_FOLDER
        size = self.size
        runs: dict[str, list[dict[str, float]]] = {}
        for _ in range(size.rounds):
            for name, folder, texts, batch_size in (
                ("ours base", base, size.base_texts, 16),
                ("trainer base", base, size.base_texts, 16),
                ("guide base", base, size.guide_texts, 16),
                ("ours starter", starter, size.starter_texts, 16),
                ("trainer starter", starter, size.starter_texts, 16),
            ):
                runs.setdefault(name, []).append(self._run(name.split()[0], folder, texts, batch_size))
        return {
            "over_trainer_base": _ratio(runs, "ours base", "trainer base", "samples_per_second"),
            "over_guide_base": _ratio(runs, "ours base", "guide base", "samples_per_second"),
            "memory_over_trainer": _ratio(runs, "ours base", "trainer base", "peak_mb"),
            "over_trainer_starter": _ratio(runs, "ours starter", "trainer starter", "samples_per_second"),
        }

    def _base(self) -> Path:
        """A BERT of base size with random weights and the starter's tokenizer."""
        folder = self.scratch / "base"
        torch.manual_seed(1)
        BertModel(
            BertConfig(vocab_size=models.VOCABULARY, **(models.SMALL if self.size.small else models.BASE))
        ).save_pretrained(folder)
        load_tokenizer(STARTER_FOLDER).save_pretrained(str(folder))
        return folder

    def _run(self, way: str, folder: Path, count: int, batch_size: int) -> dict[str, float]:
        texts = self.scratch / "texts"
        texts.write_text("\n".join((self._texts * (1 + count // len(self._texts)))[:count]) + "\n", encoding="utf-8")
        done = subprocess.run(
            [sys.executable, "-m", "tests.benchmarks.trainers", way, folder, texts, "--batch-size", str(batch_size)],
            cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"{way} on {folder.name} failed:\n{done.stderr[-2000:]}")
        found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
        say(f"  {way} on {folder.name}: {found['samples_per_second']:.1f} samples/s, peak {found['peak_mb']:.0f} MB")
        return found


class Quality:
    """The starter, fine-tuned with a preset, and TF-IDF, on the same rows."""

    def __init__(self, size: Size, folder: Path) -> None:
        self.size, self.folder = size, folder

    def figures(self) -> dict[str, Figure]:
        found: dict[str, Figure] = {}
        for classes in (2, 3):
            train, test, labels = self._rows(classes)
            theirs = self._tfidf(train, test, labels)
            runs = [self._fine_tuned(train, test, seed) for seed in self.size.seeds]
            means = {name: statistics.mean(run[name] for run in runs) for name in runs[0]}
            for name, side in (("TF-IDF", theirs), ("ours, mean", means)):
                say(f"  {classes} classes, {name}: accuracy {side['accuracy']:.4f}, macro-F1 {side['f1_macro']:.4f}")
            margin = [run["f1_macro"] - theirs["f1_macro"] for run in runs]
            found[f"f1_minus_tfidf_{classes}"] = _figure(margin, statistics.mean, tfidf=theirs, ours=runs)
            found[f"ece_{classes}"] = _figure([run["ece"] for run in runs], statistics.mean)
        found["f1_minus_trainer"] = self._beside_trainer(found["f1_minus_tfidf_3"].details["ours"])
        return found

    def _beside_trainer(self, ours: list[dict[str, float]]) -> Figure:
        train, test, labels = self._rows(3)
        theirs = []
        for seed in self.size.seeds:
            config = self._config(seed)
            fitted, _ = self._cut(train, config)
            config = config.for_rows(len(fitted))
            _, logits = trainers.hugging_face(STARTER_FOLDER, fitted, self._all(test, labels), config, labels)
            theirs.append(trainers.macro_f1(self._all(test, labels).targets, logits, labels))
            say(f"  Trainer, seed {seed}: macro-F1 {theirs[-1]:.4f}")
        pairs = [run["f1_macro"] - other for run, other in zip(ours, theirs, strict=True)]
        return _figure(pairs, statistics.mean, trainer=theirs)

    def _config(self, seed: int) -> TrainConfig:
        return make_config("fast", seed=seed, train_size=0.9, **self.size.overrides)

    def _rows(self, classes: int) -> tuple[Rows, Rows, list[str]]:
        parts = []
        for name in ("jrte-train.csv", "jrte-dev.csv"):
            rows = read_rows(self.folder / name)
            kept = [i for i, label in enumerate(rows.labels) if classes == 3 or label != "neutral"]
            kept = kept[: self.size.quality_rows]
            parts.append(Rows(*([values[i] for i in kept] for values in (rows.texts, rows.labels, rows.row_numbers))))
        return parts[0], parts[1], sorted(set(parts[0].labels))

    def _cut(self, train: Rows, config: TrainConfig) -> tuple[Split, Split]:
        """Training and validation rows, 19 : 1; the test rows are others."""
        data = split_rows(train, config)
        fitted = Split(
            data.train.texts + data.test.texts,
            np.concatenate([data.train.targets, data.test.targets]),
            data.train.row_numbers + data.test.row_numbers,
        )
        return fitted, data.valid

    def _all(self, rows: Rows, labels: list[str]) -> Split:
        targets = np.eye(len(labels), dtype=np.float32)[[labels.index(label) for label in rows.labels]]
        return Split([clean(text) for text in rows.texts], targets, rows.row_numbers)

    def _fine_tuned(self, train: Rows, test_rows: Rows, seed: int) -> dict[str, float]:
        config = self._config(seed)
        fitted, valid = self._cut(train, config)
        config = config.for_rows(len(fitted))
        labels = sorted(set(train.labels))
        test = self._all(test_rows, labels)
        tokenizer = load_tokenizer(STARTER_FOLDER)
        encode, pad_id = TextEncoder(tokenizer), tokenizer.pad_token_id
        rows = [encode(split.texts, config.max_length) for split in (fitted, valid, test)]
        model = build_model(BaseModelFolder(STARTER, STARTER_FOLDER), len(labels), config)
        with tempfile.TemporaryDirectory() as scratch:
            history = fit(
                model, FitInputs(fitted, valid, rows[0], rows[1], labels, config, pad_id), device=trainers.CPU,
                checkpoints=Checkpoints(Path(scratch) / "job"), board_folder=Path(scratch) / "board", hooks=Hooks(),
            )  # fmt: skip
        logits = [
            predict(model, ids, split.targets, config, 64, pad_id, trainers.CPU).logits
            for ids, split in ((rows[1], valid), (rows[2], test))
        ]
        temperature = fit_temperature(logits[0], valid.targets, config.task)
        figures = model_figures(test.targets, logits[1], temperature, labels, config)
        kept = ("accuracy", "f1_macro", "ece", "ece_uncalibrated")
        found = {name: figures[name, ""] for name in kept} | {
            "valid_f1_macro": max(epoch.valid_f1_macro for epoch in history), "temperature": temperature, "seed": seed,
        }  # fmt: skip
        say(f"  {len(labels)} classes, seed {seed}: " + ", ".join(f"{k} {v:.4f}" for k, v in found.items()))
        return found

    def _tfidf(self, train: Rows, test: Rows, labels: list[str]) -> dict[str, float]:
        """With all training rows, and the strength that is best on the test rows: as well as it can do."""
        vectorizer = TfidfVectorizer(analyzer="char", ngram_range=(1, 4), sublinear_tf=True)
        x_train, x_test = vectorizer.fit_transform(train.texts), vectorizer.transform(test.texts)
        targets = self._all(test, labels).targets
        tried = []
        for strength in STRENGTHS:
            said = LogisticRegression(C=strength, max_iter=1000).fit(x_train, train.labels).predict_proba(x_test)
            figures = model_figures(targets, np.log(said).astype(np.float32), 1.0, labels, self._config(1))
            tried.append({name: figures[name, ""] for name in ("accuracy", "f1_macro")} | {"strength": strength})
        return max(tried, key=lambda found: found["f1_macro"])


def _ratio(runs: dict[str, list[dict[str, float]]], ours: str, theirs: str, what: str) -> Figure:
    """Of runs that followed each other."""
    pairs = [a[what] / b[what] for a, b in zip(runs[ours], runs[theirs], strict=True)]
    behind = {name: [run[what] for run in runs[name]] for name in (ours, theirs)}
    return _figure(pairs, statistics.median, **{name.replace(" ", "_"): values for name, values in behind.items()})


def _figure(values: Sequence[float], middle: Callable[[Sequence[float]], float], **details: Any) -> Figure:
    return Figure(middle(values), min(values), max(values), {"each": list(values), **details})


def say(line: str) -> None:
    print(line, flush=True)


def _reached(key: str, value: float) -> str:
    asked = f"at least {AT_LEAST[key]:g}" if key in AT_LEAST else f"at most {AT_MOST[key]:g}"
    missed = value < AT_LEAST.get(key, value) or value > AT_MOST.get(key, value)
    return f"{asked} {'missed' if missed else 'reached'}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.training", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures and what lies behind them")
    parser.add_argument("--only", choices=("speed", "quality"))
    parser.add_argument("--small", action="store_true", help="as little as shows that all of it runs")
    parser.add_argument("--jrte", type=Path, metavar="FOLDER", default=JRTE, help="jrte-train.csv and jrte-dev.csv")
    options = parser.parse_args(arguments)
    size = SMALL if options.small else Size()
    machine = hardware(trainers.CPU)
    say(f"{machine}, {os.cpu_count()} cores")
    found: dict[str, Figure] = {}
    if options.only != "quality":
        with tempfile.TemporaryDirectory(prefix="tweetscore-") as scratch:
            source = tweets_file()
            found |= Speeds(size, source, Path(scratch)).figures()
    if options.only != "speed":
        if (options.jrte / "jrte-train.csv").is_file():
            found |= Quality(size, options.jrte).figures()
        else:
            say(f"quality is not measured: there is no {options.jrte / 'jrte-train.csv'}")
    say(f"{'':28}{'middle':>10}{'least':>10}{'greatest':>10}")
    for key in (key for key in KEYS if key in found):
        figure = found[key]
        asked = "" if size.small else _reached(key, figure.value)
        say(f"{key:28}{figure.value:10.4f}{figure.least:10.4f}{figure.greatest:10.4f}  {asked}")
    if options.json:
        written: dict[str, Any] = {"machine": machine, "cores": os.cpu_count()}
        written |= {key: figure.value for key, figure in found.items()}
        written["details"] = {key: asdict(figure) for key, figure in found.items()}
        options.json.write_text(json.dumps(written, indent=2), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
