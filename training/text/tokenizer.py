"""Load tokenizers and convert texts to token ids, identically for training and scoring."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from training.errors import ModelUnavailable
from training.text.mecab import fast_encoder

# No tokenizer adds more special tokens to a text.
SPECIAL_TOKENS = 16

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


class UnknownShare:
    """Measure the share of the tokens of a text that a tokenizer does not know, special tokens left out."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._unknown: int | None = tokenizer.unk_token_id
        # What every row has, even that of an empty text. A few tokenizers use one token for unknown and for the end.
        special = encode(tokenizer, [""], SPECIAL_TOKENS)[0]
        self._special, self._special_unknown = len(special), sum(token == self._unknown for token in special)

    def __call__(self, rows: Sequence[Sequence[int]]) -> list[float | None]:
        """Return the share of each row of token ids, 0 to 1; None when the tokenizer has no unknown token.

        A row without tokens of a text has the share 0.
        """
        if self._unknown is None:
            return [None] * len(rows)
        # `count` runs in C, several times faster than an array that is first built of the rows.
        unknown, special, own = self._unknown, self._special, self._special_unknown
        return [(row.count(unknown) - own) / max(1, len(row) - special) for row in rows]


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
