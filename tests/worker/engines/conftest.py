"""A small model whose engines are tried."""

from pathlib import Path

import pytest
import torch

from tests.conftest import LABELS
from tests.support.artifacts import artifact_of
from training.config import make_config
from training.model.artifact import Artifact
from training.model.base_model import BaseModelFolder
from training.model.classifier import build_model


def artifact_in(folder: Path, encoder: Path, seed: int) -> Artifact:
    config = make_config("fast", base_model=str(encoder), seed=seed)
    model = build_model(BaseModelFolder("tiny", encoder), len(LABELS), config)
    torch.nn.init.normal_(model.network.classifier.weight, std=2.0)  # confident, as a trained model is
    return artifact_of(model.eval(), folder)


@pytest.fixture(scope="module")
def artifact(tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return artifact_in(tmp_path_factory.mktemp("engines") / "tiny", tiny_encoder, 200)
