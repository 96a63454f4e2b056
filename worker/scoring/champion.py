"""The champion model of a database: load it, replace it when the alias moves, retry when loading fails."""

import logging
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from db import registry
from db.models import ModelVersion
from db.session import Database
from training.errors import StoreUnavailable
from worker.scoring.backoff import Pause
from worker.scoring.engine_selection import first_line
from worker.scoring.scoring_model import ScoringModel, Serving, UpgradableModel, freeze_loaded_objects, load_model

log = logging.getLogger(__name__)

# Pauses after a model could not be loaded: they double up to the longest. When a store was unavailable, the pause is
# always the first one.
FIRST_PAUSE_SECONDS = 5.0
LONGEST_PAUSE_SECONDS = 300.0


@dataclass(frozen=True)
class Loading:
    """A model that is being loaded for one assignment of the alias."""

    assignment: int
    version_id: int
    model: "Future[ScoringModel]"


class Champion:
    """The champion of a database. When the alias moves, the old model keeps scoring while the new one is loaded and
    warmed up."""

    def __init__(self, database: Database, serving: Serving) -> None:
        self._database = database
        self._serving = serving
        self._active: UpgradableModel | None = None
        self._loading: Loading | None = None
        self._pause = Pause()  # after an assignment whose model could not be loaded
        self._absence_logged = False
        self._lock = threading.Lock()
        self._loader = ThreadPoolExecutor(1, "load")
        self.loading_since: float | None = None  # by `time.monotonic`, while a model is being loaded

    def current(self) -> ScoringModel | None:
        """The model to score the next window with; None without a champion, which is logged once.

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
        """The name of the engine that runs it."""
        active = self._active
        return active.model.engine.name if active else None

    def close(self) -> None:
        """End the trial of engines, if one is running."""
        if (active := self._active) is not None:
            active.close()

    def _start_loading(self, assignment: int, version: ModelVersion) -> None:
        self.loading_since = time.monotonic()
        self._loading = Loading(assignment, version.id, self._loader.submit(load_model, version, self._serving))

    def _finish_loading(self, loading: Loading, wanted: bool) -> None:
        """Make the loaded model the champion, unless the alias has moved on in the meantime."""
        try:
            model = loading.model.result()
            if wanted:
                if self._active is not None:
                    self._active.stop()
                self._active = UpgradableModel(model)
                self._absence_logged = False
                freeze_loaded_objects()
                log.info("model %d is the champion now", loading.version_id)
        except Exception as error:
            # Any error may be temporary: memory that is short, a disk or a mount that fails.
            pause = self._begin_pause(error, loading)
            effect = f"model {self.version_id} keeps scoring" if self._active else "tweets wait in the stream"
            # Log only the text: the traceback refers to the caller's model and would keep its memory.
            log.error(
                "the champion, model %d, cannot be loaded, %s; trying again in %.0f s (%s: %s)",
                loading.version_id, effect, pause, type(error).__name__, first_line(error),
            )  # fmt: skip
        finally:
            self._loading = self.loading_since = None

    def _begin_pause(self, error: Exception, loading: Loading) -> float:
        """Start the pause after a failure; returns its seconds."""
        # An unavailable store is not a fault of the model, and trying again is cheap.
        longest = FIRST_PAUSE_SECONDS if isinstance(error, StoreUnavailable) else LONGEST_PAUSE_SECONDS
        return self._pause.begin(loading.assignment, FIRST_PAUSE_SECONDS, longest)

    def _log_absence(self) -> None:
        if not self._absence_logged:
            log.warning(
                "there is no champion yet: tweets wait in the stream; train a model, then "
                "`tweetscore models promote ID`"
            )
            self._absence_logged = True
            self._loader.submit(_preload)


def _preload() -> None:
    """Import modules that the first model needs: this takes more than a second, and there is no model to load yet."""
    import transformers.models.bert.modeling_bert  # noqa: F401
