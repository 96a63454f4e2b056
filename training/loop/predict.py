"""Run a classifier over rows of token ids: logits, probabilities and loss."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from training.config import TrainConfig
from training.evaluation.decisions import Floats, to_probabilities
from training.loop.memory import TokenBudget
from training.loop.overlap import pinned
from training.model.batching import pad, plan_batches
from training.model.classifier import Classifier

# A tenth of a row's target goes to each neighbour of its level. With 1 a quarter does, which raised the log loss on
# three levels of reviews; with 2 it stayed the same, and kappa and the absolute error improved.
SHARPNESS = 2.0


@dataclass(frozen=True)
class Predictions:
    """`logits` and `probabilities` (N, K) float32 in the order of the rows, and the mean loss over the rows."""

    logits: Floats
    probabilities: Floats
    loss: float


def loss_function(config: TrainConfig, targets: Floats | None = None, reduction: str = "mean") -> nn.Module:
    """Return the loss of logits (B, K) and targets (B, K). The guide uses `bce`.

    The loss is a mean over rows. With `reduction="none"` it is the loss of each row (B,), or for `bce` of each row and
    label (B, K).

    With `class_weights: balanced` every label has the same weight. `targets` (N, K) are those of the training rows.
    Cross-entropy weights a row by N / (K * rows of its label). Binary cross-entropy weights the positive rows of a
    label by the ratio of negative to positive rows.

    The targets of an ordinal task are spread over neighbouring levels, see `OrdinalLoss`.
    """
    if config.loss == "mse":
        return nn.MSELoss(reduction=reduction)
    weights = None
    if config.class_weights == "balanced" and targets is not None:
        rows_of_label = targets.sum(axis=0).clip(min=1)
        others = len(targets) / targets.shape[1] if config.loss == "cross_entropy" else len(targets) - rows_of_label
        weights = torch.from_numpy(np.asarray(others / rows_of_label, np.float32))
    if config.loss == "bce":
        return nn.BCEWithLogitsLoss(pos_weight=weights, reduction=reduction)
    if config.task == "ordinal":
        return OrdinalLoss(weights, reduction)
    return nn.CrossEntropyLoss(weight=weights, reduction=reduction)


class OrdinalLoss(nn.Module):
    """Cross-entropy against targets that are spread over the neighbours of the actual level.

    The soft labels of Diaz and Marathe (2019), "Soft Labels for Ordinal Regression": the target of level j in a row of
    level i is the softmax over j of -`SHARPNESS` (i - j)^2. A row whose targets are probabilities gets their mixture.
    `weights` (K,) multiply the terms of the levels.
    """

    def __init__(self, weights: Tensor | None, reduction: str) -> None:
        super().__init__()
        self.cross_entropy = nn.CrossEntropyLoss(weight=weights, reduction=reduction)

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of logits (B, K) and targets (B, K)."""
        loss: Tensor = self.cross_entropy(logits, targets @ soft_levels(targets.shape[1], targets.device))
        return loss


def soft_levels(levels: int, device: torch.device | None = None) -> Tensor:
    """Return the soft labels (K, K) of each level; every row sums to 1."""
    steps = torch.arange(levels, dtype=torch.float32, device=device)
    return (-SHARPNESS * (steps[:, None] - steps) ** 2).softmax(dim=1)


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
    """Return the predictions of rows of token ids, in their order.

    Rows of similar length share a batch, which keeps padding low. `between_batches` may raise to stop. Batches that do
    not fit into the memory are computed in pieces.
    """

    def forward(pieces: list[list[int]]) -> Tensor:
        return torch.cat([_logits(model, [rows[i] for i in piece], pad_id, device) for piece in pieces])

    model.eval()
    lengths = [len(row) for row in rows]
    budget = TokenBudget(device, lengths)
    loss_of = loss_function(config)
    all_logits = torch.zeros(targets.shape)
    loss = 0.0
    for index in plan_batches(lengths, batch_size=batch_size):
        logits = budget.run([index], forward)
        loss += float(loss_of(logits, torch.from_numpy(targets[index]))) * len(index)
        all_logits[index] = logits
        between_batches()
    probabilities = to_probabilities(all_logits, config.task).numpy()
    return Predictions(all_logits.numpy(), probabilities, loss / len(rows))


def _logits(model: Classifier, rows: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> Tensor:
    """Return logits (B, K) float32 on the CPU."""
    ids, mask = (pinned(tensor, device).to(device, non_blocking=True) for tensor in pad(rows, pad_id))
    logits: Tensor = model(ids, mask).float().cpu()
    return logits
