"""Holds the champion and scores with it. Knows the registry and the device; knows no stream and no tweet's id.

Between windows it looks whether the champion is still the champion. A new one is loaded beside the old, which goes on
scoring meanwhile. A new one that cannot be loaded, out of memory included, leaves the old one scoring and is tried
again after a pause that grows.

A model serves as soon as it is loaded; where no engine was chosen for it here yet, that is on plain torch, and a better
engine takes over when it was found.
"""

import copy
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from structlog.contextvars import bound_contextvars

from db import registry
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
from worker.lineup import first_line, places, ready_engine
from worker.pause import Pause
from worker.settings import Settings
from worker.tryout import Order, Served, Tryout, settle_memory

log = logging.getLogger(__name__)

# A model that could not be loaded is tried again after pauses that double; a store that is away, after the first.
FIRST_PAUSE_SECONDS = 5.0
LONGEST_PAUSE_SECONDS = 300.0
# A command that is done by then is not worth a trial of engines.
WORTH_TRYING_SECONDS = 30.0
# What a healthy device scores without complaint.
PROBE = "今日はいい天気です。"


@dataclass(frozen=True)
class Scores:
    """`probabilities` (N, K) float32 in the rows' order; tokens real and padded, as the device saw them."""

    probabilities: Floats
    tokens: int
    padded_tokens: int


class Model:
    """One loaded model version on its engine. `token_budget` bounds one forward, padding included.

    `untried` begins the search for a better engine, after so many seconds; None where this one is settled.
    """

    def __init__(self, version_id: int, artifact: Artifact, engine: Engine, choice: Choice) -> None:
        self.version_id = version_id
        self.spec: Spec = artifact.spec
        self.engine = engine
        self.choice = choice
        self.token_budget = choice.token_budget
        self.untried: Callable[[float], Tryout] | None = None
        self.encode = TextEncoder(artifact.tokenizer)
        self._pad_id: int = artifact.tokenizer.pad_token_id

    def on(self, engine: Engine, choice: Choice, token_budget: int) -> Self:
        """The same version on another engine; they share all else."""
        other = copy.copy(self)
        other.engine, other.choice, other.token_budget = engine, choice, token_budget
        return other

    def tokenise(self, texts: Sequence[str]) -> list[list[int]]:
        """Texts as they came -> token ids, cleaned as the model was trained."""
        cleaned = [clean(text, self.spec.cleaner_version) for text in texts]
        return self.encode(cleaned, self.spec.config.max_length)

    def forward(self, rows: Sequence[Sequence[int]]) -> Scores:
        """Token ids -> probabilities, in batches of like length. Equal rows, retweets above all, are scored once."""
        keys = list(map(tuple, rows))
        distinct = list(dict.fromkeys(keys))
        logits, padded = self._run(distinct)
        probabilities = to_probabilities(torch.from_numpy(logits), self.spec.config.task, self.spec.temperature).numpy()
        if not np.isfinite(probabilities).all():
            raise BadArtifact(f"model {self.version_id} gives no numbers (NaN); promote another one")
        position = {key: i for i, key in enumerate(distinct)}
        every: Floats = probabilities[[position[key] for key in keys]]
        return Scores(every, sum(map(len, distinct)), padded)

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

    `token_budget` None takes what a sweep finds; `free` tells a device's free bytes.
    `engines` is a folder of this machine: its lock for trials lies there, and choices that the store cannot take.
    """

    store: Store
    device: str = "auto"
    engine: str = "auto"
    token_budget: int | None = None
    free: Callable[[torch.device], int] = free_bytes
    engines: Path | None = None


def serving(settings: Settings, device: str | None = None) -> Serving:
    """As the settings have it, on a `device` that was claimed if it is given."""
    return Serving(
        settings.models,
        device or settings.device,
        settings.engine,
        settings.token_budget,
        engines=settings.engines,
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


def load_model(version: ModelVersion, serving: Serving) -> Model:
    """A registered version on the engine that serves it here, or on plain torch until that is found, its digest
    checked; raises `BadArtifact`."""
    device, hold = pick_device(serving.device), partial(serving.store.fetched, version.artifact_url, version.sha256)
    with bound_contextvars(model_version=version.id), hold() as folder:
        artifact = load_artifact(folder, version.sha256)
        kept = places(folder, version.sha256, device, serving.engine, serving.engines)
        engine, choice, settled = ready_engine(artifact, device, serving.engine, kept)
        log.info("model %d: %s %s", version.id, choice.engine, choice.why)
    model = Model(version.id, artifact, engine, choice)
    model.token_budget = serving.token_budget or choice.token_budget
    if not settled:
        order = Order(str(folder), version.sha256, str(device), serving.engine, list(map(str, kept)))
        model.untried = partial(Tryout, version.id, artifact, order, hold, serving.free, serving.engines)
    return model


@contextmanager
def served(version: ModelVersion, serving: Serving) -> Iterator[Served]:
    """A model for a command that may take long: only then is it worth to look for a better engine."""
    running = Served(load_model(version, serving), serving.token_budget, WORTH_TRYING_SECONDS)
    try:
        yield running
    finally:
        running.end()


def warm_up() -> None:
    """What takes more than a second of the first model's loading, while there is none to load."""
    import transformers.models.bert.modeling_bert  # noqa: F401


@dataclass(frozen=True)
class Loading:
    """A model that is being loaded for one assignment of the alias."""

    assignment: int
    version_id: int
    model: "Future[Model]"


class Champion:
    """The champion of a database. When the alias moves, the new model is loaded and warmed up beside the old one, which
    scores until the new one is ready."""

    def __init__(self, database: Database, serving: Serving) -> None:
        self._database = database
        self._serving = serving
        self._served: Served | None = None
        self._loading: Loading | None = None
        self._pause = Pause()  # after an assignment whose model could not be loaded
        self._absence_logged = False
        self._lock = threading.Lock()
        self._loader = ThreadPoolExecutor(1, "load")
        self.loading_since: float | None = None  # by `time.monotonic`, while a model is being loaded

    def current(self) -> Model | None:
        """The model to score the next window with; None while there is none, which is logged once.

        Blocks only while no model can serve. A failure to load is logged, never raised.
        """
        with self._lock:  # the poller of the worker calls this too
            while True:
                with self._database.read() as session:
                    assigned = registry.assignment(session, registry.CHAMPION)
                    version = registry.get(session, assigned.model_version_id) if assigned else None
                if assigned is None or version is None:
                    self._log_absence()
                    return None
                wanted = self.version_id != version.id and self._pause.over(assigned.id)
                if self._loading is None and wanted:
                    self._start_loading(assigned.id, version)
                if self._loading is None or (self._served is not None and not self._loading.model.done()):
                    return self._served.current() if self._served else None
                self._finish_loading(self._loading, wanted and self._loading.assignment == assigned.id)

    @property
    def version_id(self) -> int | None:
        """The model version that scores now."""
        served = self._served
        return served.model.version_id if served else None

    @property
    def engine(self) -> str | None:
        """The name of the engine that runs it."""
        served = self._served
        return served.model.engine.name if served else None

    def close(self) -> None:
        """End the trial of engines, if one is running."""
        if (served := self._served) is not None:
            served.end()

    def _start_loading(self, assignment: int, version: ModelVersion) -> None:
        self.loading_since = time.monotonic()
        self._loading = Loading(assignment, version.id, self._loader.submit(load_model, version, self._serving))

    def _finish_loading(self, loading: Loading, wanted: bool) -> None:
        """Make the loaded model the champion, unless the alias has moved on in the meantime."""
        try:
            model = loading.model.result()
            if wanted:
                if self._served is not None:
                    self._served.stop()
                self._served = Served(model, self._serving.token_budget)
                self._absence_logged = False
                settle_memory()
                log.info("model %d is the champion now", loading.version_id)
        except Exception as error:
            # Any error may be temporary: memory that is short, a disk or a mount that fails.
            pause = self._begin_pause(error, loading)
            effect = f"model {self.version_id} goes on scoring" if self._served else "tweets wait in the stream"
            # Only the text: the traceback refers to the caller's model and would keep its memory.
            log.error(
                "the champion, model %d, cannot be loaded, %s; trying again in %.0f s (%s: %s)",
                loading.version_id, effect, pause, type(error).__name__, first_line(error),
            )  # fmt: skip
        finally:
            self._loading = self.loading_since = None

    def _begin_pause(self, error: Exception, loading: Loading) -> float:
        """Start the pause after a failure; returns its seconds."""
        # A store that is away says nothing about the model, and asking again is cheap.
        longest = FIRST_PAUSE_SECONDS if isinstance(error, StoreAway) else LONGEST_PAUSE_SECONDS
        return self._pause.begin(loading.assignment, FIRST_PAUSE_SECONDS, longest)

    def _log_absence(self) -> None:
        if not self._absence_logged:
            log.warning(
                "there is no champion yet: tweets wait in the stream; train a model, then "
                "`tweetscore models promote ID`"
            )
            self._absence_logged = True
            self._loader.submit(warm_up)
