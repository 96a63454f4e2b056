"""Where a training worker works."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Workshop:
    """Where jobs are worked on and what they may reach; values, never the environment."""

    model_store: Path
    jobs_folder: Path
    boards_folder: Path
    read_roots: Sequence[Path]
    device: str
    lease_seconds: float
    max_attempts: int
