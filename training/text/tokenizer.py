"""Load tokenizers and convert texts to token ids, identically for training and scoring."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from training.errors import ModelUnavailable
from training.text.mecab import fast_encoder

# Optional packages of tokenizers: module name in the import error -> arguments of `pip install`.
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
    """Load the tokenizer saved in `folder`. Special tokens such as `[SEP]` in a tweet are split as plain text.

    `bert-base-japanese` (v1) was trained with the ipadic dictionary, but its files name no dictionary. transformers 5
    defaults to unidic-lite, which splits about 30 % of sentences differently, without a warning. So a MeCab tokenizer
    without `mecab_kwargs` gets ipadic, and saving it records the dictionary.

    Raises `ModelUnavailable` when files are missing, or a package is; the message names the package.
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
    """Return the name of the tokenizer's MeCab dictionary, or None when it does not use MeCab."""
    if getattr(tokenizer, "word_tokenizer_type", None) != "mecab":
        return None
    return str((getattr(tokenizer, "mecab_kwargs", None) or {}).get("mecab_dic", "unidic_lite"))


class TextEncoder:
    """Convert texts to token ids, with `FastJapaneseEncoder` where it supports the tokenizer. Not thread-safe."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._fast = fast_encoder(tokenizer)

    def __call__(self, texts: Sequence[str], max_length: int) -> list[list[int]]:
        """Return the same ids as `encode`."""
        return self._fast.encode(texts, max_length) if self._fast else encode(self._tokenizer, texts, max_length)


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_length: int) -> list[list[int]]:
    """Return the token ids of cleaned texts: special tokens included, truncated to `max_length` tokens, not padded."""
    if not texts:
        return []
    encoded = tokenizer(list(texts), truncation=True, max_length=max_length, return_attention_mask=False)
    return [list(ids) for ids in encoded["input_ids"]]


def _why(error: BaseException) -> str:
    message = str(error).strip() or type(error).__name__
    missing = next((name for name in PIP_NAMES if re.search(rf"\b{name}\b", message)), None)
    if missing is None or isinstance(error, OSError):  # OSError messages contain file names
        return message.splitlines()[0]
    return f"it needs the package {missing}, which is not installed; `pip install {PIP_NAMES[missing]}`"
