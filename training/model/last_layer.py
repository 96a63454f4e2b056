"""The last encoder layer for the first position only, for heads that read nothing else.

There the last layer has one query a row, so its keys and values need not be computed for every token: the score of a
token x is q (W x) = (q W) x, and the output is W (sum of p x) instead of the sum of p (W x). Logits and gradients are
those of the whole layer. Weights and their names stay the same, so other programs load the model as before.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

# Encoders of transformers, and classifiers whose own head reads the first position.
NETWORKS = (
    "BertModel",
    "BertForSequenceClassification",
    "RobertaModel",
    "RobertaForSequenceClassification",
    "DistilBertModel",
    "DistilBertForSequenceClassification",
)
# The attention implementations of transformers whose mask is (B, 1, T, T).
WITH_FULL_MASK = ("sdpa", "eager")


class FirstPosition:
    """Marks a layer that returns (B, 1, H), the output of the first position."""


def compute_first_position_only(network: Any) -> None:
    """Let the last layer of a BERT, RoBERTa or DistilBERT compute the first position only; others stay as they are.

    `network` is an encoder, or a sequence classifier with its own head.
    """
    encoder_config, kind = network.config, type(network)
    if not kind.__module__.startswith("transformers.models.") or kind.__name__ not in NETWORKS:
        return
    if encoder_config._attn_implementation not in WITH_FULL_MASK or getattr(encoder_config, "is_decoder", False):
        return
    encoder = network.base_model
    last = (encoder.transformer if encoder_config.model_type == "distilbert" else encoder.encoder).layer[-1]
    # Exact types: a subclass, of another release of transformers for example, may compute something else.
    plain: Any = type(last)
    if plain.__name__ in FORWARDS:
        # The class of the object and not its `forward`, so that copies of the model keep it.
        last.__class__ = _first_position_class(plain)


@cache
def _first_position_class(plain: type[nn.Module]) -> type[nn.Module]:
    """The subclass of a layer's class. Made when it is needed, as importing all architectures takes half a second."""
    return type(f"FirstPosition{plain.__name__}", (FirstPosition, plain), {"forward": FORWARDS[plain.__name__]})


def _forward_bert(
    layer: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, *_: Any, **__: Any
) -> Tensor:
    """`forward` of a layer of BERT or RoBERTa."""
    attention = layer.attention.self
    projections = (attention.query, attention.key, attention.value)
    attended = attend_from_first(attention, projections, hidden_states, attention_mask)
    output: Tensor = layer.feed_forward_chunk(layer.attention.output(attended, hidden_states[:, :1]))
    return output


def _forward_distilbert(layer: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **_: Any) -> Tensor:
    """`forward` of a layer of DistilBERT."""
    attention = layer.attention
    projections = (attention.q_lin, attention.k_lin, attention.v_lin)
    attended = attention.out_lin(attend_from_first(attention, projections, hidden_states, attention_mask))
    attended = layer.sa_layer_norm(attended + hidden_states[:, :1])
    output: Tensor = layer.output_layer_norm(layer.ffn(attended) + attended)
    return output


FORWARDS = {"BertLayer": _forward_bert, "RobertaLayer": _forward_bert, "TransformerBlock": _forward_distilbert}


def attend_from_first(
    attention: Any, projections: tuple[nn.Linear, nn.Linear, nn.Linear], hidden_states: Tensor, mask: Tensor | None
) -> Tensor:
    """Return what the first position attends to (B, 1, H), for hidden states (B, T, H) and a mask (B, 1, T, T).

    The mask is boolean, True for tokens to read, or is added to the scores; without one all tokens are read.
    `projections` are those of query, key and value. The key's bias is left out: it changes all scores of a query by
    the same amount, which softmax cancels.
    """
    query, key, value = projections
    size: int = attention.attention_head_size
    heads = query.out_features // size  # A; D is the size of a head
    queries = (query(hidden_states[:, 0]) * attention.scaling).view(-1, heads, size).transpose(0, 1)  # (A, B, D)
    queries = (queries @ key.weight.view(heads, size, -1)).transpose(0, 1)  # (B, A, H)
    scores = queries @ hidden_states.transpose(1, 2)  # (B, A, T)
    if mask is not None:
        of_first = mask[:, 0, :1]  # (B, 1, T)
        scores = scores.masked_fill(~of_first, -torch.inf) if mask.dtype == torch.bool else scores + of_first
    shares = attention.dropout(scores.softmax(-1))
    read = (shares @ hidden_states).transpose(0, 1)  # (A, B, H)
    values = (read @ value.weight.view(heads, size, -1).transpose(1, 2)).transpose(0, 1)  # (B, A, D)
    # With dropout the shares of a head do not sum to 1.
    values = values + shares.sum(-1, keepdim=True) * value.bias.view(heads, size)
    return torch.reshape(values, (-1, 1, heads * size))
