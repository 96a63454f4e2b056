"""Where a training worker works."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from training.storage import Store


@dataclass(frozen=True)
class Workshop:
    """Where jobs are worked on and what they may reach; values, never the environment.

    `device` is where a model is trained and tested, as `pick_device` takes it.
    `checkpoint_store` is a remote one that follows what `jobs_folder` holds; None where that is all there is.
    `outages` counts by job how often in a row it was given back for want of a store.
    """

    model_store: Store
    input_store: Store
    jobs_folder: Path
    checkpoint_store: Store | None
    boards_folder: Path
    read_roots: Sequence[Path]
    device: str
    lease_seconds: float
    max_attempts: int
    outages: Counter[int] = field(default_factory=Counter)
