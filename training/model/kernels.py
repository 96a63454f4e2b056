"""The attention and the dropout that train fastest on a device."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask

from training.model.dropout import FastDropout, fast_dropout

# Architectures whose plain attention is `plain_attention`; those of others have more inputs.
WITH_PLAIN_ATTENTION = ("bert", "roberta", "distilbert")
PLAIN = "tweetscore_plain"


@contextmanager
def training_kernels(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Use plain attention and faster dropout until the block ends when `device` is a CPU.

    With texts of a few dozen tokens, torch's fused attention takes longer there, mostly in its backward pass.
    """
    if device.type != "cpu":
        yield
        return
    network = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    implementation = getattr(network and network.config, "_attn_implementation", None)
    dropouts = [module for module in model.modules() if type(module) is nn.Dropout]
    try:
        if network is not None and implementation == "sdpa":
            plain = network.config.model_type in WITH_PLAIN_ATTENTION
            network.set_attn_implementation(PLAIN if plain else "eager")
        for module in dropouts:
            module.__class__ = FastDropout
        yield
    finally:
        for module in dropouts:
            module.__class__ = nn.Dropout
        if network is not None and implementation == "sdpa":
            network.set_attn_implementation("sdpa")


def plain_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Attention of transformers' kind "eager", with faster dropout: (B, T, A, D) and its shares (B, A, T, T).

    `query`, `key` and `value` are (B, A, T, D), and the mask (B, 1, T, T) is added to the scores.
    """
    scores = query @ key.transpose(2, 3) * scaling
    shares = (scores if attention_mask is None else scores + attention_mask).softmax(-1)
    if module.training:
        shares = fast_dropout(shares, dropout)
    return (shares @ value).transpose(1, 2).contiguous(), shares


AttentionInterface.register(PLAIN, plain_attention)
AttentionMaskInterface.register(PLAIN, eager_mask)
