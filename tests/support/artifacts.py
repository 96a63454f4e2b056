"""Artifacts with the validation rows that engines are compared on."""

from pathlib import Path

import numpy as np
import torch

from tests.conftest import LABELS
from training.loop.predict import predict
from training.model.artifact import Artifact, load_artifact, make_reference, make_spec, save_artifact
from training.model.base_model import STARTER_FOLDER, BaseModelFolder
from training.model.classifier import Classifier
from training.text.tokenizer import load_tokenizer

CPU = torch.device("cpu")


def random_rows(n: int, seed: int = 0) -> list[list[int]]:
    """Token ids of 3 to 60 tokens, framed as by a tokenizer."""
    generator = np.random.default_rng(seed)
    return [[2, *generator.integers(5, 3000, generator.integers(1, 59)).tolist(), 3] for _ in range(n)]


def artifact_of(model: Classifier, folder: Path) -> Artifact:
    """The model saved and loaded again, with validation rows and their float32 logits."""
    tokenizer = load_tokenizer(STARTER_FOLDER)
    rows = random_rows(200)
    targets = np.zeros((len(rows), len(LABELS)), np.float32)
    logits = predict(model, rows, targets, model.config, 32, tokenizer.pad_token_id, CPU).logits
    spec = make_spec(LABELS, model.config, BaseModelFolder("tiny", STARTER_FOLDER), tokenizer)
    save_artifact(folder, model, tokenizer, spec, make_reference(rows, logits))
    return load_artifact(folder)
