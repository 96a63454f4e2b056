"""Compare the speed of models on the same device."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from training.loop.logits import logits_of
from training.model.classifier import Classifier

ROUNDS = 3
# Rows of a measurement; fewer rows are repeated. A GPU needs more for a measurable time.
ROWS = {"cpu": 256, "cuda": 8_192}


@dataclass(frozen=True)
class Timed:
    """A model, and the token ids that it reads for the rows of a measurement."""

    model: Classifier
    rows: Sequence[Sequence[int]]
    pad_id: int


def rows_per_second(
    models: Mapping[str, Timed], device: torch.device, between_batches: Callable[[], None] = lambda: None
) -> dict[str, float]:
    """Return the rows per second of each model in float32 PyTorch, without tokenising: the best of `ROUNDS` rounds.

    The models take turns, so that other load on the machine slows all of them.
    """
    best = dict.fromkeys(models, 0.0)
    count = ROWS.get(device.type, ROWS["cuda"])
    for _ in range(ROUNDS):
        for name, timed in models.items():
            rows = [timed.rows[i % len(timed.rows)] for i in range(count)]
            began = time.perf_counter()
            logits_of(timed.model, rows, timed.pad_id, device, between_batches=between_batches)
            best[name] = max(best[name], count / (time.perf_counter() - began))
    return best
