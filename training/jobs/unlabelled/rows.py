"""The training rows of a job: its labelled rows, and what `unlabelled` and `teacher` in its configuration add."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from math import ceil

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from db.models import TrainingJob
from db.session import Database
from training.config import TrainConfig
from training.data.dataset import Dataset, Split, joined
from training.evaluation.decisions import Floats
from training.evaluation.epoch import Epoch
from training.jobs.context import TrainingContext
from training.jobs.lease import Lease
from training.jobs.stored_tweets import StoredTexts, digest_of
from training.loop.checkpoints import Checkpoints
from training.loop.fit import FitInputs, Hooks
from training.model.classifier import Classifier
from training.text.tokenizer import TextEncoder

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Setup:
    """What a job has before it trains `model`: its rows, and the tools to add others.

    `hooks` record the training of the model that is registered. `inputs` are those of the labelled rows, and
    `test_rows` the token ids of the test rows. `build` returns a model like `model` before its training.
    `record_report` stores `rows.report` in the job's row.
    """

    database: Database
    context: TrainingContext
    job: TrainingJob
    lease: Lease
    checkpoints: Checkpoints
    hooks: Hooks
    rows: Dataset
    sha256: str
    record_report: Callable[[], None]
    model: Classifier
    build: Callable[[], Classifier]
    device: torch.device
    tokenizer: PreTrainedTokenizerBase
    inputs: FitInputs
    test_rows: list[list[int]]

    @property
    def config(self) -> TrainConfig:
        return self.inputs.config

    def note(self, sentence: str) -> None:
        """Add a sentence to the job's report, which `jobs show` and the model card print, and store the report."""
        log.info("job %d: %s", self.job.id, sentence)
        self.rows.report["notes"] = [*self.rows.report.get("notes", ()), sentence]
        self.record_report()

    def tokenise(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of cleaned texts."""
        return TextEncoder(self.tokenizer)(texts, self.config.max_length)

    def steps_for(self, rows: int) -> int:
        """Return the number of steps that count for `rows` rows in the job's progress."""
        return ceil(rows / (self.config.train_batch_size * self.config.gradient_accumulation_steps))


@dataclass(frozen=True)
class TrainingRows:
    """What `fit` trains on.

    `settle` gets the epochs of `fit` and returns those of the model that is kept. `compare` gets the logits (N, K) of
    the test rows.
    """

    inputs: FitInputs
    checkpoints: Checkpoints
    hooks: Hooks
    settle: Callable[[list[Epoch]], list[Epoch]] = lambda history: history
    compare: Callable[[Floats], None] = lambda logits: None


def labelled_only(setup: Setup) -> TrainingRows:
    return TrainingRows(setup.inputs, setup.checkpoints, setup.hooks)


def stored_tweets(setup: Setup) -> list[str]:
    """Return the cleaned texts of the stored tweets to train on, and describe them in the report.

    A text of the labelled rows is left out, also when only the cleaned texts are equal: none of the validation and
    test rows may be trained on. Tweets that arrived after the job was submitted are left out too, so that a resumed job
    finds the same ones.
    """
    asked, parts = setup.config.unlabelled, (setup.rows.train, setup.rows.valid, setup.rows.test)
    labelled = {digest_of(key) for part in parts for key in part.keys}
    cleaned = {text for part in parts for text in part.texts}
    stored = StoredTexts(setup.database, setup.lease, setup.job.submitted_at, setup.config.cleaner)
    others = (tweet.text for tweet in stored if tweet.digest not in labelled and tweet.text not in cleaned)
    texts = list(islice(others, asked))
    setup.rows.report["unlabelled"] = {"asked": asked, "found": len(texts)}
    if not texts:
        setup.note("no stored tweet can be trained on besides the labelled rows; the model was trained without")
    elif len(texts) < asked:
        setup.note(f"{asked:,} stored tweets were asked for; there are {len(texts):,} in Japanese with different texts")
    return texts


def with_rows(inputs: FitInputs, texts: list[str], ids: list[list[int]], targets: Floats, weights: Floats) -> FitInputs:
    """Return `inputs` with more training rows: texts, token ids, `targets` (N, K) and `weights` (N,) in the loss."""
    more = Split(texts, targets.astype(np.float32), [0] * len(texts), weights.astype(np.float32))
    return replace(inputs, train=joined(inputs.train, more), train_rows=[*inputs.train_rows, *ids])


def one_stage(hooks: Hooks, before: int, after: int) -> Hooks:
    """Return the hooks of one stage of several: `before` steps of the job precede its own, and `after` steps follow."""

    def on_step(step: int, total: int, loss: float | None, rate: float | None) -> None:
        hooks.on_step(before + step, before + total + after, loss, rate)

    return replace(hooks, on_step=on_step)
