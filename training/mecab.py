"""The ids of `BertJapaneseTokenizer`, several times faster: words by MeCab, pieces by the Rust WordPiece.

The slow one builds a Python object for every word and searches the vocabulary piece by piece. Here MeCab writes a whole
text's words at once, and each distinct word is cut into pieces once, then looked up. Equal on every text, which the
tests prove; what it does not know (other word tokenizers, lower-casing) it leaves to the slow one.
"""

import unicodedata
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import fugashi
from tokenizers import Tokenizer, models
from transformers import BertJapaneseTokenizer, PreTrainedTokenizerBase

# A word costs about 200 bytes here; a language's running text has some hundred thousand different ones.
WORDS_REMEMBERED = 200_000
LONGEST_WORD_CHARS = 100  # BERT's own limit: a longer word is one unknown piece


class FastJapanese:
    """Encodes whole windows. Not for several threads at once: a MeCab tagger has one state."""

    def __init__(self, tokenizer: BertJapaneseTokenizer) -> None:
        tagger = fugashi.GenericTagger(f"{_mecab_options(tokenizer)} -Owakati")
        if tokenizer.subword_tokenizer_type == "character":
            # Every character counts, and a written-out text loses white space at its end.
            self._words: Callable[[str], list[str]] = lambda text: [node.surface for node in tagger(text)]
        else:
            # WordPiece drops whatever white space MeCab leaves in a word, and so does split.
            self._words = lambda text: tagger.parse(text).split()
        self._pieces = Pieces(_cutter(tokenizer))
        self._cls, self._sep = int(tokenizer.cls_token_id), int(tokenizer.sep_token_id)

    def encode(self, texts: Sequence[str], max_length: int) -> list[list[int]]:
        """Token ids with their special tokens, cut to `max_length`, not padded."""
        words_of, normalise, ids_of = self._words, unicodedata.normalize, self._pieces.__getitem__
        rows = []
        for text in texts:
            row = [self._cls, *chain.from_iterable(map(ids_of, words_of(normalise("NFKC", text))))]
            del row[max_length - 1 :]
            row.append(self._sep)
            rows.append(row)
        self._pieces.shrink()
        return rows


class Pieces(dict[str, list[int]]):
    """Word -> ids, each word cut once."""

    def __init__(self, cut: Callable[[str], list[int]]) -> None:
        super().__init__()
        self._cut = cut

    def __missing__(self, word: str) -> list[int]:
        self[word] = ids = self._cut(word)
        return ids

    def shrink(self) -> None:
        if len(self) > WORDS_REMEMBERED:
            self.clear()


def fast_encoder(tokenizer: PreTrainedTokenizerBase) -> FastJapanese | None:
    """The fast way for a tokenizer, None where there is none."""
    known = (
        isinstance(tokenizer, BertJapaneseTokenizer)
        and tokenizer.word_tokenizer_type == "mecab"
        and tokenizer.subword_tokenizer_type in ("wordpiece", "character")
        and tokenizer.do_word_tokenize
        and tokenizer.do_subword_tokenize
        and not tokenizer.do_lower_case
        and tokenizer.split_special_tokens
        and (tokenizer.mecab_kwargs or {}).get("normalize_text", True)
    )
    return FastJapanese(tokenizer) if known else None


def _cutter(tokenizer: BertJapaneseTokenizer) -> Callable[[str], list[int]]:
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
    """MeCab's command line, as `MecabTokenizer` writes it from the same settings."""
    import importlib
    from pathlib import Path

    settings: dict[str, Any] = tokenizer.mecab_kwargs or {}
    options = settings.get("mecab_option") or ""
    dictionary = settings.get("mecab_dic", "unidic_lite")
    if dictionary is None:
        return options
    folder = Path(importlib.import_module(dictionary).DICDIR)
    return f'-d "{folder}" -r "{folder / "mecabrc"}" {options}'
