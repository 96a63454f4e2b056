"""Holds the champion and scores with it. Knows the registry and the device; knows no stream and no tweet's id.

Between windows it looks whether the champion is still the champion. A new one is loaded beside the old, which goes on
scoring meanwhile; where memory is too small for both, the old one goes first and tweets wait. A new one that cannot be
loaded leaves the old one scoring, or brings it back, says so, and is tried again after a pause that grows.

A model serves as soon as it is loaded; where no engine was chosen for it here yet, that is on plain torch, and a better
engine takes over when it was found.
"""

import copy
import gc
import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from cachetools import LRUCache
from structlog.contextvars import bound_contextvars

from db import registry
from db.models import ModelVersion
from db.session import Database
from training.artifact import Artifact, Spec, load_artifact
from training.batches import pad_arrays
from training.clean import clean
from training.decide import Floats, choose, confidence, label_text, to_probabilities
from training.devices import free_bytes, pick_device
from training.errors import BadArtifact, StoreUnavailable
from training.storage import Store
from training.text import TextEncoder
from worker.batch import plan_batches
from worker.choices import Choice
from worker.engines import Engine, Logits
from worker.errors import DeviceFull
from worker.lineup import first_line, loading_takes, places, ready_engine
from worker.pause import Pause
from worker.settings import Settings
from worker.tryout import Order, Served, Tryout, settle_memory

log = logging.getLogger(__name__)

# A model that could not be loaded is tried again after pauses that double; a store that is away, after the first.
FIRST_PAUSE_SECONDS = 5.0
LONGEST_PAUSE_SECONDS = 300.0
# A command that is done by then is not worth a trial of engines.
WORTH_TRYING_SECONDS = 30.0
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
    """One loaded model version on its engine. `token_budget` bounds one forward, padding included.

    `untried` begins the search for a better engine, after so many seconds; None where this one is settled.
    """

    def __init__(self, version_id: int, artifact: Artifact, engine: Engine, choice: Choice, repeats: int = 0) -> None:
        self.version_id = version_id
        self.spec: Spec = artifact.spec
        self.engine = engine
        self.choice = choice
        self.token_budget = choice.token_budget
        self.untried: Callable[[float], Tryout] | None = None
        self.encode = TextEncoder(artifact.tokenizer)
        self._pad_id: int = artifact.tokenizer.pad_token_id
        # Of this version alone, so that no other model's answer is ever given; equal cleaned texts have equal ids.
        self._seen: LRUCache[tuple[int, ...], Floats] = LRUCache(repeats)
        self._remembering = threading.Lock()

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
    `engines` is a folder of this machine: its lock for trials lies there, and choices that the store cannot take.
    """

    store: Store
    device: str = "auto"
    engine: str = "auto"
    token_budget: int | None = None
    repeats: int = 0
    free: Callable[[torch.device], int] = free_bytes
    engines: Path | None = None


def serving(settings: Settings, device: str | None = None) -> Serving:
    """As the settings have it, on a `device` that was claimed if it is given."""
    return Serving(
        settings.models,
        device or settings.device,
        settings.engine,
        settings.token_budget,
        settings.repeat_cache,
        engines=settings.engines,
    )


def describe(spec: Spec, probabilities: Floats) -> list[dict[str, Any]]:
    """Probabilities (N, K) -> what is stored of each row; `score_signed` is the mean polarity, None without any."""
    chosen = choose(probabilities, spec.config.task)
    sure = confidence(probabilities, chosen, spec.config.task)
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
    """A registered version on the engine that serves it here, or on plain torch until that is found, its digest
    checked; raises `BadArtifact`.

    `make_room` is called with the bytes that loading will take, once the files are here and whole.
    """
    device, hold = pick_device(serving.device), partial(serving.store.fetched, version.artifact_url, version.sha256)
    with bound_contextvars(model_version=version.id), hold() as folder:
        artifact = load_artifact(folder, version.sha256, lambda weights: make_room(loading_takes(weights)))
        kept = places(folder, version.sha256, device, serving.engine, serving.engines)
        engine, choice, settled = ready_engine(artifact, device, serving.engine, kept)
        log.info("model %d: %s %s", version.id, choice.engine, choice.why)
    model = Model(version.id, artifact, engine, choice, serving.repeats)
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
        self._served: Served | None = None
        self._loading: Loading | None = None
        # An assignment whose model could not be loaded, and the model before that could not be loaded again.
        self._pause, self._pause_before = Pause(), Pause()
        # The model that made room: its version, and a part of it that lives as long as somebody scores with it.
        self._gone: int | None = None
        self._leaving: Callable[[], object] = lambda: None
        self._told_absent = False
        self._one_at_a_time = threading.Lock()
        self._loader = ThreadPoolExecutor(1, "load")
        self.loading_since: float | None = None  # by `time.monotonic`, while a model is being loaded

    def current(self) -> Model | None:
        """The model to score the next window with; None while there is none, which is said once.

        Waits for a model that is being loaded only when there is no other, and nobody scores with the one before: it
        makes room, and they are to let go of it first. What a model cannot be loaded for is said, never raised.
        """
        with self._one_at_a_time:  # the watcher asks too
            while True:
                with self._database.read() as session:
                    assigned = registry.assignment(session, registry.CHAMPION)
                    version = registry.get(session, assigned.model_version_id) if assigned else None
                if assigned is None or version is None:
                    self._say_absent()
                    return None
                wanted = self.version_id != version.id and self._pause.over(assigned.id)
                if self._loading is None and wanted:
                    self._load(assigned.id, version)
                elif self._loading is None:
                    self._load_the_one_before()
                if (
                    self._loading is None
                    or (self._served is not None and not self._loading.model.done())
                    or self._leaving() is not None
                ):
                    return self._served.current() if self._served else None
                self._take(self._loading, wanted and self._loading.assignment == assigned.id)

    @property
    def version_id(self) -> int | None:
        """Which version scores now."""
        served = self._served
        return served.model.version_id if served else None

    @property
    def engine(self) -> str | None:
        """What runs it now."""
        served = self._served
        return served.model.engine.name if served else None

    def close(self) -> None:
        """Nothing is looked for any more beside the model that scores."""
        if (served := self._served) is not None:
            served.end()

    def _load(self, assignment: int | None, version: ModelVersion) -> None:
        self.loading_since = time.monotonic()
        future = self._loader.submit(load_model, version, self._serving, self._make_room)
        self._loading = Loading(assignment, version.id, future)

    def _load_the_one_before(self) -> None:
        """If it made room for nothing."""
        if self._served is None and self._gone is not None and self._pause_before.over(self._gone):
            with self._database.read() as session:
                self._load(None, registry.get(session, self._gone))

    def _make_room(self, needed: float) -> None:
        """In the loader's thread: where a model does not fit beside the one that scores, wait for that one to go."""
        served = self._served
        if served is None or self._free() >= needed:
            return
        served.end()  # engines that are tried out beside it take memory too
        if (free := self._free()) >= needed:
            return
        with self._one_at_a_time:
            self._gone = served.model.version_id
            self._leaving = weakref.ref(served.model.encode)
            self._served = served = None
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

    def _free(self) -> int:
        return self._serving.free(pick_device(self._serving.device))

    def _take(self, loading: Loading, wanted: bool) -> None:
        """Make what was loaded the champion, unless the alias has moved on meanwhile."""
        try:
            model = loading.model.result()
            if wanted or loading.assignment is None:
                if self._served is not None:
                    self._served.stop()
                self._served = Served(model, self._serving.token_budget)
                self._gone, self._told_absent = None, False
                settle_memory()
                if wanted:
                    log.info("model %d is the champion now", loading.version_id)
        except Exception as error:
            # Whatever it is, a disk or a mount that fails above all, it may pass or be mended.
            pause = self._wait_after(error, loading)
            old = f"model {self.version_id} goes on scoring" if self._served else "tweets wait in the stream"
            old = f"model {self._gone} is loaded again" if self._gone is not None else old
            # In words: through its traceback the error holds the caller's model, and whoever keeps logs would too.
            log.error(
                "the champion, model %d, cannot be loaded, %s; trying again in %.0f s (%s: %s)",
                loading.version_id, old, pause, type(error).__name__, first_line(error),
            )  # fmt: skip
        finally:
            self._loading = self.loading_since = None

    def _wait_after(self, error: Exception, loading: Loading) -> float:
        """Begin the pause after a failure; returns its seconds."""
        first, longest = FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS
        if isinstance(error, StoreUnavailable):  # nothing is wrong with the model, and to ask costs little
            longest = first
        if loading.assignment is None:
            return self._pause_before.begin(loading.version_id, first, longest)
        if self._gone is not None:  # each try is one more time that tweets wait
            first = longest
        return self._pause.begin(loading.assignment, first, longest)

    def _say_absent(self) -> None:
        if not self._told_absent:
            log.warning(
                "there is no champion yet: tweets wait in the stream; train a model, then "
                "`tweetscore models promote ID`"
            )
            self._told_absent = True
            self._loader.submit(warm_up)
