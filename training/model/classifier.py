"""The classifier: a pretrained encoder with a classification head. Token ids in, logits out."""

from collections.abc import Callable, Iterable
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
from training.errors import BadConfig, ModelUnavailable
from training.model.base_model import BaseModelFolder
from training.model.last_layer import compute_first_position_only

transformers_logging.disable_progress_bar()  # tweetscore shows its own progress
transformers_logging.set_verbosity_error()

# Names under which architectures configure the dropout before their classifier.
DROPOUTS = ("classifier_dropout", "seq_classif_dropout", "cls_dropout")
# Names under which they configure the dropout within the encoder.
ENCODER_DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout")
# Architectures whose position ids begin at `pad_token_id + 1`, so they accept that many fewer tokens.
COUNT_FROM_PADDING = ("roberta", "xlm-roberta", "camembert", "luke", "longformer", "mpnet")


class Classifier(nn.Module):
    """An encoder with tweetscore's own head on its pooled output, first token or masked mean.

    `config.pooling` is the pooling in use, never "auto": see `build_model`.
    """

    def __init__(self, encoder: nn.Module, n_labels: int, config: TrainConfig) -> None:
        super().__init__()
        self.prefix: str = encoder.base_model_prefix  # type: ignore[assignment]
        self.config = config
        hidden_size: int = encoder.config.hidden_size  # type: ignore[union-attr, assignment]
        self.add_module(self.prefix, encoder)
        if config.pooling in ("pooler", "cls"):
            compute_first_position_only(encoder)
        if config.head == "guide":
            self.classifier: nn.Module = guide_head(hidden_size, n_labels, config.dropout)
        else:
            self.dropout = nn.Dropout(config.dropout)
            self.classifier = nn.Linear(hidden_size, n_labels)
            nn.init.normal_(self.classifier.weight, std=0.02)
            nn.init.zeros_(self.classifier.bias)

    @property
    def network(self) -> nn.Module:
        """The module whose state dict is saved in an artifact."""
        return self

    @property
    def encoder_config(self) -> Any:
        return self.get_submodule(self.prefix).config

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return logits (B, K) float for `input_ids` and `attention_mask`, both (B, T) int64.

        Token type ids are omitted: a tweet is one segment, and the encoder's default is all zeros.
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
    """A Hugging Face sequence classifier, with the head and pooling of its architecture."""

    def __init__(self, network: nn.Module, config: TrainConfig) -> None:
        nn.Module.__init__(self)
        self.config = config
        self.add_module("hugging_face", network)
        compute_first_position_only(network)

    @property
    def network(self) -> nn.Module:
        return self.get_submodule("hugging_face")

    @property
    def encoder_config(self) -> Any:
        return self.network.config

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """See `Classifier.forward`."""
        logits: Tensor = self.network(input_ids=input_ids, attention_mask=attention_mask).logits
        return logits


def guide_head(hidden_size: int, n_labels: int, dropout: float) -> nn.Sequential:
    """Return the guide's head: 768-384-96-24-K for BERT base, and the same ratios for other hidden sizes."""
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


def build_model(base: BaseModelFolder, n_labels: int, config: TrainConfig) -> Classifier:
    """Return a pretrained encoder with a new head, in float32. The same seed gives the same weights.

    With `pooling: auto`, a linear head is the architecture's own (`native`), which plain transformers can load; a head
    already in the folder is kept when its number of labels matches. An encoder without a trained pooler uses the masked
    mean. `Classifier.config.pooling` holds the pooling that was chosen.

    Raises `ModelUnavailable` when the weights cannot be loaded, and `BadConfig` when the architecture lacks the
    requested pooling or `max_length` exceeds its limit.
    """
    torch.manual_seed(config.seed)
    encoder_config = load_or_raise(base, load_encoder_config, str(base.folder))
    check_length(encoder_config, config.max_length)
    if config.encoder_dropout is not None:
        _set_dropout(encoder_config, ENCODER_DROPOUTS, config.encoder_dropout)
    has_native = type(encoder_config) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    if config.pooling == "native" and not (has_native and config.head == "linear"):
        raise BadConfig(
            "pooling 'native' needs a linear head and an architecture with its own classifier; use auto, mean or cls"
        )
    if config.pooling == "native" or (config.pooling == "auto" and config.head == "linear" and has_native):
        _set_head_options(encoder_config, n_labels, config)
        loaded, lacks_pooler = _load(AutoModelForSequenceClassification, base, encoder_config)
        if not lacks_pooler or config.pooling == "native":
            return NativeClassifier(loaded, config.model_copy(update={"pooling": "native"}))
        loaded = loaded.base_model
    else:
        loaded, lacks_pooler = _load(AutoModel, base, encoder_config)
    lacks_pooler = lacks_pooler or getattr(loaded, "pooler", None) is None
    if lacks_pooler and config.pooling == "pooler":
        raise BadConfig(f"base model {base.name!r} has no trained pooler; use --pooling auto, mean or cls")
    pooling = config.pooling if config.pooling != "auto" else "mean" if lacks_pooler else "pooler"
    return Classifier(loaded, n_labels, config.model_copy(update={"pooling": pooling}))


def _load(kind: Any, base: BaseModelFolder, encoder_config: PretrainedConfig) -> tuple[Any, bool]:
    """Return the model loaded as a transformers class, and whether it has a pooler without trained weights."""
    loaded, missing = load_pretrained(kind, base, encoder_config)
    prefix = "" if kind is AutoModel else f"{loaded.base_model_prefix}."
    return loaded, any(key.startswith(prefix) for key in missing)


def load_pretrained(kind: Any, base: BaseModelFolder, encoder_config: PretrainedConfig) -> tuple[Any, list[str]]:
    """Return a base model loaded as a transformers class, in float32, and the names of the weights that it lacks.

    Those are new: weights of the head, and of a pooler. Raises `ModelUnavailable` when a weight of the encoder is
    missing.
    """
    loaded, info = load_or_raise(
        base,
        kind.from_pretrained,
        str(base.folder),
        config=encoder_config,
        dtype=torch.float32,
        local_files_only=True,
        trust_remote_code=False,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # a head for another number of labels
    )
    # Weights outside the encoder belong to the head, which is new, so they may be missing.
    prefix = "" if kind is AutoModel else f"{loaded.base_model_prefix}."
    missing = [key for key in info["missing_keys"] if key.startswith(prefix)]
    lost = [key for key in missing if "pooler" not in key]
    lost += [key for key, *_ in info["mismatched_keys"] if key.startswith(prefix)]
    if lost:
        raise ModelUnavailable(
            f"base model {base.name!r} cannot be loaded: {len(lost)} weights are missing or have another shape "
            f"({lost[0]}, …); download or save it again"
        )
    return loaded, list(info["missing_keys"])


def load_or_raise(base: BaseModelFolder, read: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    try:
        return read(*arguments, **options)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError, UnpicklingError) as error:
        raise ModelUnavailable(
            f"base model {base.name!r} cannot be loaded ({str(error).splitlines()[0]}); download or save it again"
        ) from error


def _set_head_options(encoder_config: Any, n_labels: int, config: TrainConfig) -> None:
    """Set the number of labels and the dropout of the architecture's own head."""
    encoder_config.num_labels = n_labels
    _set_dropout(encoder_config, DROPOUTS, config.dropout)


def _set_dropout(encoder_config: Any, names: Iterable[str], share: float) -> None:
    for name in names:
        if hasattr(encoder_config, name):
            setattr(encoder_config, name, share)


def empty_model(encoder_config: PretrainedConfig, n_labels: int, config: TrainConfig) -> Classifier:
    """Return the same architecture without pretrained weights, for loading a saved state dict.

    Raises `ValueError` when `config.pooling` is "auto".
    """
    if config.pooling == "auto":
        raise ValueError("config.pooling is 'auto'; use the pooling that build_model chose")
    if config.pooling == "native":
        return NativeClassifier(AutoModelForSequenceClassification.from_config(encoder_config), config)
    return Classifier(AutoModel.from_config(encoder_config), n_labels, config)


def load_encoder_config(folder: str) -> PretrainedConfig:
    """Return the transformers configuration in a folder, offline and without remote code."""
    return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def half_precision(device: torch.device, precision: str) -> bool:
    """Return whether to compute in bfloat16. `auto` needs hardware support: emulated, it is slower than float32."""
    if precision != "auto":
        return precision == "bfloat16"
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu":
        return False
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def longest_input(encoder_config: Any) -> int | None:
    """Return the number of tokens that an architecture accepts, special tokens included; None without a limit."""
    longest: int | None = getattr(encoder_config, "max_position_embeddings", None)
    if longest is not None and encoder_config.model_type in COUNT_FROM_PADDING:
        longest -= encoder_config.pad_token_id + 1
    return longest


def check_length(encoder_config: Any, max_length: int) -> None:
    """Raise `BadConfig` when `max_length` exceeds the limit of the architecture."""
    longest = longest_input(encoder_config)
    if longest is not None and max_length > longest:
        raise BadConfig(f"max_length is {max_length}; this base model accepts at most {longest} tokens")
