"""The masked language model that adapts an encoder: an encoder with the head that predicts masked tokens.

The head's last layer is the encoder's word embeddings. Weights of the base model that masked-language modelling does
not use, such as those of BERT's pooler, are kept unchanged and saved with the adapted encoder.
"""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoModel,
    AutoModelForMaskedLM,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from training.config import AdaptConfig
from training.errors import ModelUnavailable
from training.model.base_model import BaseModelFolder
from training.model.classifier import check_length, load_encoder_config, load_or_raise, load_pretrained


class LanguageModel(nn.Module):
    """A Hugging Face masked language model. `unused` are the base model's weights outside of it, by their name."""

    def __init__(self, network: nn.Module, unused: dict[str, Tensor]) -> None:
        super().__init__()
        self.add_module("hugging_face", network)
        self.unused = unused

    @property
    def network(self) -> nn.Module:
        """The module whose state dict is saved in a checkpoint."""
        return self.get_submodule("hugging_face")

    def forward(self, input_ids: Tensor, attention_mask: Tensor, positions: Tensor) -> Tensor:
        """Return the logits (M, V) float of the tokens at `positions` (M,) of the B * T. The others are (B, T).

        Only these go through the head: it has one output per token of the vocabulary, and would cost a quarter of the
        time for the others.
        """

        def keep_chosen(_module: nn.Module, _arguments: Any, output: Any) -> Any:
            # Not by a mask (B, T): the host would wait for the GPU to count its tokens.
            output.last_hidden_state = output.last_hidden_state.flatten(0, 1)[positions].unsqueeze(0)  # (1, M, H)
            return output

        encoder: Any = self.network.base_model
        hook = encoder.register_forward_hook(keep_chosen)
        try:
            logits: Tensor = self.network(input_ids=input_ids, attention_mask=attention_mask).logits[0]
        finally:
            hook.remove()
        return logits


@dataclass(frozen=True)
class Built:
    """A model to train. `new_head` is True when the base model has no trained head for masked tokens."""

    model: LanguageModel
    new_head: bool


def build_language_model(base: BaseModelFolder, tokenizer: PreTrainedTokenizerBase, config: AdaptConfig) -> Built:
    """Return a base model with its head for masked tokens, in float32. The same seed gives the same weights.

    A base model without such a head gets a new one whose last layer is its word embeddings. Raises `ModelUnavailable`
    when the weights cannot be loaded, or the architecture or the tokenizer has no masked-language modelling, and
    `BadConfig` when `max_length` exceeds the architecture's limit.
    """
    encoder_config: Any = load_or_raise(base, load_encoder_config, str(base.folder))
    if type(encoder_config) not in MODEL_FOR_MASKED_LM_MAPPING or encoder_config.is_encoder_decoder:
        raise ModelUnavailable(
            f"base model {base.name!r} has the architecture {encoder_config.model_type}, which cannot be trained on "
            "masked tokens; adapt a BERT, DistilBERT, RoBERTa, DeBERTa-v2, ModernBERT or similar encoder"
        )
    if tokenizer.mask_token_id is None:
        raise ModelUnavailable(f"the tokenizer of base model {base.name!r} has no mask token; adapt another base model")
    check_length(encoder_config, config.max_length)
    unused = _weights_outside_language_model(base, encoder_config)
    torch.manual_seed(config.seed)
    network, missing = load_pretrained(AutoModelForMaskedLM, base, encoder_config)
    if _has_new_last_layer(network, missing):
        encoder_config.tie_word_embeddings = True
        torch.manual_seed(config.seed)
        network, missing = load_pretrained(AutoModelForMaskedLM, base, encoder_config)
    if network.base_model is network:
        raise ModelUnavailable(
            f"base model {base.name!r} has the architecture {encoder_config.model_type}, whose encoder cannot be "
            "separated from its head; adapt another base model"
        )
    known = network.base_model.state_dict()
    return Built(LanguageModel(network, {k: v for k, v in unused.items() if k not in known}), bool(missing))


def _has_new_last_layer(network: Any, missing: Collection[str]) -> bool:
    """Return whether the head's last layer is neither the word embeddings nor in the base model's folder."""
    last = network.get_output_embeddings()
    return last is not None and any(
        name in missing for name, weight in network.named_parameters() if weight is last.weight
    )


def _weights_outside_language_model(base: BaseModelFolder, encoder_config: PretrainedConfig) -> dict[str, Tensor]:
    """Return the trained weights of the base model as `AutoModel` loads it."""
    encoder, missing = load_pretrained(AutoModel, base, encoder_config)
    return {name: weight for name, weight in encoder.state_dict().items() if name not in missing}


def save_encoder(folder: Path, model: LanguageModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write an adapted encoder to `folder` as a base model: configuration, weights in float32, and tokenizer.

    The head is saved too, so that the model can be adapted further. Raises OSError.
    """
    network: Any = model.network
    network.config.architectures = [type(network).__name__]
    unused = {f"{network.base_model_prefix}.{name}": weight for name, weight in model.unused.items()}
    network.save_pretrained(str(folder), state_dict={**network.state_dict(), **unused})
    tokenizer.save_pretrained(str(folder))
