"""Checkpoints of a training run. A run that is resumed from one gives the same result as an uninterrupted run.

step-STEP-WRITER     the full training state after a step, with the name of the best weights so far
best-EPOCH-WRITER    the weights of an epoch that was the best when it ended
result-PART-WRITER   arrays that a finished part of the run left; the part's own checkpoints are in a folder below

They are sealed folders (see `sealed_folder.py`). A damaged one is skipped with a warning, and the one before it is
used. With a remote store, checkpoints are also uploaded in a background thread, so another machine can resume the run.
WRITER is the fencing token: a stale process that wakes up never overwrites the files of its successor.
"""

import logging
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, load_model, save_model

from training.errors import BadArtifact
from training.loop.checkpoint_mirror import CheckpointMirror
from training.model.artifact import WEIGHTS, save_weights
from training.model.classifier import Classifier
from training.model.language_model import LanguageModel
from training.store.sealed_folder import new_sealed_folder, verify
from training.store.store import Store

log = logging.getLogger(__name__)

NEWEST_KEPT = 2
ARRAYS = "arrays.safetensors"


@dataclass
class Progress:
    """Position and figures of a run.

    `epoch` is the epoch in progress, from 1, and `batch` the number of its finished optimizer steps; `step` counts
    steps over all epochs. `loss_sum` is the sum of the epoch's losses over rows. `best` names the best weights.
    `tokens_at_once` is what the memory had room for after it was full, see `TokenBudget`.
    """

    epoch: int = 1
    batch: int = 0
    step: int = 0
    learning_rate: float = 0.0
    loss_sum: float = 0.0
    best: str | None = None
    best_f1_macro: float = -1.0
    history: list[dict[str, float]] = field(default_factory=list)
    tokens_at_once: int | None = None


@dataclass
class RunState:
    """The state that a checkpoint stores, besides random generators: everything the next step depends on."""

    model: Classifier | LanguageModel
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    progress: Progress

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device


class Checkpoints:
    """Checkpoints of one run in `folder`, optionally mirrored to a remote store.

    `writer` must differ between processes that write to the folder: it is the job's fencing token. As a context
    manager, leaving with an exception waits until pending checkpoints are uploaded, so that another machine can resume.
    """

    def __init__(
        self, folder: Path, writer: int = 0, store: Store | None = None, stored_name: str | None = None
    ) -> None:
        """`stored_name` is the folder's name in the store, by default its last part."""
        self.folder = folder
        self.writer = writer
        self._store = store
        self._stored_name = stored_name or folder.name
        self._mirror = None if store is None else CheckpointMirror(folder, self._stored_name, writer, store)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._mirror is not None:
            self._mirror.close(finish_uploads=kind is not None)

    def clear(self) -> None:
        """Remove all checkpoints, here and in the store. Called when the run has ended."""
        shutil.rmtree(self.folder, ignore_errors=True)
        if self._mirror is not None:
            self._mirror.clear()

    def of_part(self, number: int) -> "Checkpoints":
        """Return the checkpoints of a part of this run, in a folder below this one."""
        name = f"part{number}"
        return Checkpoints(self.folder / name, self.writer, self._store, f"{self._stored_name}/{name}")

    def save_result(self, number: int, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Write what a finished part of the run left. Raises `CannotSave`."""
        with new_sealed_folder(self.folder / f"result-{number:04d}-{self.writer:04d}") as draft:
            save_arrays(dict(arrays), str(draft / ARRAYS))
        if self._mirror is not None:
            self._mirror.schedule()

    def results(self) -> dict[int, dict[str, NDArray[Any]]]:
        """Return the saved results by the number of their part; damaged ones are left out."""
        self.fetch()
        found = {}
        for place in sorted(self.folder.glob("result-*")):
            try:
                verify(place)
            except BadArtifact as error:
                log.warning("%s cannot be used, its part is repeated: %s", place.name, error)
                continue
            found[int(place.name.split("-")[1])] = load_arrays(str(place / ARRAYS))
        return found

    def fetch(self) -> None:
        """Download what another machine stored in the folder, if its checkpoints are newer than those here."""
        if self._mirror is not None:
            self._mirror.fetch()

    def save(self, state: RunState) -> Path:
        """Write a checkpoint and return its folder. Raises `CannotSave`; earlier checkpoints then remain."""
        device = state.device
        place = self.folder / f"step-{state.progress.step:08d}-{self.writer:04d}"
        with new_sealed_folder(place) as draft:
            # Unlike `save_weights`, this also saves layers that share their weights.
            save_model(state.model.network, str(draft / WEIGHTS), {"format": "pt"})
            torch.save(
                {
                    "optimizer": state.optimizer.state_dict(),
                    "scheduler": state.scheduler.state_dict(),
                    "progress": asdict(state.progress),
                    "cpu_rng": torch.get_rng_state(),
                    # Only of the device in use: another machine may have a different number of GPUs.
                    "device_rng": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
                },
                draft / "state.pt",
            )
        self._prune()
        if self._mirror is not None:
            self._mirror.schedule()
        return place

    def save_best(self, epoch: int, model: Classifier) -> str:
        """Write an epoch's weights and return the folder's name, for `Progress.best`. Raises `CannotSave`."""
        place = self.folder / f"best-{epoch:04d}-{self.writer:04d}"
        with new_sealed_folder(place) as draft:
            save_weights(draft / WEIGHTS, model)
        return place.name

    def restore(self, state: RunState) -> bool:
        """Load the newest usable checkpoint into `state` and the random generators.

        Returns False, with `state` unchanged, when there is none.
        """
        self.fetch()
        for place in sorted(self.folder.glob("step-*"), reverse=True):
            try:
                verify(place)
                saved: dict[str, Any] = torch.load(place / "state.pt", weights_only=True)
                progress = Progress(**saved["progress"])
                device_rng = saved["device_rng"]
                if progress.best is not None:
                    verify(self.folder / progress.best)
            except (BadArtifact, TypeError, KeyError) as error:  # TypeError and KeyError: written by another version
                log.warning("checkpoint %s cannot be used, trying the previous one: %s", place.name, error)
                continue
            load_model(state.model.network, str(place / WEIGHTS))
            state.optimizer.load_state_dict(saved["optimizer"])
            state.scheduler.load_state_dict(saved["scheduler"])
            state.progress = progress
            torch.set_rng_state(saved["cpu_rng"])
            if device_rng is not None and state.device.type == "cuda":
                torch.cuda.set_rng_state(device_rng, state.device)
            return True
        return False

    def load_best(self, name: str, model: Classifier) -> None:
        """Load weights saved by `save_best`. Raises `BadArtifact` when they are damaged."""
        verify(self.folder / name)
        model.network.load_state_dict(load_file(str(self.folder / name / WEIGHTS)))

    def _prune(self) -> None:
        """Keep the two newest checkpoints, and the weights they can refer to: those of the two newest best epochs."""
        for old in sorted(self.folder.glob("step-*"))[:-NEWEST_KEPT]:
            shutil.rmtree(old, ignore_errors=True)
        best = sorted(self.folder.glob("best-*"))
        epochs = sorted({path.name.split("-")[1] for path in best})[-NEWEST_KEPT:]
        for old in best:
            if old.name.split("-")[1] not in epochs:
                shutil.rmtree(old, ignore_errors=True)
