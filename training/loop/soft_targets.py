"""Targets that are a teacher's probabilities, and their part of the loss: distillation after Hinton et al. (2015)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SoftTargets:
    """A teacher's `probabilities` (N, K) of the training rows, at a `temperature` above 0.

    `shares` (N,), 0 to 1, are the parts that they have in the losses of the rows; a row's own target has the rest.
    """

    probabilities: Tensor
    shares: Tensor
    temperature: float

    def to(self, device: torch.device) -> "SoftTargets":
        return SoftTargets(self.probabilities.to(device), self.shares.to(device), self.temperature)

    def mix(self, own: Tensor, logits: Tensor, index: Tensor, loss_of: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Return (1 - share) * own + share * T^2 * loss_of(logits / T, probabilities) for the rows `index` (B,): (B,).

        `own` (B,) or (B, K) is the loss of the rows' own targets, `logits` (B, K), and `loss_of` returns a loss like
        `own`. The gradient of the second loss shrinks with T^2; the factor makes up for it.
        """
        soft = loss_of(logits / self.temperature, self.probabilities[index]) * self.temperature**2
        shares = self.shares[index]
        return (1 - shares) * _of_row(own) + shares * _of_row(soft)


def _of_row(loss: Tensor) -> Tensor:
    return loss.reshape(len(loss), -1).mean(1)
