"""All that is known of a trained model at the end of its job. Knows no SQL and no files."""

from dataclasses import dataclass
from functools import cached_property

import torch

from training.artifact import Spec
from training.checkpoint import Epoch
from training.dataset import Dataset
from training.decide import Floats, to_probabilities
from training.evaluate import Figures


@dataclass(frozen=True)
class Outcome:
    """`dataset_name` and `dataset_sha256` say what `data` was read from; `logits` (N, K) are of the test rows."""

    job_id: int
    fencing_token: int
    spec: Spec
    dataset_name: str
    dataset_sha256: str
    data: Dataset
    history: list[Epoch]
    figures: Figures
    logits: Floats

    @cached_property
    def probabilities(self) -> Floats:
        """(N, K) of the test rows, as scoring would give them."""
        return self.probabilities_at(self.spec.temperature)

    def probabilities_at(self, temperature: float) -> Floats:
        scaled: Floats = to_probabilities(torch.from_numpy(self.logits), self.spec.config.task, temperature).numpy()
        return scaled
