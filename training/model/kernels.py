"""The attention and the dropout that train fastest on a device."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from training.model.devices import allow_cudnn_attention
from training.model.dropout import FastDropout, fast_dropout

# Architectures whose plain attention is `plain_attention`; those of others have more inputs.
WITH_PLAIN_ATTENTION = ("bert", "roberta", "distilbert")
PLAIN = "tweetscore_plain"
MASKED = "tweetscore_masked"


@contextmanager
def training_kernels(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Use other kernels until the block ends.

    On a CPU: plain attention and faster dropout. With texts of a few dozen tokens, torch's fused attention takes longer
    there, mostly in its backward pass. On a GPU: fused attention that always gets a mask, see `masked_always`.
    """
    on_cpu = device.type == "cpu"
    allow_cudnn_attention(False)
    network = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    implementation = getattr(network and network.config, "_attn_implementation", None)
    dropouts = [module for module in model.modules() if type(module) is nn.Dropout] if on_cpu else []
    try:
        if network is not None and implementation == "sdpa":
            if network.config.model_type in WITH_PLAIN_ATTENTION:
                network.set_attn_implementation(PLAIN if on_cpu else MASKED)
            elif on_cpu:
                network.set_attn_implementation("eager")
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


def masked_always(*arguments: Any, allow_is_bidirectional_skip: bool = False, **options: Any) -> Tensor | None:
    """Return transformers' mask of fused attention, also for a batch without padding.

    Transformers leaves out a mask that hides nothing. To find out, the host waits for the GPU once per forward pass.
    """
    mask: Tensor | None = sdpa_mask(*arguments, allow_is_bidirectional_skip=False, **options)
    return mask


AttentionInterface.register(PLAIN, plain_attention)
AttentionMaskInterface.register(PLAIN, eager_mask)
AttentionInterface.register(MASKED, sdpa_attention_forward)
AttentionMaskInterface.register(MASKED, masked_always)
