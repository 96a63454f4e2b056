"""A model whose last layer computes every position, as plain transformers do, to compare with."""

import copy
from pathlib import Path

import torch

from training.model.artifact import load_artifact
from training.model.classifier import Classifier
from training.model.last_layer import FIRST_POSITION
from worker.scoring.engines import Engine, EngineBuilder


def whole_last_layer(model: Classifier) -> Classifier:
    """A copy of a model that computes every position."""
    whole = {first: plain for plain, first in FIRST_POSITION.items()}
    copied = copy.deepcopy(model)
    for layer in copied.modules():
        if type(layer) in whole:
            layer.__class__ = whole[type(layer)]
    return copied


def whole_engine(folder: Path, name: str) -> Engine:
    """An engine of an artifact whose last layer computes every position."""
    return EngineBuilder(whole_last_layer(load_artifact(folder).model), torch.device("cpu")).build(name)
