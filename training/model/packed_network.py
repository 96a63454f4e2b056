"""A classifier over packed rows: several texts share a row, and a token reads only tokens of its own text.

For encoders of the kind BERT, whose layers are the same five matrix products whatever their names. It shares nothing
with the classifier that it is made of. The logits are those of padded batches, within the precision of the arithmetic.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from training.model.classifier import Classifier, NativeClassifier

# Architectures of transformers that can be packed, and the beginnings of the names of their classes.
ENCODERS = {"bert": "Bert", "roberta": "Roberta", "distilbert": "DistilBert"}

# The names of torch's and of transformers' classes: to import the latter takes time.
GELU = ("GELU", "GELUActivation")

# Takes queries (R, S, A, D), keys and values (R, T, A, D), and returns (R, S, A, D).
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def can_pack(model: Classifier) -> bool:
    """Return whether `PackedNetwork` can compute this model."""
    kind, config = type(_encoder(model)), model.encoder_config
    return (
        kind.__module__.startswith("transformers.models.")
        and kind.__name__ == f"{ENCODERS.get(config.model_type)}Model"
        and not getattr(config, "is_decoder", False)
        and getattr(config, "position_embedding_type", "absolute") == "absolute"
    )


class PackedNetwork(nn.Module):
    """The encoder and head of a `Classifier`, copied, for packed rows. Raises `ValueError` when it cannot be packed.

    `varlen` uses torch's attention for texts of any length, which needs CUDA and half precision.
    """

    def __init__(self, model: Classifier, varlen: bool = False) -> None:
        super().__init__()
        if not can_pack(model):
            raise ValueError(f"{model.encoder_config.model_type} cannot be packed")
        self.varlen = varlen
        native = isinstance(model, NativeClassifier)
        encoder, config = _encoder(model), model.encoder_config
        distil = config.model_type == "distilbert"
        words = encoder.embeddings
        self.words, self.positions, self.norm = map(
            copy.deepcopy, (words.word_embeddings, words.position_embeddings, words.LayerNorm)
        )
        # RoBERTa's positions begin after that of padding.
        self._first_position = int(config.pad_token_id) + 1 if config.model_type == "roberta" else 0
        if not distil:  # a tweet is one segment, so the vector of its type is the same for all tokens
            with torch.no_grad():
                self.positions.weight += words.token_type_embeddings.weight[0]
        layers = encoder.transformer.layer if distil else encoder.encoder.layer
        made = list(map(_distil_layer if distil else _bert_layer, layers))
        self.layers = nn.ModuleList(made)
        before: nn.LayerNorm = self.norm
        for layer in made:
            _move_bias(layer.output, before, layer.projections)
            _move_bias(layer.down, layer.norm, layer.up)
            before = layer.last_norm
        self._reads_all = not native and model.config.pooling == "mean"
        self.head = _native_head(model.network) if native else _own_head(model, encoder)
        self.eval()

    def forward(self, ids: Tensor, positions: Tensor, texts: Tensor, first: Tensor) -> Tensor:
        """Return logits (R * M, K) for arrays of `PackedRows`: (R, T) three times, and (R, M)."""
        hidden = self.norm(self.words(ids) + self.positions(positions + self._first_position))  # (R, T, H)
        attend, attend_from_first = (_varlen if self.varlen else _masked)(texts, first, hidden.dtype)
        for layer in self.layers[:-1]:
            hidden = layer(hidden, hidden, attend)
        if self._reads_all:
            hidden = self.layers[-1](hidden, hidden, attend)
            number = torch.arange(1, first.shape[1] + 1, device=texts.device)
            within = (texts[:, None, :] == number[:, None]).to(hidden.dtype)  # (R, M, T)
            pooled = within @ hidden / within.sum(-1, keepdim=True).clamp(min=1)
        else:
            queries = hidden.gather(1, first[:, :, None].expand(-1, -1, hidden.shape[-1]))  # (R, M, H)
            pooled = self.layers[-1](queries, hidden, attend_from_first)
        logits: Tensor = self.head(pooled.flatten(0, 1))
        return logits


def _masked(texts: Tensor, first: Tensor, dtype: torch.dtype) -> tuple[Attention, Attention]:
    """Attention of all tokens, and of the first of each text, where other texts are masked."""

    def attention(of_query: Tensor) -> Attention:
        other = of_query[:, :, None] != texts[:, None, :]  # (R, S, T)
        mask = torch.zeros_like(other, dtype=dtype).masked_fill(other, torch.finfo(dtype).min)[:, None]

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            query, key, value = (part.transpose(1, 2) for part in (query, key, value))  # (R, A, S or T, D)
            return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)

        return attend

    return attention(texts), attention(texts.gather(1, first))


def _varlen(texts: Tensor, first: Tensor, dtype: torch.dtype) -> tuple[Attention, Attention]:
    """As `_masked`, by a kernel that takes where each text begins."""
    from torch.nn.attention.varlen import varlen_attn  # loads the kernels

    numbers = torch.arange(1, first.shape[1] + 2, device=texts.device) % (
        first.shape[1] + 1
    )  # padding is last in a row
    lengths = (texts[:, None, :] == numbers[:, None]).sum(-1)  # (R, M + 1)
    one_each = (numbers > 0).expand_as(lengths)

    def begins(counts: Tensor) -> Tensor:
        return functional.pad(counts.flatten().cumsum(0), (1, 0)).to(torch.int32)

    def attention(counts: Tensor, longest: int) -> Attention:
        of_query, of_key = begins(counts), begins(lengths)

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            flat_query, key, value = (part.flatten(0, 1) for part in (query, key, value))
            found = varlen_attn(flat_query, key, value, of_query, of_key, longest, texts.shape[1])
            assert isinstance(found, Tensor)  # noqa: S101 - a tuple only when more is asked for
            return found.view_as(query)

        return attend

    return attention(lengths, texts.shape[1]), attention(one_each, 1)


class Layer(nn.Module):
    """A layer of BERT: attention, then two products, each with a residual connection and a norm after it.

    A product adds the residual connection itself, in the place of its memory; its bias is in there, see `_move_bias`.
    """

    def __init__(
        self, heads: int, projections: Sequence[nn.Linear], output: nn.Linear, norm: nn.LayerNorm, up: nn.Linear,
        activation: Callable[[Tensor], Tensor], down: nn.Linear, last_norm: nn.LayerNorm,
    ) -> None:  # fmt: skip
        super().__init__()
        self.heads, self.activation = heads, activation
        self._is_gelu = type(activation).__name__ in GELU
        self.projections = _side_by_side(projections)  # of query, key and value
        self.output, self.up, self.down = copy.deepcopy(output), copy.deepcopy(up), copy.deepcopy(down)
        self.norm, self.last_norm = copy.deepcopy(norm), copy.deepcopy(last_norm)

    def forward(self, reading: Tensor, read: Tensor, attend: Attention) -> Tensor:
        """Return (R, S, H) for the vectors `reading` (R, S, H), which attend to `read` (R, T, H).

        Overwrites `reading`.
        """
        size = reading.shape[-1]
        if reading is read:
            query, key, value = self.projections(read).chunk(3, dim=-1)
        else:
            weight, bias = self.projections.weight, self.projections.bias
            query = functional.linear(reading, weight[:size], bias[:size])
            key, value = functional.linear(read, weight[size:], bias[size:]).chunk(2, dim=-1)
        by_head = (part.unflatten(-1, (self.heads, -1)) for part in (query, key, value))
        attended = attend(*by_head).reshape(-1, size)
        hidden: Tensor = self.norm(reading.view(-1, size).addmm_(attended, self.output.weight.t()))  # (R * S, H)
        outcome: Tensor = self.last_norm(hidden.addmm_(self._activated(hidden), self.down.weight.t()))
        return outcome.view_as(reading)

    def _activated(self, hidden: Tensor) -> Tensor:
        if self._is_gelu and hidden.is_cuda and hidden.dtype != torch.float32:
            # One kernel, with tanh instead of erf: the difference is below that of half precision.
            return torch._addmm_activation(self.up.bias, hidden, self.up.weight.t(), use_gelu=True)
        return self.activation(self.up(hidden))


def _move_bias(product: nn.Linear, norm: nn.LayerNorm, reader: nn.Linear) -> None:
    """Move the bias of a product into the norm whose output its residual connection adds.

    `reader` is the other one that reads the norm's output: its own bias takes it off again.
    """
    with torch.no_grad():
        norm.bias.add_(product.bias)
        reader.bias.sub_(reader.weight @ product.bias)
        product.register_parameter("bias", None)


def _encoder(model: Classifier) -> Any:
    return model.network.base_model if isinstance(model, NativeClassifier) else model.get_submodule(model.prefix)


def _bert_layer(layer: Any) -> Layer:
    """Of BERT and RoBERTa."""
    attention = layer.attention.self
    return Layer(
        attention.num_attention_heads, [attention.query, attention.key, attention.value],
        layer.attention.output.dense, layer.attention.output.LayerNorm,
        layer.intermediate.dense, layer.intermediate.intermediate_act_fn, layer.output.dense, layer.output.LayerNorm,
    )  # fmt: skip


def _distil_layer(layer: Any) -> Layer:
    attention, ffn = layer.attention, layer.ffn
    return Layer(
        attention.n_heads, [attention.q_lin, attention.k_lin, attention.v_lin], attention.out_lin, layer.sa_layer_norm,
        ffn.lin1, ffn.activation, ffn.lin2, layer.output_layer_norm,
    )  # fmt: skip


def _own_head(model: Classifier, encoder: Any) -> nn.Module:
    head = [copy.deepcopy(model.classifier)]
    if model.config.pooling == "pooler":
        head = [copy.deepcopy(encoder.pooler.dense), nn.Tanh(), *head]
    return nn.Sequential(*head)


def _native_head(network: Any) -> nn.Module:
    """The head of a sequence classifier of transformers, without its dropout."""
    if hasattr(network, "pre_classifier"):  # DistilBERT
        return nn.Sequential(copy.deepcopy(network.pre_classifier), nn.ReLU(), copy.deepcopy(network.classifier))
    if hasattr(network.classifier, "out_proj"):  # RoBERTa
        return nn.Sequential(
            copy.deepcopy(network.classifier.dense), nn.Tanh(), copy.deepcopy(network.classifier.out_proj)
        )
    return nn.Sequential(copy.deepcopy(network.base_model.pooler.dense), nn.Tanh(), copy.deepcopy(network.classifier))


def _side_by_side(products: Sequence[nn.Linear]) -> nn.Linear:
    """One product instead of several of the same input."""
    made = nn.Linear(products[0].in_features, sum(part.out_features for part in products))
    with torch.no_grad():
        made.weight.copy_(torch.cat([part.weight for part in products]))
        made.bias.copy_(torch.cat([part.bias for part in products]))
    return made
