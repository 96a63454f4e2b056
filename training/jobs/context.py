"""Stores, paths and limits of a training worker."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from training.store.cache import Cache
from training.store.store import Store


@dataclass(frozen=True)
class TrainingContext:
    """Stores, folders, devices and limits for running jobs. Built from the settings; does not read the environment.

    `cache` keeps base models that have learned the sample. `device` is where a model is trained and evaluated.
    `checkpoint_store` is a remote store that mirrors `jobs_folder`, or None. `boards_folder` receives TensorBoard logs.
    `read_roots` are the folders that jobs may read. `outages` counts, by job id, the consecutive releases because a
    store was unavailable.
    """

    cache: Cache
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
