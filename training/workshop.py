"""Where a training worker works."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from training.storage import Store


@dataclass(frozen=True)
class Workshop:
    """Where jobs are worked on and what they may reach; values, never the environment.

    `devices` are one a process that trains: the first is where a model is tested and, if it is the only one, trained.
    `checkpoint_store` is a remote one that follows what `jobs_folder` holds; None where that is all there is.
    `outages` counts by job how often in a row it was given back for want of a store.
    """

    model_store: Store
    input_store: Store
    jobs_folder: Path
    checkpoint_store: Store | None
    boards_folder: Path
    read_roots: Sequence[Path]
    devices: Sequence[str]
    lease_seconds: float
    max_attempts: int
    outages: Counter[int] = field(default_factory=Counter)
