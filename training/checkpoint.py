"""The whole state of a training run in a folder, so that another process goes on as if nothing had happened.

A checkpoint is sealed like an artifact: digested, synced, renamed. A torn one is passed over, aloud, for the one
before it.
"""

import logging
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from training.artifact import seal, verify
from training.errors import BadArtifact

log = logging.getLogger(__name__)

NEWEST_KEPT = 2


@dataclass
class Progress:
    """Where a run stands. `batch` counts the finished batches of `epoch` (from 1); the rest is of whole epochs."""

    epoch: int = 1
    batch: int = 0
    step: int = 0
    learning_rate: float = 0.0
    loss_sum: float = 0.0
    best_epoch: int = 0
    best_f1_macro: float = -1.0
    history: list[dict[str, float]] = field(default_factory=list)


@dataclass
class RunState:
    """What a checkpoint holds: everything that decides the next step."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    progress: Progress


def save_checkpoint(folder: Path, state: RunState) -> Path:
    """Write `step-N` below `folder`; older ones go, except the newest two. Returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    place = folder / f"step-{state.progress.step:08d}"
    draft = folder / f".{place.name}.draft"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    save_weights(draft / "model.safetensors", state.model)
    torch.save(
        {
            "optimizer": state.optimizer.state_dict(),
            "scheduler": state.scheduler.state_dict(),
            "progress": asdict(state.progress),
            "cpu_rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        },
        draft / "state.pt",
    )
    seal(draft, place)
    for old in sorted(folder.glob("step-*"))[:-NEWEST_KEPT]:
        shutil.rmtree(old)
    return place


def restore_newest(folder: Path, state: RunState) -> bool:
    """Load the newest whole checkpoint into `state`, random generators included; False when there is none."""
    for place in sorted(folder.glob("step-*"), reverse=True):
        try:
            verify(place)
        except BadArtifact as error:
            log.warning("checkpoint %s is damaged, trying the one before: %s", place.name, error)
            continue
        saved: dict[str, Any] = torch.load(place / "state.pt", weights_only=True)
        state.model.load_state_dict(load_file(str(place / "model.safetensors")))
        state.optimizer.load_state_dict(saved["optimizer"])
        state.scheduler.load_state_dict(saved["scheduler"])
        state.progress = Progress(**saved["progress"])
        torch.set_rng_state(saved["cpu_rng"])
        if saved["cuda_rng"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(saved["cuda_rng"])
        return True
    return False


def save_best(folder: Path, model: nn.Module) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    draft = folder / ".best.draft"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    save_weights(draft / "model.safetensors", model)
    seal(draft, folder / "best")


def load_best(folder: Path, model: nn.Module) -> None:
    verify(folder / "best")
    model.load_state_dict(load_file(str(folder / "best" / "model.safetensors")))


def save_weights(path: Path, model: nn.Module) -> None:
    state: dict[str, Tensor] = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, str(path), metadata={"format": "pt"})
