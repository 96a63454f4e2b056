"""Run a classifier over rows of token ids: logits, probabilities and loss."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from training.config import TrainConfig
from training.evaluation.decisions import Floats, to_probabilities
from training.model.batching import pad, plan_batches
from training.model.classifier import Classifier


@dataclass(frozen=True)
class Predictions:
    """`logits` and `probabilities` (N, K) float32 in the rows' order, and the mean loss over them."""

    logits: Floats
    probabilities: Floats
    loss: float


def loss_function(config: TrainConfig, targets: Floats | None = None) -> nn.Module:
    """Mean over rows; takes logits (B, K) and targets (B, K). The guide's is binary cross-entropy on every column.

    With `class_weights: balanced`, and the targets (N, K) it is to train on, each label counts as much as any other:
    cross-entropy weighs a row by N / (K * its label's rows), binary cross-entropy a label's rows against the others.
    """
    weights = None
    if config.class_weights == "balanced" and targets is not None:
        rows_of_label = targets.sum(axis=0).clip(min=1)
        others = len(targets) / targets.shape[1] if config.loss == "cross_entropy" else len(targets) - rows_of_label
        weights = torch.from_numpy(np.asarray(others / rows_of_label, np.float32))
    return nn.BCEWithLogitsLoss(pos_weight=weights) if config.loss == "bce" else nn.CrossEntropyLoss(weight=weights)


@torch.inference_mode()
def predict(
    model: Classifier,
    rows: Sequence[Sequence[int]],
    targets: Floats,
    config: TrainConfig,
    batch_size: int,
    pad_id: int,
    device: torch.device,
    between_batches: Callable[[], None] = lambda: None,
) -> Predictions:
    """Predict token-id rows, longest together so that little is padded; results come back in the rows' order."""
    model.eval()
    loss_of = loss_function(config)
    gathered = torch.zeros(targets.shape)
    loss = 0.0
    for index in plan_batches([len(row) for row in rows], batch_size=batch_size):
        ids, mask = pad([rows[i] for i in index], pad_id)
        logits = model(ids.to(device), mask.to(device)).float()
        loss += float(loss_of(logits, torch.from_numpy(targets[index]).to(device))) * len(index)
        gathered[index] = logits.cpu()
        between_batches()
    probabilities = to_probabilities(gathered, config.task).numpy()
    return Predictions(gathered.numpy(), probabilities, loss / len(rows))
