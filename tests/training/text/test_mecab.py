"""The fast tokenizer gives the same ids as `BertJapaneseTokenizer` for every text."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from transformers import BertTokenizerFast, PreTrainedTokenizerBase

from training.data.sample import LABELLED
from training.model.base_model import STARTER_FOLDER
from training.text.mecab import FastJapaneseEncoder, fast_encoder
from training.text.tokenizer import TextEncoder, encode, load_tokenizer

# Text that splits words, joins characters, changes under NFKC, or is special to a tokenizer.
PARTS = [
    "今日", "は", "最高", "ｶﾞ", "ﾞ", "か\u3099", "が", "㍿", "①", "Ａ", "ﬁ", "İ", "ß", "e\u0301", "한",
    "👨‍👩‍👧", "🏳️‍🌈", "🇯🇵", "😭", "\u3000", " ", "\t", "\n", "\r", "\x0b", "\x1c", "\x85", "\xa0",
    "\u2028", "\u200b", "\ufeff", "\u202e", "\x01", "\x7f", "[SEP]", "[CLS]", "[MASK]", "[UNK]",
    "##ない", "#", "@a", "https://example.com/", "w" * 99, "草" * 101, "123", "!?", "…",
]  # fmt: skip
TEXTS = st.lists(
    st.sampled_from(PARTS) | st.text(st.characters(exclude_characters="\x00", codec="utf-8")), max_size=12
).map("".join)


@pytest.fixture(
    scope="module",
    params=["wordpiece", *(pytest.param(name, marks=pytest.mark.slow) for name in ("character", "unidic_lite"))],
)
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    """The starter's tokenizer: as it is, with characters as subwords, and with unidic-lite."""
    folder = tmp_path_factory.mktemp("tokenizer")
    for name in ("vocab.txt", "config.json"):
        (folder / name).write_bytes((STARTER_FOLDER / name).read_bytes())
    config = json.loads((STARTER_FOLDER / "tokenizer_config.json").read_text())
    if request.param == "unidic_lite":
        config["mecab_kwargs"] = {"mecab_dic": "unidic_lite"}
    else:
        config["subword_tokenizer_type"] = request.param
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def fast(tokenizer: PreTrainedTokenizerBase) -> FastJapaneseEncoder:
    found = fast_encoder(tokenizer)
    assert found is not None
    return found


@hypothesis_settings(max_examples=500)
@given(texts=st.lists(TEXTS, min_size=1, max_size=5), max_length=st.sampled_from([8, 200]))
def test_any_text_gets_the_same_ids(
    tokenizer: PreTrainedTokenizerBase, fast: FastJapaneseEncoder, texts: list[str], max_length: int
) -> None:
    assert fast.encode(texts, max_length) == encode(tokenizer, texts, max_length)


def test_sample_tweets_get_the_same_ids(tokenizer: PreTrainedTokenizerBase, fast: FastJapaneseEncoder) -> None:
    texts = LABELLED.read_text(encoding="utf-8").splitlines()[:2_000]
    assert fast.encode(texts, 200) == encode(tokenizer, texts, 200)
    assert fast.encode(["", " "], 200) == encode(tokenizer, ["", " "], 200)


@pytest.mark.parametrize("step", [pytest.param(1, id="all", marks=pytest.mark.slow), pytest.param(17, id="every 17th")])
def test_every_character_of_the_basic_plane_gets_the_same_ids(
    tokenizer: PreTrainedTokenizerBase, fast: FastJapaneseEncoder, step: int
) -> None:
    texts = [f"あ{chr(code)}い" for code in range(1, 0x10000, step) if not 0xD800 <= code < 0xE000]
    assert fast.encode(texts, 64) == encode(tokenizer, texts, 64)


def test_words_are_forgotten_before_they_fill_the_memory(
    fast: FastJapaneseEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.text.mecab.WORDS_REMEMBERED", 5)
    before = fast.encode(["今日はとても良い天気ですね。散歩に行きたい"], 200)
    assert len(fast._pieces) == 0
    assert fast.encode(["今日はとても良い天気ですね。散歩に行きたい"], 200) == before


def test_a_tokenizer_of_another_kind_keeps_its_own_way(tmp_path: Path) -> None:
    other = BertTokenizerFast(vocab_file=str(STARTER_FOLDER / "vocab.txt"), do_lower_case=False)
    assert fast_encoder(other) is None
    assert TextEncoder(other)(["今日"], 16) == encode(other, ["今日"], 16)
