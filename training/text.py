"""Tokenising, the same for training and for scoring. Knows no model weights and no tensors."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from training.errors import ModelUnavailable
from training.mecab import fast_encoder

# What a tokenizer may need beyond the packages that are always there, by the name it is missed by.
PIP_NAMES = {
    "fugashi": "fugashi",
    "ipadic": "ipadic",
    "unidic_lite": "'tweetscore[unidic-lite]'",
    "unidic": "unidic",
    "sudachipy": "sudachipy sudachidict_core",
    "rhoknp": "rhoknp",
    "sentencepiece": "sentencepiece protobuf",
    "tiktoken": "tiktoken",
}


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer saved in `folder`, set to treat `[SEP]` and the like in a tweet as the plain text it is.

    `bert-base-japanese` (v1) was trained on ipadic words and its files name no dictionary: they date from when ipadic
    was the default. transformers 5 would take unidic-lite instead and cut three sentences in ten elsewhere, silently.
    So a MeCab tokenizer without `mecab_kwargs` gets ipadic, and saving it writes that down.

    Raises `ModelUnavailable` when the files are missing, or a package that is needed, which it names.
    """
    try:
        saved = get_tokenizer_config(str(folder), local_files_only=True)
        options: dict[str, Any] = {"split_special_tokens": True}
        mecab = saved.get("mecab_kwargs") or {}
        if saved.get("word_tokenizer_type") == "mecab" and "mecab_dic" not in mecab:
            options["mecab_kwargs"] = {**mecab, "mecab_dic": "ipadic"}
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False, **options
        )
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise ModelUnavailable(f"the tokenizer in {folder} cannot be loaded: {_why(error)}") from error
    if tokenizer.pad_token_id is None:
        raise ModelUnavailable(f"the tokenizer in {folder} has no padding token; add one and save it again")
    return tokenizer


def mecab_dictionary(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The MeCab dictionary a tokenizer cuts words with; None when it uses no MeCab."""
    if getattr(tokenizer, "word_tokenizer_type", None) != "mecab":
        return None
    return str((getattr(tokenizer, "mecab_kwargs", None) or {}).get("mecab_dic", "unidic_lite"))


class TextEncoder:
    """Texts to token ids, by the fast way where there is one for the tokenizer. For one thread at a time."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._fast = fast_encoder(tokenizer)

    def __call__(self, texts: Sequence[str], max_length: int) -> list[list[int]]:
        """As `encode` has it, id for id."""
        return self._fast.encode(texts, max_length) if self._fast else encode(self._tokenizer, texts, max_length)


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_length: int) -> list[list[int]]:
    """Token ids of cleaned texts, special tokens included, cut to `max_length` tokens, not padded."""
    if not texts:
        return []
    encoded = tokenizer(list(texts), truncation=True, max_length=max_length, return_attention_mask=False)
    return [list(ids) for ids in encoded["input_ids"]]


def _why(error: BaseException) -> str:
    said = str(error).strip() or type(error).__name__
    missing = next((name for name in PIP_NAMES if re.search(rf"\b{name}\b", said)), None)
    if missing is None or isinstance(error, OSError):  # the latter names files
        return said.splitlines()[0]
    return f"it needs the package {missing}, which is not installed; `pip install {PIP_NAMES[missing]}`"
