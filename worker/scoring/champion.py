"""The models that the aliases of a database point to: load one, replace it when its alias moves, retry when loading
fails."""

import logging
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from sqlalchemy.orm import Session

from db import registry
from db.models import ModelAlias, ModelVersion
from db.session import Database
from training.errors import StoreUnavailable
from worker.engines.engine_selection import first_line
from worker.scoring.backoff import Pause
from worker.scoring.scores import Model
from worker.scoring.scoring_model import Serving, UpgradableModel, freeze_loaded_objects, load_model, preload

log = logging.getLogger(__name__)

# Pauses after a model could not be loaded: they double up to the longest. When a store was unavailable, the pause is
# always the first one.
FIRST_PAUSE_SECONDS = 5.0
LONGEST_PAUSE_SECONDS = 300.0
# A new model scores its first windows before a trial of engines takes a part of the machine.
TRIAL_AFTER_LOADING_SECONDS = 1.0


@dataclass(frozen=True)
class Loading:
    """A model that is being loaded for one assignment of the alias."""

    assignment: int
    version_id: int
    model: "Future[Model]"


class AliasedModel:
    """The model version that an alias of a database points to. When the alias moves, the old model keeps scoring while
    the new one is loaded and warmed up."""

    alias: str
    # Logged when no model can serve.
    without_model: str

    def __init__(self, database: Database, serving: Serving, loader: ThreadPoolExecutor | None = None) -> None:
        self._database = database
        self._serving = serving
        self._active: UpgradableModel | None = None
        self._loading: Loading | None = None
        self._pause = Pause()  # after an assignment whose model could not be loaded
        self._lock = threading.Lock()
        self._loader = loader or ThreadPoolExecutor(1, "load")
        self.loading_since: float | None = None  # by `time.monotonic`, while a model is being loaded

    def current(self) -> Model | None:
        """The model to score the next window with; None when there is none.

        Blocks only while no model can serve. A failure to load is logged, never raised.
        """
        with self._lock:  # the poller of the worker calls this too
            while True:
                with self._database.read() as session:
                    assigned = self._assignment(session)
                    version = registry.get(session, assigned.model_version_id) if assigned else None
                if assigned is None or version is None:
                    self._on_absence()
                    return None
                wanted = self.version_id != version.id and self._pause.over(assigned.id)
                if self._loading is None and wanted:
                    self._start_loading(assigned.id, version)
                if self._loading is None or (self._active is not None and not self._loading.model.done()):
                    return self._active.current() if self._active else None
                self._finish_loading(self._loading, wanted and self._loading.assignment == assigned.id)

    @property
    def version_id(self) -> int | None:
        """The model version that scores now."""
        active = self._active
        return active.model.version_id if active else None

    @property
    def engine(self) -> str | None:
        """The name of the engine that runs it; of a cascade both, those of the student and the teacher."""
        active = self._active
        return " + ".join(part.engine.name for part in active.model.parts) if active else None

    def close(self) -> None:
        """End the trial of engines, if one is running."""
        if (active := self._active) is not None:
            active.close()

    def _assignment(self, session: Session) -> ModelAlias | None:
        """The assignment whose model is to be loaded; None when there is nothing to score with."""
        return registry.assignment(session, self.alias)

    def _load(self, version: ModelVersion) -> Model:
        return load_model(version, self._serving)

    def _on_absence(self) -> None:
        """Called when there is no assignment."""

    def _start_loading(self, assignment: int, version: ModelVersion) -> None:
        self.loading_since = time.monotonic()
        self._loading = Loading(assignment, version.id, self._loader.submit(self._load, version))

    def _finish_loading(self, loading: Loading, wanted: bool) -> None:
        """Let the loaded model score, unless the alias has moved on in the meantime."""
        try:
            model = loading.model.result()
            if wanted:
                before, self._active = self._active, UpgradableModel(model, TRIAL_AFTER_LOADING_SECONDS)
                if before is not None:
                    before.stop()
                freeze_loaded_objects(replaced=before is not None)
                del before
                log.info("model %d is the %s now", loading.version_id, self.alias)
        except Exception as error:
            # Any error may be temporary: memory that is short, a disk or a mount that fails.
            pause = self._begin_pause(error, loading)
            effect = f"model {self.version_id} keeps scoring" if self._active else self.without_model
            # Log only the text: the traceback refers to the caller's model and would keep its memory.
            log.error(
                "the %s, model %d, cannot be loaded, %s; trying again in %.0f s (%s: %s)",
                self.alias, loading.version_id, effect, pause, type(error).__name__, first_line(error),
            )  # fmt: skip
        finally:
            self._loading = self.loading_since = None

    def _begin_pause(self, error: Exception, loading: Loading) -> float:
        """Start the pause after a failure; returns its seconds."""
        # An unavailable store is not a fault of the model, and trying again is cheap.
        longest = FIRST_PAUSE_SECONDS if isinstance(error, StoreUnavailable) else LONGEST_PAUSE_SECONDS
        return self._pause.begin(loading.assignment, FIRST_PAUSE_SECONDS, longest)


class Champion(AliasedModel):
    """The model that scores the stream."""

    alias = registry.CHAMPION
    without_model = "tweets wait in the stream"
    _absence_logged = False

    def _on_absence(self) -> None:
        if not self._absence_logged:
            log.warning(
                "there is no champion yet: tweets wait in the stream; train a model, then "
                "`tweetscore models promote ID`"
            )
            self._absence_logged = True
            self._loader.submit(preload, self._serving.device)


class Challenger(AliasedModel):
    """The model that scores a share of the tweets after the champion; none while both aliases name the same version.

    It runs on the engine that a trial on this machine has selected before, else on float32 torch. It starts no trial,
    which would take the champion's cores.
    """

    alias = registry.CHALLENGER
    without_model = "only the champion scores"
    # Whether there was one at the last look, loaded or not.
    assigned = False

    def _assignment(self, session: Session) -> ModelAlias | None:
        found = registry.assignment(session, self.alias)
        if found is not None and found.model_version_id == registry.assigned(session, registry.CHAMPION):
            found = None
        self.assigned = found is not None
        return found

    def _load(self, version: ModelVersion) -> Model:
        model = super()._load(version)
        for part in model.parts:
            part.start_trial = None
        return model

    def _on_absence(self) -> None:
        if self._active is not None:
            log.info("model %d is not the challenger any more", self._active.model.version_id)
            self._active = None
            freeze_loaded_objects()
