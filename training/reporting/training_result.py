"""The result of a training job: what is registered and described in the model card."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from training.data.dataset import Dataset, Split
from training.evaluation.decisions import Floats, to_probabilities
from training.evaluation.epoch import Epoch
from training.evaluation.metrics import Figures
from training.model.artifact import Spec

Values = NDArray[np.float64]


@dataclass(frozen=True)
class OutOfFold:
    """Calibrated `probabilities` (N, K) of the rows of a cross-validation, each by a model that was not trained on it.

    `folds` (N,) are the numbers of the folds, from 1, that the rows were held out in.
    """

    rows: Split
    probabilities: Floats
    folds: NDArray[np.int64]


@dataclass(frozen=True)
class TrainingResult:
    """Result of a training job.

    `dataset_name` and `dataset_sha256` identify the file that `data` was read from. `logits` (N, K) float32 are those
    of the test rows, `unknown_shares` those of their tokens that the model does not know. `history` has one entry per
    epoch. `out_of_fold` is None without a cross-validation.
    """

    job_id: int
    fencing_token: int
    spec: Spec
    dataset_name: str
    dataset_sha256: str
    data: Dataset
    history: list[Epoch]
    figures: Figures
    logits: Floats
    out_of_fold: OutOfFold | None = None
    unknown_shares: Sequence[float | None] | None = None

    @cached_property
    def probabilities(self) -> Floats:
        """Probabilities (N, K) of the test rows at the model's temperature, as in scoring."""
        return self.probabilities_at(self.spec.temperature)

    def values(self, outputs: Floats) -> Values:
        """Return targets or outputs (N, 1) of a continuous task as values (N,)."""
        assert self.spec.scale is not None  # noqa: S101 - every continuous model has a scale
        return self.spec.scale.values(outputs)[:, 0]

    def probabilities_at(self, temperature: float) -> Floats:
        """Return the probabilities (N, K) of the test rows at a temperature."""
        scaled: Floats = to_probabilities(torch.from_numpy(self.logits), self.spec.config.task, temperature).numpy()
        return scaled
