"""A faster `BertJapaneseTokenizer`: words from MeCab, word pieces from the Rust WordPiece of `tokenizers`.

`BertJapaneseTokenizer` builds a Python object for every word and searches the vocabulary piece by piece. This encoder
gets all words of a text from one MeCab call and caches the pieces of each word. The ids are identical, which the tests
check. Tokenizers with other settings (other word tokenizers, lower-casing) use the original implementation.
"""

import unicodedata
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import fugashi
from tokenizers import Tokenizer, models
from transformers import BertJapaneseTokenizer, PreTrainedTokenizerBase

# About 200 bytes a word. Running Japanese text has a few hundred thousand distinct words.
WORDS_REMEMBERED = 200_000
LONGEST_WORD_CHARS = 100  # BERT's limit: a longer word becomes one unknown token


class FastJapaneseEncoder:
    """Encode texts with MeCab and WordPiece (or characters). Not thread-safe: a MeCab tagger has state."""

    def __init__(self, tokenizer: BertJapaneseTokenizer) -> None:
        tagger = fugashi.GenericTagger(f"{_mecab_options(tokenizer)} -Owakati")
        if tokenizer.subword_tokenizer_type == "character":
            # Every character becomes a token, and MeCab's text output drops trailing white space.
            self._words: Callable[[str], list[str]] = lambda text: [node.surface for node in tagger(text)]
        else:
            # WordPiece drops white space inside a word, so `split` gives the same pieces.
            self._words = lambda text: tagger.parse(text).split()
        self._pieces = WordPieceCache(_word_splitter(tokenizer))
        self._cls, self._sep = int(tokenizer.cls_token_id), int(tokenizer.sep_token_id)

    def encode(self, texts: Sequence[str], max_length: int) -> list[list[int]]:
        """Return token ids with special tokens, truncated to `max_length` tokens, not padded."""
        words_of, normalise, ids_of = self._words, unicodedata.normalize, self._pieces.__getitem__
        rows = []
        for text in texts:
            row = [self._cls, *chain.from_iterable(map(ids_of, words_of(normalise("NFKC", text))))]
            del row[max_length - 1 :]
            row.append(self._sep)
            rows.append(row)
        self._pieces.shrink()
        return rows


class WordPieceCache(dict[str, list[int]]):
    """Word -> token ids; a missing word is split into pieces and stored."""

    def __init__(self, split: Callable[[str], list[int]]) -> None:
        super().__init__()
        self._split = split

    def __missing__(self, word: str) -> list[int]:
        self[word] = ids = self._split(word)
        return ids

    def shrink(self) -> None:
        """Empty the cache when it holds more than `WORDS_REMEMBERED` words."""
        if len(self) > WORDS_REMEMBERED:
            self.clear()


def fast_encoder(tokenizer: PreTrainedTokenizerBase) -> FastJapaneseEncoder | None:
    """Return a `FastJapaneseEncoder` for a tokenizer, or None when it has settings that encoder does not support."""
    supported = (
        isinstance(tokenizer, BertJapaneseTokenizer)
        and tokenizer.word_tokenizer_type == "mecab"
        and tokenizer.subword_tokenizer_type in ("wordpiece", "character")
        and tokenizer.do_word_tokenize
        and tokenizer.do_subword_tokenize
        and not tokenizer.do_lower_case
        and tokenizer.split_special_tokens
        and (tokenizer.mecab_kwargs or {}).get("normalize_text", True)
    )
    return FastJapaneseEncoder(tokenizer) if supported else None


def _word_splitter(tokenizer: BertJapaneseTokenizer) -> Callable[[str], list[int]]:
    """Return a function that splits one word into token ids."""
    unknown = tokenizer.unk_token_id
    if tokenizer.subword_tokenizer_type == "character":
        vocab: dict[str, int] = tokenizer.vocab
        return lambda word: [vocab.get(char, unknown) for char in unicodedata.normalize("NFKC", word)]
    piece = models.WordPiece(
        tokenizer.vocab, unk_token=str(tokenizer.unk_token), max_input_chars_per_word=LONGEST_WORD_CHARS
    )
    rust = Tokenizer(piece)
    return lambda word: list(rust.encode([word], is_pretokenized=True, add_special_tokens=False).ids)


def _mecab_options(tokenizer: BertJapaneseTokenizer) -> str:
    """Return MeCab's command-line options, built as `MecabTokenizer` of transformers builds them."""
    import importlib
    from pathlib import Path

    settings: dict[str, Any] = tokenizer.mecab_kwargs or {}
    options = settings.get("mecab_option") or ""
    dictionary = settings.get("mecab_dic", "unidic_lite")
    if dictionary is None:
        return options
    folder = Path(importlib.import_module(dictionary).DICDIR)
    return f'-d "{folder}" -r "{folder / "mecabrc"}" {options}'
