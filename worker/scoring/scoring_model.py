"""A model version that scores texts on its engine, and how it is loaded. Independent of the stream.

A model serves as soon as it is loaded: on its saved engine, or on float32 torch until a trial in the background has
found a faster one.
"""

import copy
import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from structlog.contextvars import bound_contextvars

from db.models import ModelVersion
from training.config import make_config
from training.errors import BadArtifact
from training.evaluation.decisions import Floats, to_probabilities
from training.model.artifact import Artifact, Spec, load_artifact
from training.model.base_model import STARTER_FOLDER
from training.model.batching import Logits
from training.model.cascade import CascadePart, is_cascade, load_cascade
from training.model.classifier import Classifier
from training.model.devices import free_bytes, memory_share, pick_device
from training.store.store import Store
from training.text.cleaning import clean
from training.text.tokenizer import TextEncoder, UnknownShare, load_tokenizer
from worker.connections import model_store
from worker.engines.engine_choice import Choice
from worker.engines.engine_selection import choice_folders, load_engine
from worker.engines.engine_trial import EngineTrial, TrialRequest
from worker.engines.engines import Engine, TorchEngine, hardware
from worker.errors import DeviceFull
from worker.scoring.cascade_model import CascadeModel
from worker.scoring.scores import Model, Part, Scores, as_rows, describe
from worker.settings import Settings

log = logging.getLogger(__name__)

# A command that ends sooner gains nothing from a trial of engines.
TRIAL_AFTER_SECONDS = 30.0


class ScoringModel:
    """One loaded model version on its engine.

    `token_budget` limits the tokens of one forward, padding included; None takes the budget of the choice.
    `start_trial` starts the search for a faster engine after some seconds; None when the choice is final.
    """

    def __init__(
        self, version_id: int, artifact: Artifact, engine: Engine, choice: Choice, token_budget: int | None = None
    ) -> None:
        self.version_id = version_id
        self.spec: Spec = artifact.spec
        self.start_trial: Callable[[float], EngineTrial] | None = None
        self.encode = TextEncoder(artifact.tokenizer)
        self.unknown_shares = UnknownShare(artifact.tokenizer)
        self._fixed_budget = token_budget
        self._use(engine, choice)

    @property
    def parts(self) -> Sequence[Part]:
        return (self,)

    @property
    def planned_share(self) -> None:
        return None

    def with_part(self, index: int, part: Part) -> Model:
        return part

    def _use(self, engine: Engine, choice: Choice) -> None:
        self.engine, self.choice = engine, choice
        self.token_budget = self._fixed_budget or choice.token_budget

    def on(self, engine: Engine, choice: Choice) -> Self:
        """The same version on another engine; everything else is shared."""
        other = copy.copy(self)
        other._use(engine, choice)
        return other

    def tokenise(self, texts: Sequence[str]) -> list[list[int]]:
        """Raw texts -> token ids, cleaned as in training."""
        cleaned = [clean(text, self.spec.cleaner_version) for text in texts]
        return self.encode(cleaned, self.spec.config.max_length)

    def forward(self, rows: Sequence[Sequence[int]]) -> Scores:
        """Token ids -> probabilities, in batches of like length. Equal rows, mostly retweets, are scored once.

        A continuous model gives its outputs (N, 1) instead. Raises `BadArtifact` for NaN, and `DeviceFull` when a
        single row does not fit.
        """
        keys = list(map(tuple, rows))
        distinct = list(dict.fromkeys(keys))
        logits, padded = self._run(distinct)
        probabilities = to_probabilities(torch.from_numpy(logits), self.spec.config.task, self.spec.temperature).numpy()
        if not np.isfinite(probabilities).all():
            raise BadArtifact(f"model {self.version_id} gives NaN as probabilities; promote another model")
        position = {key: i for i, key in enumerate(distinct)}
        every: Floats = probabilities[[position[key] for key in keys]]
        return Scores(every, sum(map(len, distinct)), padded, rows)

    def _run(self, rows: Sequence[tuple[int, ...]]) -> tuple[Logits, int]:
        """Logits (N, K) in the order of the rows, and the tokens run, padding included.

        When the device is out of memory, the budget is halved, for later windows too. Raises `DeviceFull` when a
        single row is too long; the budget is then left as it was.
        """
        budget = self.token_budget
        while True:
            batches = self.engine.batches(rows, budget)
            logits = np.empty((len(rows), len(self.spec.labels)), np.float32)
            try:
                for batch, found in zip(batches, self.engine.run(batches), strict=True):
                    logits[batch.rows] = found
            except DeviceFull as error:
                if not any(batch.divisible for batch in batches):
                    raise
                budget = max(1, min(budget, max(batch.tokens for batch in batches)) // 2)
                log.warning("%s; trying %d tokens a forward", error, budget)
            else:
                self.token_budget = min(self.token_budget, budget)
                return logits, sum(batch.tokens for batch in batches)

    def score(self, texts: Sequence[str]) -> list[dict[str, Any]]:
        """Texts -> label, probability, score_signed and the probability of every label."""
        return as_rows(describe(self.spec, self.forward(self.tokenise(texts)).probabilities))


@dataclass(frozen=True)
class Serving:
    """How to load models from `store`.

    `token_budget` None takes the budget found for the engine; `free_bytes` returns the free memory of a device.
    `engines_folder` is local: it holds the lock of trials, and choices that the store cannot take.
    """

    store: Store
    device: str = "auto"
    engine: str = "auto"
    token_budget: int | None = None
    free_bytes: Callable[[torch.device], int] = free_bytes
    engines_folder: Path | None = None


def serving_from(settings: Settings, device: str | None = None) -> Serving:
    """`device` is the device that a worker has claimed; by default the one in the settings."""
    return Serving(
        model_store(settings),
        device or settings.device,
        settings.engine,
        settings.token_budget,
        engines_folder=settings.engines,
    )


def load_model(version: ModelVersion, serving: Serving) -> Model:
    """A registered version, its digest checked, on its saved engine or on float32 torch; raises `BadArtifact`.

    A cascade is made of two such models, each on an engine of its own.
    """
    url = version.artifact_url
    with bound_contextvars(model_version=version.id), serving.store.fetched(url, version.sha256) as folder:
        if not is_cascade(folder):
            return _load(version.id, url, version.sha256, serving)
        spec = load_cascade(folder, version.sha256)

    def load(part: CascadePart) -> ScoringModel:
        with bound_contextvars(model_version=part.model_version):
            return _load(part.model_version, part.url(url), part.sha256, serving)

    return CascadeModel(version.id, spec, load(spec.student), load(spec.teacher))


def _load(version_id: int, url: str, sha256: str, serving: Serving) -> ScoringModel:
    device, hold = pick_device(serving.device), partial(serving.store.fetched, url, sha256)
    with hold() as folder:
        artifact = load_artifact(folder, sha256)
        folders = choice_folders(folder, sha256, device, serving.engine, serving.engines_folder)
        engine, choice, final = load_engine(artifact, device, serving.engine, folders)
        log.info("model %d: %s %s", version_id, choice.engine, choice.reason)
    model = ScoringModel(version_id, artifact, engine, choice, serving.token_budget)
    if not final:
        request = TrialRequest(
            str(folder), sha256, str(device), serving.engine, list(map(str, folders)),
            memory_share=memory_share(device),
        )  # fmt: skip
        model.start_trial = partial(
            EngineTrial, version_id, artifact, request, hold, serving.free_bytes, serving.engines_folder
        )
    return model


class UpgradableModel:
    """A model whose parts switch to faster engines, between windows, once a trial has found one."""

    def __init__(self, model: Model, after_seconds: float = 0.0) -> None:
        """The trials, if the model needs any, start after `after_seconds`."""
        self.model = model
        self._trials: dict[int, EngineTrial] = {}
        for index, part in enumerate(model.parts):
            if part.start_trial is not None:
                self._trials[index] = part.start_trial(after_seconds)
            part.start_trial = None  # it refers to the weights

    def current(self) -> Model:
        """The model for the next window."""
        for index, trial in list(self._trials.items()):
            if (result := trial.result()) is not None:
                del self._trials[index]
                self.model = self.model.with_part(index, _upgraded(self.model.parts[index], *result))
                freeze_loaded_objects()
        return self.model

    def stop(self) -> None:
        """Stop the trials. Does not wait."""
        for trial in self._trials.values():
            trial.stop()

    def close(self) -> None:
        """Stop the trials and wait until they have ended."""
        self.stop()
        for trial in self._trials.values():
            trial.close()


def _upgraded(part: Part, engine: Engine, choice: Choice) -> Part:
    """A model on the engine that its trial has found."""
    before = part.engine
    if engine.name == before.name:
        engine = before
        log.info("model %d: %s stays; it %s", part.version_id, engine.name, choice.reason)
    else:
        log.info("model %d: %s takes over from %s; it %s", part.version_id, engine.name, before.name, choice.reason)
    return part.on(engine, choice)


def freeze_loaded_objects(replaced: bool = True) -> None:
    """Exclude everything loaded from garbage collection: a full collection would stop scoring for 0.2 s.

    `replaced`: a model before this one is to be collected, which takes as long.
    """
    if replaced:
        gc.unfreeze()
    gc.collect()
    gc.freeze()


def preload(device: str) -> None:
    """Import and start what the first model of a process needs, while there is none: this takes seconds."""
    from transformers import BertConfig, BertModel

    tokenizer = load_tokenizer(STARTER_FOLDER)
    TextEncoder(tokenizer)(["準備"], 8)
    UnknownShare(tokenizer)
    picked = pick_device(device)
    encoder = BertModel(BertConfig(8, 8, 1, 1, 8))
    model = Classifier(encoder, 2, make_config("fast", pooling="pooler")).eval()
    if picked.type == "cpu":
        hardware(picked)
    engine = TorchEngine(model, picked, torch.float32)
    engine.run(engine.batches([[1] * 8] * 8, 64))
    freeze_loaded_objects()


@contextmanager
def open_model(version: ModelVersion, serving: Serving) -> Iterator[UpgradableModel]:
    """A model for a command; engines are tried only when the command runs for long."""
    model = UpgradableModel(load_model(version, serving), TRIAL_AFTER_SECONDS)
    try:
        yield model
    finally:
        model.close()
