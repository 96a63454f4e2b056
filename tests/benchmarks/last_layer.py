"""A model whose last layer computes every position, as plain transformers do, to compare with."""

import copy
from pathlib import Path

import torch

from training.model.artifact import load_artifact
from training.model.classifier import Classifier
from training.model.last_layer import FirstPosition
from worker.engines.engines import Engine, EngineBuilder


def whole_last_layer(model: Classifier) -> Classifier:
    """A copy of a model that computes every position."""
    copied = copy.deepcopy(model)
    for layer in copied.modules():
        if isinstance(layer, FirstPosition):
            layer.__class__ = type(layer).__bases__[1]
    return copied


def whole_engine(folder: Path, name: str) -> Engine:
    """An engine of an artifact whose last layer computes every position."""
    return EngineBuilder(whole_last_layer(load_artifact(folder).model), torch.device("cpu")).build(name)
