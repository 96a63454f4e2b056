"""What the tests of training jobs share: a training context on this test's folders, and a job that ends soon."""

from pathlib import Path
from typing import Any

import pytest

from tests.support.training_jobs import context_in
from training.jobs.context import TrainingContext


@pytest.fixture
def context(tmp_path: Path, tiny_encoder: Path) -> TrainingContext:
    return context_in(tmp_path, tiny_encoder)


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
