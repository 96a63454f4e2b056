"""The attention kernel that trains fastest on a device."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel


@contextmanager
def training_attention(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Use plain attention until the block ends when `device` is a CPU.

    With texts of a few dozen tokens, torch's fused attention takes longer there, mostly in its backward pass.
    """
    network = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if network is None or device.type != "cpu" or network.config._attn_implementation != "sdpa":
        yield
        return
    network.set_attn_implementation("eager")
    try:
        yield
    finally:
        network.set_attn_implementation("sdpa")
