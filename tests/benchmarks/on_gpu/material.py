"""What the parts measure with: tweets, models as artifacts, and the figures that one part leaves for the next."""

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import BertConfig, BertModel

from tests.benchmarks.models import (
    BASE,
    LABELS,
    REFERENCE_ROWS,
    SAMPLE_LABELLED,
    SMALL,
    VOCABULARY,
    operations,
)
from tests.support.paths import SAMPLE_TWEETS
from training.config import TrainConfig, make_config
from training.model.artifact import Artifact, load_artifact, make_reference, make_spec, save_artifact
from training.model.base_model import STARTER_FOLDER, BaseModelFolder
from training.model.batching import Logits
from training.model.classifier import Classifier, build_model
from training.text.cleaning import clean
from training.text.tokenizer import TextEncoder, load_tokenizer
from worker.engine_names import FLOAT32_TORCH
from worker.engines.engine_choice import CPU_WINDOW_TWEETS, Choice, Trial
from worker.engines.engine_selection import choice_folder, save_choice
from worker.engines.engines import Engine, EngineBuilder, hardware

CPU = torch.device("cpu")
Rows = list[list[int]]
Key = tuple[str, str, int]  # engine, model, token budget
KINDS = ("packed", "compiled", "torch", "varlen")


@dataclass(frozen=True)
class Size:
    """The amount of work: in full, or as little as proves that everything runs."""

    small: bool = False
    product: int = 8192
    product_rounds: int = 9
    copied_bytes: int = 1 << 30
    window: int = 8192
    reference_ids: int = 2_000
    agreement_rows: int = 256
    budgets: tuple[int, ...] = (16384, 32768, 65536, 131072)
    rounds: int = 5
    pipeline_texts: int = 2_048
    guide_texts: int = 256
    scorers: tuple[int, ...] = (1, 4, 8)
    first_tweets: int = 60_000
    most_tweets: int = 240_000
    single_tweets: int = 200
    training_texts: int = 2_048
    # Of the card that is left free when it is filled on purpose.
    free_bytes: int = 700_000_000


SMALL_SIZE = Size(
    small=True, product=256, product_rounds=2, copied_bytes=1 << 22, window=96, reference_ids=64, agreement_rows=64,
    budgets=(512, 1024), rounds=2, pipeline_texts=32, guide_texts=8, scorers=(1, 2), first_tweets=100, most_tweets=200,
    single_tweets=4, training_texts=32,
)  # fmt: skip


class Measured:
    """One model: its artifact on disk, and the rows of a window of tweets."""

    def __init__(self, name: str, folder: Path, sha256: str, texts: Sequence[str]) -> None:
        self.name, self.folder, self.sha256 = name, folder, sha256
        self.artifact: Artifact = load_artifact(folder, sha256)
        spec = self.artifact.spec
        encode = TextEncoder(self.artifact.tokenizer)
        self.rows: Rows = encode([clean(text, spec.cleaner_version) for text in texts], spec.config.max_length)
        self.tokens = sum(map(len, self.rows))
        # Operations of the matrix products of a window without padding.
        self.operations = operations(self.artifact.model, self.tokens, self.tokens)

    def engine(self, name: str, device: torch.device) -> Engine:
        return EngineBuilder(self.artifact.model, device).build(name)

    def save_choice(self, engine: str, budget: int, device: torch.device) -> None:
        """Let workers serve on this engine at once, as if a trial had chosen it."""
        trials = [Trial(engine, "serves: the fastest here", serves=True)]
        choice = Choice(engine, budget, hardware(device), trials, max(len(self.rows), CPU_WINDOW_TWEETS))
        folders = [choice_folder(self.folder, self.sha256, device, "auto")]
        if not save_choice(folders, EngineBuilder(self.artifact.model, device), choice):
            raise OSError(f"{folders[0]} cannot be written")


class Bench:
    """Sizes, tweets and models of a run, and what the parts leave for later ones."""

    def __init__(self, size: Size, source: Path, scratch: Path, missing: Mapping[str, str]) -> None:
        self.size, self.source, self.scratch, self.missing = size, source, scratch, missing
        self.postgresql: str | None = None  # the URL of an empty database
        self.device = torch.device("cuda", 0) if torch.cuda.is_available() else CPU
        self.machine: dict[str, Any] = {}
        self.products: dict[str, float] = {}  # operations a second of plain matrix products, by the type of numbers
        self.speeds: dict[Key, float] = {}  # tweets a second of engines alone
        self.peers: dict[str, float] = {}  # tweets a second of other ways
        self.whole: dict[str, float] = {}  # tweets a second end to end

    @property
    def source_is_sample(self) -> bool:
        return self.source == SAMPLE_TWEETS

    @cached_property
    def texts(self) -> list[str]:
        with self.source.open(encoding="utf-8") as lines:
            return [json.loads(line)["text"] for line in lines if line.strip()]

    def many_texts(self, n: int) -> list[str]:
        """So many texts, no two alike: a file with fewer is repeated with a number after each text."""
        return [numbered(self.texts, i) for i in range(n)]

    @cached_property
    def base(self) -> Measured:
        folder = self.scratch / "base"
        return Measured("base", folder, base_artifact(folder, self.reference_texts, self.size.small), self.window)

    @cached_property
    def starter(self) -> Measured:
        folder = self.scratch / "starter"
        return Measured("starter", folder, starter_artifact(folder, self.reference_texts), self.window)

    @cached_property
    def window(self) -> list[str]:
        return self.many_texts(self.size.window)

    @property
    def reference_texts(self) -> list[str]:
        return self.window[: 32 if self.size.small else REFERENCE_ROWS]

    @cached_property
    def fastest(self) -> tuple[str, int, float]:
        """Engine, token budget and speed of the fastest engine at base size. Raises `LookupError` without any."""
        found = {key: speed for key, speed in self.speeds.items() if key[1] == "base" and "without" not in key[0]}
        if not found:
            raise LookupError("no engine was measured alone")
        (engine, _, budget), speed = max(found.items(), key=lambda pair: pair[1])
        return engine, budget, speed

    @property
    def engines(self) -> list[str]:
        """The engines to measure, most important first."""
        if self.device.type == "cuda":
            names = EngineBuilder(self.base.artifact.model, self.device).names()
            first = [name for kind in KINDS for name in names if name.startswith(kind) and name != FLOAT32_TORCH]
            return [*first, FLOAT32_TORCH]
        return ["packed-float32", "compiled-float32", "packed-bfloat16", "varlen-bfloat16", "torch-float32"]


def prepare(bench: Bench, record: Any) -> None:
    """Make the models, so that the time for this counts in no other part."""
    table = record.table(
        "Tweets and models", "model", "parameters", "tweets of a window", "tokens a tweet", "vocabulary"
    )
    for measured in (bench.base, bench.starter):
        size = sum(part.numel() for part in measured.artifact.model.parameters())
        mean = measured.tokens / len(measured.rows)
        table.add(measured.name, size, len(measured.rows), mean, measured.artifact.model.encoder_config.vocab_size)
        record.data[measured.name] = {"parameters": size, "tweets": len(measured.rows), "tokens": measured.tokens}


def numbered(texts: Sequence[str], i: int) -> str:
    turn, place = divmod(i, len(texts))
    return f"{texts[place]} {turn}" if turn else texts[place]


def base_artifact(folder: Path, texts: Sequence[str], small: bool) -> str:
    """A BERT of base size with random weights, saved as an artifact. Returns its sha256."""
    torch.manual_seed(1)
    encoder = BertModel(BertConfig(vocab_size=VOCABULARY, **(SMALL if small else BASE)))
    config = make_config("fast", base_model="random", pooling="pooler")
    return _save(folder, Classifier(encoder, len(LABELS), config), config, "random", texts)


def starter_artifact(folder: Path, texts: Sequence[str]) -> str:
    """The starter encoder under a fitted head, saved as an artifact. Returns its sha256."""
    config = make_config("fast", pooling="pooler")
    model = build_model(BaseModelFolder("starter", STARTER_FOLDER), len(LABELS), config).eval()
    with SAMPLE_LABELLED.open(encoding="utf-8", newline="") as file:
        sample = [(row["text"], LABELS.index(row["label"])) for row in islice(csv.DictReader(file), 600)]
    encode = TextEncoder(load_tokenizer(STARTER_FOLDER))
    rows = encode([clean(text) for text, _ in sample], config.max_length)
    _fit_head(model, rows, torch.tensor([label for _, label in sample]))
    return _save(folder, model, config, "starter", texts)


def _save(folder: Path, model: Classifier, config: TrainConfig, name: str, texts: Sequence[str]) -> str:
    tokenizer = load_tokenizer(STARTER_FOLDER)
    rows = TextEncoder(tokenizer)([clean(text, config.cleaner) for text in texts], config.max_length)
    spec = make_spec(LABELS, config, BaseModelFolder(name, STARTER_FOLDER), tokenizer)
    return save_artifact(folder, model, tokenizer, spec, make_reference(rows, forward(model.eval(), rows)))


def forward(model: Classifier, rows: Rows, batch: int = 32) -> Logits:
    """Outputs (N, K) of a model on the CPU in float32, in the order of the rows."""
    pad_id = model.encoder_config.pad_token_id or 0
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    found: dict[int, Logits] = {}
    with torch.inference_mode():
        for start in range(0, len(order), batch):
            part = order[start : start + batch]
            longest = max(len(rows[i]) for i in part)
            ids = torch.tensor([rows[i] + [pad_id] * (longest - len(rows[i])) for i in part])
            mask = torch.tensor([[1] * len(rows[i]) + [0] * (longest - len(rows[i])) for i in part])
            found.update(zip(part, model(ids, mask).float().numpy(), strict=True))
    return np.stack([found[i] for i in range(len(rows))])


def _fit_head(model: Classifier, rows: Rows, labels: torch.Tensor) -> None:
    """Logistic regression over what the untouched encoder says."""
    head = model.classifier
    model.classifier = nn.Identity()
    pooled = torch.from_numpy(forward(model, rows))
    model.classifier = head
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        weights = head.weight.square().sum() / 2  # type: ignore[operator]
        value: torch.Tensor = nn.functional.cross_entropy(head(pooled), labels) + weights / len(labels)
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(loss)  # type: ignore[no-untyped-call]
