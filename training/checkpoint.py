"""The whole state of a training run in a folder, so that another process goes on as if nothing had happened.

step-STEP-WRITER     everything that decides the next step; names the best weights so far
best-EPOCH-WRITER    weights of an epoch that was the best when it ended

Both are sealed like an artifact: digested, synced, renamed. A torn one is passed over, aloud, for the one before it.
With a remote store another machine can go on: what the folder holds follows there, from a thread of its own.
WRITER keeps processes apart: one that was given up for dead and wakes writes beside its successor, never over it.
"""

import logging
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import load_file

from training.artifact import WEIGHTS, save_weights
from training.errors import BadArtifact
from training.mirror import Mirror
from training.model import Classifier
from training.sealed import drafted, verify
from training.storage import Store

log = logging.getLogger(__name__)

NEWEST_KEPT = 2


@dataclass(frozen=True)
class Epoch:
    """One epoch's figures; losses are means over rows, `learning_rate` is that of its last step.

    `kept`: when it ended its weights took the place of those kept before. The last such epoch is the model.
    """

    epoch: int
    train_loss: float
    learning_rate: float
    valid_loss: float
    valid_accuracy: float
    valid_f1_macro: float
    seconds: float
    kept: bool = True


@dataclass
class Progress:
    """Where a run stands. `batch` counts the finished batches of `epoch` (from 1); the rest is of whole epochs."""

    epoch: int = 1
    batch: int = 0
    step: int = 0
    learning_rate: float = 0.0
    loss_sum: float = 0.0
    best: str | None = None
    best_f1_macro: float = -1.0
    history: list[dict[str, float]] = field(default_factory=list)


@dataclass
class RunState:
    """What a checkpoint holds: everything that decides the next step."""

    model: Classifier
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    progress: Progress

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device


class Checkpoints:
    """The checkpoints of one run in `folder`; `writer` is a number no other process that writes there has.

    As a context that an error ends it waits until the store, if there is one, has what the folder has.
    """

    def __init__(self, folder: Path, writer: int = 0, store: Store | None = None) -> None:
        self.folder = folder
        self.writer = writer
        self._mirror = None if store is None else Mirror(folder, writer, store)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._mirror is not None:
            self._mirror.close(needed=kind is not None)

    def clear(self) -> None:
        """The run has ended and needs none any more."""
        shutil.rmtree(self.folder, ignore_errors=True)
        if self._mirror is not None:
            self._mirror.clear()

    def save(self, state: RunState) -> Path:
        """Keep the state as it is now. Raises `CannotSave`, with the earlier ones as they were."""
        device = state.device
        place = self.folder / f"step-{state.progress.step:08d}-{self.writer:04d}"
        with drafted(place) as draft:
            save_weights(draft / WEIGHTS, state.model)
            torch.save(
                {
                    "optimizer": state.optimizer.state_dict(),
                    "scheduler": state.scheduler.state_dict(),
                    "progress": asdict(state.progress),
                    "cpu_rng": torch.get_rng_state(),
                    # Of the device at work: another machine may have more of them, or fewer.
                    "device_rng": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
                },
                draft / "state.pt",
            )
        self._prune()
        if self._mirror is not None:
            self._mirror.follow()
        return place

    def save_best(self, epoch: int, model: Classifier) -> str:
        """Keep an epoch's weights; returns the name a checkpoint refers to them by. Raises `CannotSave`."""
        place = self.folder / f"best-{epoch:04d}-{self.writer:04d}"
        with drafted(place) as draft:
            save_weights(draft / WEIGHTS, model)
        return place.name

    def restore(self, state: RunState) -> bool:
        """Load the newest whole checkpoint into `state`, random generators included; False when there is none."""
        if self._mirror is not None:
            self._mirror.fetch()
        for place in sorted(self.folder.glob("step-*"), reverse=True):
            try:
                verify(place)
                saved: dict[str, Any] = torch.load(place / "state.pt", weights_only=True)
                progress = Progress(**saved["progress"])
                device_rng = saved["device_rng"]
                if progress.best is not None:
                    verify(self.folder / progress.best)
            except (BadArtifact, TypeError, KeyError) as error:  # the latter two of what another version wrote
                log.warning("checkpoint %s cannot be used, trying the one before: %s", place.name, error)
                continue
            state.model.network.load_state_dict(load_file(str(place / WEIGHTS)))
            state.optimizer.load_state_dict(saved["optimizer"])
            state.scheduler.load_state_dict(saved["scheduler"])
            state.progress = progress
            torch.set_rng_state(saved["cpu_rng"])
            if device_rng is not None and state.device.type == "cuda":
                torch.cuda.set_rng_state(device_rng, state.device)
            return True
        return False

    def load_best(self, name: str, model: Classifier) -> None:
        """Raises `BadArtifact` when the weights are not as they were saved."""
        verify(self.folder / name)
        model.network.load_state_dict(load_file(str(self.folder / name / WEIGHTS)))

    def _prune(self) -> None:
        """Keep the newest two checkpoints, and the best weights that they can name: those of the last two epochs that
        were best in their turn."""
        for old in sorted(self.folder.glob("step-*"))[:-NEWEST_KEPT]:
            shutil.rmtree(old, ignore_errors=True)
        best = sorted(self.folder.glob("best-*"))
        epochs = sorted({path.name.split("-")[1] for path in best})[-NEWEST_KEPT:]
        for old in best:
            if old.name.split("-")[1] not in epochs:
                shutil.rmtree(old, ignore_errors=True)
