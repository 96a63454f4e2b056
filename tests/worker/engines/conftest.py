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
from training.store.paths import file_sha256
from training.store.sealed_folder import SUMS
from worker.engines.engine_choice import Choice
from worker.engines.engine_selection import choice_folder, load_engine
from worker.engines.engine_trial import TrialRequest, run_trial
from worker.engines.engines import Engine

CPU = torch.device("cpu")


def artifact_in(folder: Path, encoder: Path, seed: int) -> Artifact:
    config = make_config("fast", base_model=str(encoder), seed=seed)
    model = build_model(BaseModelFolder("tiny", encoder), len(LABELS), config)
    torch.nn.init.normal_(model.network.classifier.weight, std=2.0)  # confident, as a trained model is
    return artifact_of(model.eval(), folder)


@pytest.fixture(scope="module")
def artifact(tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return artifact_in(tmp_path_factory.mktemp("engines") / "tiny", tiny_encoder, 200)


def digest(artifact: Artifact) -> str:
    return file_sha256(artifact.folder / SUMS)


def load_after_trial(artifact: Artifact, wanted: str) -> tuple[Engine, Choice]:
    """The engine that a worker serves with once the trial has ended."""
    sha256 = digest(artifact)
    folders = [choice_folder(artifact.folder, sha256, CPU, wanted)]
    engine, choice, final = load_engine(artifact, CPU, wanted, folders)
    if not final:
        run_trial(TrialRequest(str(artifact.folder), sha256, "cpu", wanted, list(map(str, folders))))
        engine, choice, final = load_engine(artifact, CPU, wanted, folders)
    assert final
    return engine, choice
