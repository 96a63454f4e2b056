"""Holds the champion and scores with it. Knows the registry and the device; knows no stream and no tweet's id.

Between windows it looks whether the champion is still the champion. A new one is loaded beside the old, which goes on
scoring meanwhile; where memory is too small for both, the old one goes first and tweets wait. A new one that cannot be
loaded leaves the old one scoring, or brings it back, and says so.
"""

import gc
import logging
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from cachetools import LRUCache
from structlog.contextvars import bound_contextvars

from db import registry
from db.errors import TweetscoreError
from db.models import ModelVersion
from db.session import Database
from training.artifact import Artifact, Spec, load_artifact
from training.batches import pad_arrays
from training.clean import clean
from training.decide import Floats, certainty, choose, label_text, to_probabilities
from training.devices import free_bytes, pick_device
from training.errors import BadArtifact, StoreAway
from training.storage import Store
from training.text import TextEncoder
from worker.batch import plan_batches
from worker.choices import Choice
from worker.engines import Engine, Logits
from worker.errors import DeviceFull
from worker.lineup import loading_takes, pick_engine
from worker.settings import Settings

log = logging.getLogger(__name__)

# A store that does not answer is asked again after this.
STORE_PAUSE_SECONDS = 5.0
# A model that is to make room is looked at so often, until nobody scores with it any more.
LETTING_GO_SECONDS = 0.2
# What a healthy device scores without complaint.
PROBE = "今日はいい天気です。"


@dataclass(frozen=True)
class Scores:
    """`probabilities` (N, K) float32 in the rows' order; tokens real and padded, as the device saw them."""

    probabilities: Floats
    tokens: int
    padded_tokens: int


class Model:
    """One loaded model version on its engine. `token_budget` bounds one forward, padding included."""

    def __init__(self, version_id: int, artifact: Artifact, engine: Engine, choice: Choice, repeats: int = 0) -> None:
        self.version_id = version_id
        self.spec: Spec = artifact.spec
        self.engine = engine
        self.choice = choice
        self.token_budget = choice.token_budget
        self._encode = TextEncoder(artifact.tokenizer)
        self._pad_id: int = artifact.tokenizer.pad_token_id
        # Of this version alone, so that no other model's answer is ever given; equal cleaned texts have equal ids.
        self._seen: LRUCache[tuple[int, ...], Floats] = LRUCache(repeats)
        self._remembering = threading.Lock()

    def tokenise(self, texts: Sequence[str]) -> list[list[int]]:
        """Texts as they came -> token ids, cleaned as the model was trained."""
        cleaned = [clean(text, self.spec.cleaner_version) for text in texts]
        return self._encode(cleaned, self.spec.config.max_length)

    def forward(self, rows: Sequence[Sequence[int]]) -> Scores:
        """Token ids -> probabilities, in batches of like length. Equal rows, retweets above all, are scored once."""
        keys = list(map(tuple, rows))
        distinct = list(dict.fromkeys(keys))
        known = self._recall(distinct)
        new = [key for key in distinct if key not in known] if known else distinct
        logits, padded = self._run(new)
        probabilities = to_probabilities(torch.from_numpy(logits), self.spec.config.task, self.spec.temperature).numpy()
        if not np.isfinite(probabilities).all():
            raise BadArtifact(f"model {self.version_id} gives no numbers (NaN); promote another one")
        self._remember(new, probabilities)
        if known:
            probabilities = np.concatenate([probabilities, np.stack(list(known.values()))])
        place = {key: i for i, key in enumerate(chain(new, known))}
        every: Floats = probabilities[[place[key] for key in keys]]
        return Scores(every, sum(map(len, new)), padded)

    def _recall(self, keys: Sequence[tuple[int, ...]]) -> dict[tuple[int, ...], Floats]:
        if not self._seen.maxsize:
            return {}
        with self._remembering:
            return {key: self._seen[key] for key in keys if key in self._seen}

    def _remember(self, keys: Sequence[tuple[int, ...]], probabilities: Floats) -> None:
        if self._seen.maxsize:
            with self._remembering:
                self._seen.update(zip(keys, probabilities, strict=True))

    def _run(self, rows: Sequence[tuple[int, ...]]) -> tuple[Logits, int]:
        """Logits (N, K) in the rows' order and the tokens run, padding included.

        A device without room gets batches half as large from now on. Raises `DeviceFull`, and changes nothing for the
        rows to come, when a lone row is too much.
        """
        budget = self.token_budget
        while True:
            plan = plan_batches([len(row) for row in rows], budget)
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
        """Texts -> label, probability, score_signed and every label's probability."""
        return describe(self.spec, self.forward(self.tokenise(texts)).probabilities)


@dataclass(frozen=True)
class Serving:
    """How models are to be served here, all from `store`.

    `token_budget` None takes what a sweep finds, `repeats` 0 keeps no cache; `free` tells a device's free bytes.
    """

    store: Store
    device: str = "auto"
    engine: str = "auto"
    token_budget: int | None = None
    repeats: int = 0
    free: Callable[[torch.device], int] = free_bytes


def serving(settings: Settings, device: str | None = None) -> Serving:
    """As the settings have it, on a `device` that was claimed if it is given."""
    return Serving(
        settings.models, device or settings.device, settings.engine, settings.token_budget, settings.repeat_cache
    )


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


def load_model(
    version: ModelVersion, serving: Serving, make_room: Callable[[float], None] = lambda needed: None
) -> Model:
    """A registered version on the engine that serves it here, its digest checked; raises `BadArtifact`.

    `make_room` is called with the bytes that loading will take, once the files are here and whole.
    """
    device = pick_device(serving.device)
    with (
        bound_contextvars(model_version=version.id),
        serving.store.fetched(version.artifact_url, version.sha256) as folder,
    ):
        given = folder, version.sha256, device, serving.engine
        artifact = load_artifact(folder, version.sha256, lambda weights: make_room(loading_takes(*given, weights)))
        engine, choice = pick_engine(artifact, version.sha256, device, serving.engine)
        log.info("model %d: %s %s", version.id, choice.engine, choice.why)
    model = Model(version.id, artifact, engine, choice, serving.repeats)
    model.token_budget = serving.token_budget or choice.token_budget
    return model


def _settle_memory() -> None:
    """Take what is loaded out of the garbage collector's sight: a look through all of it stops scoring for 0.2 s."""
    gc.unfreeze()  # the model before this one among it
    gc.collect()
    gc.freeze()


@dataclass(frozen=True)
class Loading:
    """A model on its way, for one assignment of the alias; for none when it is the one before, coming back."""

    assignment: int | None
    version_id: int
    model: "Future[Model]"


class Champion:
    """The champion of a database. When the alias moves, the new one is loaded and warmed up beside the old one, which
    scores until the other is ready; or after it, where there is no room for both."""

    def __init__(self, database: Database, serving: Serving) -> None:
        self._database = database
        self._serving = serving
        self._model: Model | None = None
        self._loading: Loading | None = None
        self._refused: int | None = None
        # The model that made room: its version, and itself as long as somebody scores with it.
        self._gone: int | None = None
        self._leaving: Callable[[], Model | None] = lambda: None
        self._store_away_until = 0.0  # by `time.monotonic`
        self._told_absent = False
        self._one_at_a_time = threading.Lock()
        self._loader = ThreadPoolExecutor(1, "load")
        self.loading_since: float | None = None  # by `time.monotonic`, while a model is being loaded

    def current(self) -> Model | None:
        """The model to score the next window with; None while there is none, which is said once.

        Waits for a model that is being loaded only when there is no other, and nobody scores with the one before: it
        makes room, and they are to let go of it first.
        """
        with self._one_at_a_time:  # the watcher asks too
            while True:
                with self._database.read() as session:
                    assigned = registry.assignment(session, registry.CHAMPION)
                    version = registry.get(session, assigned.model_version_id) if assigned else None
                if assigned is None or version is None:
                    self._say_absent()
                    return None
                wanted = self._wanted(assigned.id, version.id)
                if self._loading is None and wanted:
                    self._load(assigned.id, version)
                elif self._loading is None and self._model is None and self._gone is not None and self._store_answers():
                    with self._database.read() as session:
                        self._load(None, registry.get(session, self._gone))
                if self._loading is None:
                    return self._model
                if (self._model is not None and not self._loading.model.done()) or self._leaving() is not None:
                    return self._model
                self._take(self._loading, wanted and self._loading.assignment == assigned.id)

    @property
    def version_id(self) -> int | None:
        """Which version scores now."""
        return self._model.version_id if self._model else None

    def _wanted(self, assignment: int, version_id: int) -> bool:
        """Whether another model than the present one is to be loaded. Promoted again, one that was refused is tried
        again: it may have been mended."""
        serves = self._model is not None and self._model.version_id == version_id
        return not serves and assignment != self._refused and self._store_answers()

    def _store_answers(self) -> bool:
        return time.monotonic() >= self._store_away_until

    def _load(self, assignment: int | None, version: ModelVersion) -> None:
        self.loading_since = time.monotonic()
        future = self._loader.submit(load_model, version, self._serving, self._make_room)
        self._loading = Loading(assignment, version.id, future)

    def _make_room(self, needed: float) -> None:
        """In the loader's thread: where a model does not fit beside the one that scores, wait for that one to go."""
        if self._model is None or (free := self._serving.free(pick_device(self._serving.device))) >= needed:
            return
        with self._one_at_a_time:
            self._gone = self._model.version_id
            self._leaving = weakref.ref(self._model)
            self._model = None
        log.warning(
            "model %d makes room: the new one may take %d MB and %d are free; tweets wait while it is loaded",
            self._gone, needed / 1e6, free / 1e6,
        )  # fmt: skip
        gc.unfreeze()
        while self._leaving() is not None:
            gc.collect()
            time.sleep(LETTING_GO_SECONDS)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _take(self, loading: Loading, wanted: bool) -> None:
        """Make what was loaded the champion, unless the alias has moved on meanwhile."""
        try:
            model = loading.model.result()
            if wanted or loading.assignment is None:
                self._model, self._gone, self._told_absent = model, None, False
                _settle_memory()
                if wanted:
                    self._refused = None
                    log.info("model %d is the champion now", loading.version_id)
        except (TweetscoreError, RuntimeError, MemoryError) as error:  # torch's, when the device has no room for it
            if isinstance(error, StoreAway):  # nothing is wrong with the model
                self._store_away_until = time.monotonic() + STORE_PAUSE_SECONDS
            elif loading.assignment is None:
                self._gone = None
            else:
                self._refused = loading.assignment
            old = f"model {self._model.version_id} goes on scoring" if self._model else "tweets wait in the stream"
            old = f"model {self._gone} is loaded again" if self._gone is not None else old
            # In words: through its traceback the error holds the caller's model, and whoever keeps logs would too.
            log.error("the champion, model %d, cannot be loaded, %s: %s", loading.version_id, old, str(error))
        finally:
            self._loading = self.loading_since = None

    def _say_absent(self) -> None:
        if not self._told_absent:
            log.warning(
                "there is no champion yet: tweets wait in the stream; train a model, then "
                "`tweetscore models promote ID`"
            )
            self._told_absent = True
