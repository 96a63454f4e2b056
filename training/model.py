"""Encoder + head: build and forward. Knows token ids and logits, and nothing of texts, labels or files' digests."""

from collections.abc import Callable
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    PretrainedConfig,
)
from transformers.utils import logging as transformers_logging

from training.config import TrainConfig
from training.encoders import Encoder
from training.errors import BadConfig, ModelUnavailable

transformers_logging.disable_progress_bar()  # ours are the only bars
transformers_logging.set_verbosity_error()

# What architectures call the dropout before their classifier.
DROPOUTS = ("classifier_dropout", "seq_classif_dropout", "cls_dropout")
# Their first position is the one after the padding's.
COUNT_FROM_PADDING = ("roberta", "xlm-roberta", "camembert", "luke", "longformer", "mpnet")


class Classifier(nn.Module):
    """Token ids -> logits: an encoder under one of our heads, by pooled output, first token or masked mean.

    `config` has its pooling settled: see `build_model`.
    """

    def __init__(self, encoder: nn.Module, n_labels: int, config: TrainConfig) -> None:
        super().__init__()
        self.prefix: str = encoder.base_model_prefix  # type: ignore[assignment]
        self.config = config
        hidden_size: int = encoder.config.hidden_size  # type: ignore[union-attr, assignment]
        self.add_module(self.prefix, encoder)
        if config.head == "guide":
            self.classifier: nn.Module = guide_head(hidden_size, n_labels, config.dropout)
        else:
            self.dropout = nn.Dropout(config.dropout)
            self.classifier = nn.Linear(hidden_size, n_labels)
            nn.init.normal_(self.classifier.weight, std=0.02)
            nn.init.zeros_(self.classifier.bias)

    @property
    def network(self) -> nn.Module:
        """Whose parameters an artifact holds, by their names."""
        return self

    @property
    def encoder_config(self) -> Any:
        return self.get_submodule(self.prefix).config

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """`input_ids` and `attention_mask` (B, T) int64 -> logits (B, K).

        Token type ids are left to the encoder: a tweet is one segment, and its default, all zero, is the same.
        """
        output = self.get_submodule(self.prefix)(input_ids=input_ids, attention_mask=attention_mask)
        if self.config.pooling == "pooler":
            pooled = output.pooler_output  # (B, H)
        elif self.config.pooling == "cls":
            pooled = output.last_hidden_state[:, 0]
        else:
            mask = attention_mask.unsqueeze(-1).to(output.last_hidden_state.dtype)  # (B, T, 1)
            pooled = (output.last_hidden_state * mask).sum(1) / mask.sum(1)
        logits: Tensor = self.classifier(self.dropout(pooled) if hasattr(self, "dropout") else pooled)
        return logits


class NativeClassifier(Classifier):
    """A Hugging Face sequence classifier, whose head and pooling are those of its architecture."""

    def __init__(self, network: nn.Module, config: TrainConfig) -> None:
        nn.Module.__init__(self)
        self.config = config
        self.add_module("hugging_face", network)

    @property
    def network(self) -> nn.Module:
        return self.get_submodule("hugging_face")

    @property
    def encoder_config(self) -> Any:
        return self.network.config

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """As `Classifier.forward`."""
        logits: Tensor = self.network(input_ids=input_ids, attention_mask=attention_mask).logits
        return logits


def guide_head(hidden_size: int, n_labels: int, dropout: float) -> nn.Sequential:
    """The guide's head, 768-384-96-24-K on BERT base; on other sizes each layer keeps its share of the hidden size."""
    first, second, third = (max(2, hidden_size // share) for share in (2, 8, 32))
    return nn.Sequential(
        nn.Dropout(dropout),
        nn.Linear(hidden_size, first),
        nn.BatchNorm1d(first),
        nn.Linear(first, second),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(second, third),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(third, n_labels),
    )


def build_model(encoder: Encoder, n_labels: int, config: TrainConfig) -> Classifier:
    """A pretrained encoder under a fresh head, the same for the same seed, in float32 whatever the file keeps.

    With `pooling: auto` a linear head is the architecture's own (`native`), which plain transformers load; one that the
    folder already holds goes on from there when it has as many labels. An encoder without a trained pooler is pooled
    by its masked mean. `Classifier.config` says what became of it.

    Raises `ModelUnavailable` when the weights cannot be loaded, `BadConfig` when it cannot be pooled as wanted.
    """
    torch.manual_seed(config.seed)
    encoder_config = _readable(encoder, load_encoder_config, str(encoder.folder))
    _check_length(encoder_config, config)
    has_native = type(encoder_config) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    if config.pooling == "native" and not (has_native and config.head == "linear"):
        raise BadConfig("pooling 'native' is that of a linear head whose architecture has one; use auto, mean or cls")
    if config.pooling == "native" or (config.pooling == "auto" and config.head == "linear" and has_native):
        _describe(encoder_config, n_labels, config)
        loaded, lacks_pooler = _load(AutoModelForSequenceClassification, encoder, encoder_config)
        if not lacks_pooler or config.pooling == "native":
            return NativeClassifier(loaded, config.model_copy(update={"pooling": "native"}))
        loaded = loaded.base_model
    else:
        loaded, lacks_pooler = _load(AutoModel, encoder, encoder_config)
    lacks_pooler = lacks_pooler or getattr(loaded, "pooler", None) is None
    if lacks_pooler and config.pooling == "pooler":
        raise BadConfig(f"base model {encoder.name!r} has no trained pooler; use --pooling auto, mean or cls")
    pooling = config.pooling if config.pooling != "auto" else "mean" if lacks_pooler else "pooler"
    return Classifier(loaded, n_labels, config.model_copy(update={"pooling": pooling}))


def _load(kind: Any, encoder: Encoder, encoder_config: PretrainedConfig) -> tuple[Any, bool]:
    """The weights under a class of transformers, and whether it has a pooler that was never trained."""
    loaded, info = _readable(
        encoder,
        kind.from_pretrained,
        str(encoder.folder),
        config=encoder_config,
        dtype=torch.float32,
        local_files_only=True,
        trust_remote_code=False,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # a head of so many other labels
    )
    # What lies outside the encoder is the head, which is to be fresh.
    prefix = "" if kind is AutoModel else f"{loaded.base_model_prefix}."
    missing = [key for key in info["missing_keys"] if key.startswith(prefix)]
    lost = [key for key in missing if "pooler" not in key]
    lost += [key for key, *_ in info["mismatched_keys"] if key.startswith(prefix)]
    if lost:
        raise ModelUnavailable(
            f"base model {encoder.name!r} cannot be loaded: {len(lost)} weights are missing or of another size "
            f"({lost[0]}, …); fetch or save it again"
        )
    return loaded, bool(missing)


def _readable(encoder: Encoder, read: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    try:
        return read(*arguments, **options)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError, UnpicklingError) as error:
        raise ModelUnavailable(
            f"base model {encoder.name!r} cannot be loaded ({str(error).splitlines()[0]}); fetch or save it again"
        ) from error


def _describe(encoder_config: Any, n_labels: int, config: TrainConfig) -> None:
    """Tell an encoder's configuration of the head it is to get."""
    encoder_config.num_labels = n_labels
    for name in DROPOUTS:
        if hasattr(encoder_config, name):
            setattr(encoder_config, name, config.dropout)


def empty_model(encoder_config: PretrainedConfig, n_labels: int, config: TrainConfig) -> Classifier:
    """The same architecture with no pretrained weights, to load a saved state into. `config.pooling` is settled."""
    if config.pooling == "auto":
        raise ValueError("its pooling is not settled")
    if config.pooling == "native":
        return NativeClassifier(AutoModelForSequenceClassification.from_config(encoder_config), config)
    return Classifier(AutoModel.from_config(encoder_config), n_labels, config)


def load_encoder_config(folder: str) -> PretrainedConfig:
    return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def half_precision(device: torch.device, precision: str) -> bool:
    """Whether to compute in bfloat16: `auto` does where the device has it, since emulated it is slower than float32."""
    if precision != "auto":
        return precision == "bfloat16"
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu":
        return False
    has = torch.cpu.get_capabilities()
    return bool(has.get("avx512_bf16") or has.get("amx_bf16"))


def _check_length(encoder_config: Any, config: TrainConfig) -> None:
    longest = getattr(encoder_config, "max_position_embeddings", None)
    if longest is not None and encoder_config.model_type in COUNT_FROM_PADDING:
        longest -= encoder_config.pad_token_id + 1
    if longest is not None and config.max_length > longest:
        raise BadConfig(f"max_length is {config.max_length}; this base model takes at most {longest} tokens")
