"""Holds the champion and scores with it. Knows the registry and the device; knows no stream and no tweet's id.

Between windows it looks whether the champion is still the champion, and loads the new one beside the old: a model that
cannot be loaded leaves the old one scoring, and says so.
"""

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import torch

from db import registry
from db.errors import TweetscoreError
from db.models import ModelVersion
from db.session import Database
from training.artifact import Artifact, Spec, load_artifact
from training.batches import pad
from training.clean import clean
from training.errors import BadArtifact
from training.evaluate import Floats, certainty, choose, label_text, to_probabilities
from training.model import pick_device
from training.text import TextEncoder
from worker.batch import plan_batches

log = logging.getLogger(__name__)

# What a healthy device scores without complaint.
PROBE = "今日はいい天気です。"


@dataclass(frozen=True)
class Scores:
    """`probabilities` (N, K) float32 in the rows' order; tokens real and padded, as the device saw them."""

    probabilities: Floats
    tokens: int
    padded_tokens: int


class Model:
    """One loaded model version on its device."""

    def __init__(self, version_id: int, artifact: Artifact, device: torch.device) -> None:
        self.version_id = version_id
        self.spec: Spec = artifact.spec
        self._encode = TextEncoder(artifact.tokenizer)
        self._pad_id: int = artifact.tokenizer.pad_token_id
        self._device = device
        self._model = artifact.model.to(device).eval()

    def tokenise(self, texts: Sequence[str]) -> list[list[int]]:
        """Texts as they came -> token ids, cleaned as the model was trained."""
        cleaned = [clean(text, self.spec.cleaner_version) for text in texts]
        return self._encode(cleaned, self.spec.config.max_length)

    @torch.inference_mode()
    def forward(self, rows: Sequence[Sequence[int]], token_budget: int) -> Scores:
        """Token ids -> probabilities, in batches of like length. Equal rows, retweets above all, are scored once."""
        place = {row: i for i, row in enumerate(dict.fromkeys(map(tuple, rows)))}
        distinct = list(place)
        probabilities = torch.empty((len(distinct), len(self.spec.labels)))
        padded = 0
        for index in plan_batches([len(row) for row in distinct], token_budget):
            ids, mask = pad([distinct[i] for i in index], self._pad_id)
            padded += ids.numel()
            logits = self._model(ids.to(self._device), mask.to(self._device))
            probabilities[index] = to_probabilities(logits, self.spec.config.task, self.spec.temperature).cpu()
        if not torch.isfinite(probabilities).all():
            raise BadArtifact(f"model {self.version_id} gives no numbers (NaN); promote another one")
        every = probabilities[[place[tuple(row)] for row in rows]]
        return Scores(every.numpy(), sum(map(len, distinct)), padded)

    def score(self, texts: Sequence[str], token_budget: int) -> list[dict[str, Any]]:
        """Texts -> label, probability, score_signed and every label's probability."""
        return describe(self.spec, self.forward(self.tokenise(texts), token_budget).probabilities)


def describe(spec: Spec, probabilities: Floats) -> list[dict[str, Any]]:
    """Probabilities (N, K) -> what is stored of each row; `score_signed` is the mean polarity, None without any."""
    chosen = choose(probabilities, spec.config.task)
    sure = certainty(probabilities, chosen, spec.config.task)
    rows = []
    for i, values in enumerate(probabilities):
        named = dict(zip(spec.labels, map(float, values), strict=True))
        signed = None
        if spec.polarity is not None:
            signed = sum(spec.polarity[label] * value for label, value in named.items())
            signed = max(-1.0, min(1.0, signed))
        rows.append(
            {
                "label": label_text(chosen[i], spec.labels),
                "probability": float(sure[i]),
                "score_signed": signed,
                "probabilities": named,
            }
        )
    return rows


def load_model(version: ModelVersion, device: str) -> Model:
    """A registered version, its digest checked; raises `BadArtifact`."""
    url = urlsplit(version.artifact_url)
    if url.scheme != "file":
        raise BadArtifact(f"model {version.id} lies at {url.scheme}://, which this worker does not read")
    return Model(version.id, load_artifact(Path(unquote(url.path)), version.sha256), pick_device(device))


class Champion:
    """The champion of a database, loaded once and swapped when the alias moves."""

    def __init__(self, database: Database, device: str) -> None:
        self._database = database
        self._device = device
        self._model: Model | None = None
        self._refused: int | None = None
        self._told_absent = False
        self._one_at_a_time = threading.Lock()

    def current(self) -> Model | None:
        """The model to score the next window with; None while there is none, which is said once."""
        with self._one_at_a_time:  # the watcher asks too
            return self._current()

    def _current(self) -> Model | None:
        with self._database.read() as session:
            assigned = registry.assignment(session, registry.CHAMPION)
            if assigned is None:
                if not self._told_absent:
                    log.warning(
                        "there is no champion yet: tweets wait in the stream; train a model, then "
                        "`tweetscore models promote ID`"
                    )
                    self._told_absent = True
                return None
            version_id = assigned.model_version_id
            if self._model is not None and version_id == self._model.version_id:
                return self._model
            # Promoted again, a model that was refused is tried again: it may have been mended.
            if assigned.id == self._refused:
                return self._model
            version = registry.get(session, version_id)
        try:
            self._model = load_model(version, self._device)
            self._refused, self._told_absent = None, False
            log.info("model %d is the champion now", version_id)
        except (TweetscoreError, RuntimeError) as error:  # torch's, when the device has no room for it
            self._refused = assigned.id
            old = f"model {self._model.version_id} goes on scoring" if self._model else "tweets wait in the stream"
            log.error("the champion, model %d, cannot be loaded, %s: %s", version_id, old, error)
        return self._model
