"""Logits of many rows, without targets: of a teacher, or the passes with dropout that tell how certain a model is."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn

from training.evaluation.decisions import Floats
from training.loop.memory import TokenBudget, tokens_at_once
from training.loop.overlap import pinned
from training.model.batching import pad, plan_batches
from training.model.classifier import Classifier, half_precision


@torch.inference_mode()
def logits_of(
    model: Classifier,
    rows: Sequence[Sequence[int]],
    pad_id: int,
    device: torch.device,
    *,
    precision: str = "float32",
    dropout: bool = False,
    between_batches: Callable[[], None] = lambda: None,
) -> Floats:
    """Return logits (N, K) float32 of rows of token ids, in their order. `between_batches` may raise to stop.

    With `dropout` the dropout layers are active, so that each call gives other logits; normalisation layers stay as in
    scoring.
    """
    model.to(device).eval()
    for layer in model.modules():
        if dropout and isinstance(layer, nn.Dropout):
            layer.train()
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=half_precision(device, precision))
    lengths = [len(row) for row in rows]
    budget = TokenBudget(device, lengths)

    def forward(pieces: list[list[int]]) -> list[Floats]:
        """Return the logits (K,) of each row."""
        logits: list[Floats] = []
        for piece in pieces:
            padded = pad([rows[i] for i in piece], pad_id)
            ids, mask = (pinned(tensor, device).to(device, non_blocking=True) for tensor in padded)
            with autocast:
                logits += list(model(ids, mask).float().cpu().numpy())
        return logits

    found: dict[int, Floats] = {}
    for index in plan_batches(lengths, token_budget=tokens_at_once(device)):
        found |= dict(zip(index, budget.run([index], forward), strict=True))
        between_batches()
    model.eval()
    return np.stack([found[i] for i in range(len(rows))])
