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

from db.models import ModelVersion, utc_now
from training.config import make_config
from training.data.columns import VALUE
from training.data.numbers import TargetScale
from training.errors import BadArtifact
from training.evaluation.decisions import Floats, choose, confidence, label_text, to_probabilities
from training.model.artifact import Artifact, Spec, load_artifact
from training.model.base_model import STARTER_FOLDER
from training.model.batching import pad_arrays, plan_batches
from training.model.classifier import Classifier
from training.model.devices import free_bytes, pick_device
from training.store.store import Store
from training.text.cleaning import clean
from training.text.tokenizer import TextEncoder, UnknownShare, load_tokenizer
from worker.connections import model_store
from worker.errors import DeviceFull
from worker.scoring.engine_choice import Choice
from worker.scoring.engine_selection import choice_folders, load_engine
from worker.scoring.engine_trial import EngineTrial, TrialRequest
from worker.scoring.engines import Engine, Logits, TorchEngine, hardware
from worker.settings import Settings

log = logging.getLogger(__name__)

# A command that ends sooner gains nothing from a trial of engines.
TRIAL_AFTER_SECONDS = 30.0


@dataclass(frozen=True)
class Scores:
    """`probabilities` (N, K) float32 in the order of `rows`, token ids; the tokens run, without and with
    padding."""

    probabilities: Floats
    tokens: int
    padded_tokens: int
    rows: Sequence[Sequence[int]]


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
        self._pad_id: int = artifact.tokenizer.pad_token_id
        self._fixed_budget = token_budget
        self._use(engine, choice)

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
            plan = plan_batches([len(row) for row in rows], token_budget=budget)
            batches = [pad_arrays([rows[i] for i in batch], self._pad_id) for batch in plan]
            logits = np.empty((len(rows), len(self.spec.labels)), np.float32)
            try:
                for batch, found in zip(plan, self.engine.run(batches), strict=True):
                    logits[batch] = found
            except DeviceFull as error:
                if all(len(batch) == 1 for batch in plan):
                    raise
                budget = max(1, min(budget, max(ids.size for ids, _ in batches)) // 2)
                log.warning("%s; trying %d tokens a forward", error, budget)
            else:
                self.token_budget = min(self.token_budget, budget)
                return logits, sum(ids.size for ids, _ in batches)

    def score(self, texts: Sequence[str]) -> list[dict[str, Any]]:
        """Texts -> label, probability, score_signed and the probability of every label."""
        return describe(self.spec, self.forward(self.tokenise(texts)).probabilities)


def describe(spec: Spec, probabilities: Floats) -> list[dict[str, Any]]:
    """Probabilities (N, K) -> the columns of a prediction; `score_signed` is the mean polarity, None without any."""
    if spec.scale is not None:
        return _describe_values(spec.scale, probabilities)
    chosen = choose(probabilities, spec.config.task)
    sure = confidence(probabilities, chosen, spec.config.task)
    rows = []
    for i, values in enumerate(probabilities):
        by_label = dict(zip(spec.labels, map(float, values), strict=True))
        signed = None
        if spec.polarity is not None:
            signed = sum(spec.polarity[label] * value for label, value in by_label.items())
            signed = max(-1.0, min(1.0, signed))
        rows.append(
            {
                "label": label_text(chosen[i], spec.labels),
                "probability": float(sure[i]),
                "score_signed": signed,
                "probabilities": by_label,
            }
        )
    return rows


def _describe_values(scale: TargetScale, outputs: Floats) -> list[dict[str, Any]]:
    """Outputs (N, 1) of a continuous model -> the columns of a prediction: the only label is `value`."""
    return [
        {"label": VALUE, "probability": 1.0, "score_signed": scale.signed(value), "probabilities": {VALUE: value}}
        for value in scale.values(outputs)[:, 0].tolist()
    ]


def prediction_rows(model: ScoringModel, tweet_ids: Sequence[str], scores: Scores) -> list[dict[str, Any]]:
    """Rows of `predictions` for tweets in the order of `scores`."""
    now, described = utc_now(), describe(model.spec, scores.probabilities)
    return [
        {"tweet_id": id_, "model_version_id": model.version_id, "scored_at": now, "unknown_share": share, **columns}
        for id_, share, columns in zip(tweet_ids, model.unknown_shares(scores.rows), described, strict=True)
    ]


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


def load_model(version: ModelVersion, serving: Serving) -> ScoringModel:
    """A registered version, its digest checked, on its saved engine or on float32 torch; raises `BadArtifact`."""
    device, hold = pick_device(serving.device), partial(serving.store.fetched, version.artifact_url, version.sha256)
    with bound_contextvars(model_version=version.id), hold() as folder:
        artifact = load_artifact(folder, version.sha256)
        folders = choice_folders(folder, version.sha256, device, serving.engine, serving.engines_folder)
        engine, choice, final = load_engine(artifact, device, serving.engine, folders)
        log.info("model %d: %s %s", version.id, choice.engine, choice.reason)
    model = ScoringModel(version.id, artifact, engine, choice, serving.token_budget)
    if not final:
        request = TrialRequest(str(folder), version.sha256, str(device), serving.engine, list(map(str, folders)))
        model.start_trial = partial(
            EngineTrial, version.id, artifact, request, hold, serving.free_bytes, serving.engines_folder
        )
    return model


class UpgradableModel:
    """A model that switches to a faster engine, between windows, once a trial has found one."""

    def __init__(self, model: ScoringModel, after_seconds: float = 0.0) -> None:
        """The trial, if the model needs one, starts after `after_seconds`."""
        self.model = model
        self._trial = model.start_trial(after_seconds) if model.start_trial else None
        model.start_trial = None  # it refers to the weights

    def current(self) -> ScoringModel:
        """The model for the next window."""
        if self._trial is not None and (result := self._trial.result()) is not None:
            (engine, choice), before = result, self.model.engine
            if engine.name == before.name:
                engine = before
                log.info("model %d: %s stays; it %s", self.model.version_id, engine.name, choice.reason)
            else:
                log.info(
                    "model %d: %s takes over from %s; it %s",
                    self.model.version_id, engine.name, before.name, choice.reason,
                )  # fmt: skip
            self.model = self.model.on(engine, choice)
            self._trial = None
            freeze_loaded_objects()
        return self.model

    def stop(self) -> None:
        """Stop the trial. Does not wait."""
        if self._trial is not None:
            self._trial.stop()

    def close(self) -> None:
        """Stop the trial and wait until it has ended."""
        if self._trial is not None:
            self._trial.close()


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
        engine.run([pad_arrays([[1] * 8] * 8, 0)])
    freeze_loaded_objects()


@contextmanager
def open_model(version: ModelVersion, serving: Serving) -> Iterator[UpgradableModel]:
    """A model for a command; engines are tried only when the command runs for long."""
    model = UpgradableModel(load_model(version, serving), TRIAL_AFTER_SECONDS)
    try:
        yield model
    finally:
        model.close()
