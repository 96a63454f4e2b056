"""What the tests of training jobs share: a training context on this test's folders, and a job that ends soon."""

from pathlib import Path
from typing import Any

import pytest

from training.jobs.context import TrainingContext
from training.store.cache import Cache
from training.store.store import Store


@pytest.fixture
def context(tmp_path: Path, tiny_encoder: Path) -> TrainingContext:
    cache = Cache(tmp_path / "cache", 1_000_000_000)
    return TrainingContext(
        model_store=Store(tmp_path / "models", cache),
        input_store=Store(tmp_path, cache),
        jobs_folder=tmp_path / "jobs",
        checkpoint_store=None,
        boards_folder=tmp_path / "boards",
        read_roots=(tmp_path, tiny_encoder.parent),
        device="cpu",
        lease_seconds=30,
        max_attempts=3,
    )


@pytest.fixture
def base(tiny_encoder: Path) -> dict[str, Any]:
    """Settings of a job that ends within a second."""
    return {"base_model": str(tiny_encoder), "epochs": 2, "train_batch_size": 8, "baseline": False}


@pytest.fixture
def unreadable_csv(tmp_path: Path) -> Path:
    """A dataset that fails its job at once: row 2 is not UTF-8."""
    path = tmp_path / "bytes.csv"
    path.write_bytes(b"label,text\nx,\x82\n")
    return path
