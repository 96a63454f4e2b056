"""Encoder + head: build and forward. Knows token ids and logits, and nothing of texts, labels or files' digests."""

from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PretrainedConfig
from transformers.utils import logging as transformers_logging

from training.config import TrainConfig
from training.encoders import Encoder
from training.errors import BadConfig, ModelUnavailable

transformers_logging.disable_progress_bar()  # ours are the only bars
transformers_logging.set_verbosity_error()


class Classifier(nn.Module):
    """Token ids -> logits. Parameters carry the names a Hugging Face sequence classifier gives them."""

    def __init__(self, encoder: nn.Module, hidden_size: int, n_labels: int, config: TrainConfig) -> None:
        super().__init__()
        self.prefix: str = encoder.base_model_prefix  # type: ignore[assignment]
        self.pooling = config.pooling
        self.add_module(self.prefix, encoder)
        if config.head == "guide":
            self.classifier: nn.Module = guide_head(hidden_size, n_labels, config.dropout)
        else:
            self.dropout = nn.Dropout(config.dropout)
            self.classifier = nn.Linear(hidden_size, n_labels)
            nn.init.normal_(self.classifier.weight, std=0.02)
            nn.init.zeros_(self.classifier.bias)

    @property
    def encoder(self) -> nn.Module:
        return self.get_submodule(self.prefix)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """`input_ids` and `attention_mask` (B, T) int64 -> logits (B, K).

        Token type ids are left to the encoder: a tweet is one segment, and its default, all zero, is the same.
        """
        output = self.encoder(input_ids=input_ids, attention_mask=attention_mask)
        if self.pooling == "pooler":
            pooled = output.pooler_output  # (B, H)
        elif self.pooling == "cls":
            pooled = output.last_hidden_state[:, 0]
        else:
            mask = attention_mask.unsqueeze(-1).to(output.last_hidden_state.dtype)  # (B, T, 1)
            pooled = (output.last_hidden_state * mask).sum(1) / mask.sum(1)
        logits: Tensor = self.classifier(self.dropout(pooled) if hasattr(self, "dropout") else pooled)
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

    Raises `ModelUnavailable` when the weights cannot be loaded, `BadConfig` when the encoder has no trained pooler and
    `pooling` asks for it.
    """
    torch.manual_seed(config.seed)
    try:
        loaded, info = AutoModel.from_pretrained(
            str(encoder.folder),
            dtype=torch.float32,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError, UnpicklingError) as error:
        raise ModelUnavailable(
            f"base model {encoder.name!r} cannot be loaded ({str(error).splitlines()[0]}); fetch or save it again"
        ) from error
    missing = [key for key in info["missing_keys"] if "pooler" not in key]
    if missing:
        raise ModelUnavailable(
            f"base model {encoder.name!r} cannot be loaded: {len(missing)} weights are missing ({missing[0]}, …); "
            "fetch or save it again"
        )
    if config.pooling == "pooler" and (_lacks_pooler(loaded) or any("pooler" in k for k in info["missing_keys"])):
        raise BadConfig(f"base model {encoder.name!r} has no trained pooler; use --pooling mean or cls")
    _check_length(loaded.config, config)
    return Classifier(loaded, loaded.config.hidden_size, n_labels, config)


def empty_model(encoder_config: PretrainedConfig, n_labels: int, config: TrainConfig) -> Classifier:
    """The same architecture with no pretrained weights, to load a saved state into."""
    return Classifier(AutoModel.from_config(encoder_config), encoder_config.hidden_size, n_labels, config)


def load_encoder_config(folder: str) -> PretrainedConfig:
    return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def pick_device(wanted: str) -> torch.device:
    """`auto` takes the GPU if there is one; raises `BadConfig` for a device that is not there."""
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise BadConfig(f"device {wanted!r} cannot be used here; use auto or cpu") from error
    return device


def _lacks_pooler(encoder: nn.Module) -> bool:
    return getattr(encoder, "pooler", None) is None


def _check_length(encoder_config: PretrainedConfig, config: TrainConfig) -> None:
    longest = getattr(encoder_config, "max_position_embeddings", None)
    if longest is not None and config.max_length > longest:
        raise BadConfig(f"max_length is {config.max_length}; this base model takes at most {longest} tokens")
