"""Dropout that is faster on a CPU: torch draws a float per value there, which took a sixth of the time of training."""

import torch
from torch import Tensor, nn

LOWEST = torch.iinfo(torch.int64).min
STEPS = 2**16


class FastDropout(nn.Dropout):
    """Dropout from 16 random bits a value. `p` is rounded to a multiple of 1/65536. Uses torch's random generator."""

    def forward(self, values: Tensor) -> Tensor:
        return fast_dropout(values, self.p) if self.training else values


def fast_dropout(values: Tensor, p: float) -> Tensor:
    """Return `values` with a share `p` of them set to 0 and the others divided by 1 - p."""
    dropped = min(round(p * STEPS), STEPS - 1)
    if dropped == 0:
        return values
    count = values.numel()
    drawn = torch.empty((count + 3) // 4, dtype=torch.int64).random_(LOWEST, None)
    bits = drawn.view(torch.int16)[:count].view(values.shape)
    return values * (bits >= dropped - STEPS // 2).to(values.dtype).mul_(STEPS / (STEPS - dropped))
