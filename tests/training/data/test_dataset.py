"""Labelled files, splits, the cleaner, and the configuration: valid input, and the messages for invalid input."""

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from tests.support.datasets import many, rows_of
from training.config import TrainConfig, make_config
from training.data.dataset import Dataset, read_rows, split_rows
from training.errors import BadConfig, BadDataset
from training.model.artifact import find_polarity, make_spec
from training.model.base_model import STARTER_FOLDER, BaseModelFolder
from training.text.cleaning import clean, same_text_key
from training.text.tokenizer import load_tokenizer

GUIDE = make_config("guide")


def texts_by_split(data: Dataset) -> dict[str, list[str]]:
    return {"train": data.train.texts, "valid": data.valid.texts, "test": data.test.texts}


@pytest.mark.parametrize(
    ("name", "content", "labels", "texts"),
    [
        ("guide.csv", "感情,つぶやき\n1,嬉しい\n0,悲しい\n", ["1", "0"], ["嬉しい", "悲しい"]),
        ("named.csv", "id,Text,Label\n7,嬉しい,pos\n8,悲しい,neg\n", ["pos", "neg"], ["嬉しい", "悲しい"]),
        ("japanese.csv", "本文,ラベル\n嬉しい,肯定\n悲しい,否定\n", ["肯定", "否定"], ["嬉しい", "悲しい"]),
        ("bom.csv", "\ufefflabel,text\npos,嬉しい\nneg,悲しい\n", ["pos", "neg"], ["嬉しい", "悲しい"]),
        ("tabs.tsv", "label\ttext\npos\t嬉しい, とても\nneg\t悲しい\n", ["pos", "neg"], ["嬉しい, とても", "悲しい"]),
        (
            "lines.jsonl",
            '{"text": "嬉しい", "label": 1}\n\n{"text": "悲しい", "label": 0}\n',
            ["1", "0"],
            ["嬉しい", "悲しい"],
        ),
        ("quoted.csv", 'label,text\npos,"嬉しい\n""とても"", 本当に"\nneg,x\n', ["pos", "neg"],
         ['嬉しい\n"とても", 本当に', "x"]),
        ("words.csv", "label,text\nNA,NA\nnull,1.0\n", ["NA", "null"], ["NA", "1.0"]),
    ],
)  # fmt: skip
def test_every_documented_form_of_a_dataset_is_read(
    tmp_path: Path, name: str, content: str, labels: list[str], texts: list[str]
) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    rows = read_rows(tmp_path / name)
    assert (rows.labels, rows.texts) == (labels, texts)


def test_row_numbers_lead_back_to_the_file(tmp_path: Path) -> None:
    """The header of a CSV is row 1; JSONL counts lines, including blank ones."""
    (tmp_path / "a.csv").write_text("label,text\npos,a\nneg,b\n")
    (tmp_path / "a.jsonl").write_text('{"label": "pos", "text": "a"}\n\n{"label": "neg", "text": "b"}\n')
    assert read_rows(tmp_path / "a.csv").row_numbers == [2, 3]
    assert read_rows(tmp_path / "a.jsonl").row_numbers == [1, 3]


def test_integer_labels_of_json_lines_stay_integers_beside_a_row_without_one(tmp_path: Path) -> None:
    lines = [{"label": 1, "text": "a"}, {"text": "b"}, {"label": 0, "text": "c"}]
    (tmp_path / "gap.jsonl").write_text("\n".join(map(json.dumps, lines)))
    rows = read_rows(tmp_path / "gap.jsonl")
    assert rows.labels == ["1", "", "0"]
    with pytest.raises(BadDataset, match="row 2 has no label"):
        split_rows(rows, GUIDE)


def test_splits_are_eight_to_one_to_one_and_stratified() -> None:
    data = split_rows(rows_of(*many("pos", 50), *many("neu", 100), *many("neg", 250)), GUIDE)
    assert data.report["sizes"] == {"train": 320, "valid": 40, "test": 40}
    assert data.report["labels"] == {
        "neg": {"train": 200, "valid": 25, "test": 25},
        "neu": {"train": 80, "valid": 10, "test": 10},
        "pos": {"train": 40, "valid": 5, "test": 5},
    }
    assert data.train.targets.sum(axis=0).tolist() == [200, 80, 40]  # columns in the order of data.labels


def test_the_seed_alone_decides_the_split() -> None:
    rows = rows_of(*many("pos", 40), *many("neg", 40))
    again = [texts_by_split(split_rows(rows, make_config("guide", seed=seed))) for seed in (200, 200, 201)]
    assert again[0] == again[1]
    assert again[0] != again[2]


def test_a_row_keeps_its_label_and_number_through_the_split() -> None:
    rows = rows_of(*many("pos", 30), *many("neg", 30))
    data = split_rows(rows, GUIDE)
    for split in (data.train, data.valid, data.test):
        for text, target, number in zip(split.texts, split.targets, split.row_numbers, strict=True):
            assert text == rows.texts[number - 2]
            assert data.labels[target.argmax()] == rows.labels[number - 2]


@pytest.mark.parametrize(
    "variant",
    [
        "RT @someone: {}",
        "RT @another RT @someone: {}",
        " RT @someone: {}",
        "{} https://t.co/AbC123",
        "@someone @another {}",
        "  {}　\n",
    ],
)
def test_no_text_stands_in_two_splits(variant: str) -> None:
    """Retweets, and copies that differ in links, mentions and white space, are the same text."""
    originals = [*many("pos", 30), *many("neg", 30)]
    copies = [(label, variant.format(text)) for label, text in originals]
    data = split_rows(rows_of(*originals, *copies), GUIDE)
    assert (data.report["rows"], data.report["duplicates"]) == (60, 60)
    keys = [same_text_key(text) for texts in texts_by_split(data).values() for text in texts]
    assert len(keys) == len(set(keys)) == 60


def test_a_text_under_two_labels_is_left_out_and_reported() -> None:
    data = split_rows(rows_of(*many("pos", 20), *many("neg", 20), ("neg", "RT @someone: posの文、その3")), GUIDE)
    assert (data.report["conflicting"], data.report["conflicting_rows"]) == (1, [5])
    assert data.report["rows"] == 39
    assert all("posの文、その3" not in texts for texts in texts_by_split(data).values())


def test_blank_texts_are_left_out_and_counted() -> None:
    data = split_rows(rows_of(*many("pos", 20), *many("neg", 20), ("pos", " 　\n"), ("neg", "")), GUIDE)
    assert (data.report["read"], data.report["blank"], data.report["rows"]) == (42, 2, 40)


def test_integer_labels_are_ordered_by_value_and_their_polarity_is_never_guessed() -> None:
    data = split_rows(rows_of(*many("10", 10), *many("2", 10), *many("-1", 10)), GUIDE)
    assert data.labels == ["-1", "2", "10"]
    assert find_polarity(["0", "1"], GUIDE) is None
    assert find_polarity(["0", "1"], make_config("guide", polarity={"1": 1, "0": -1})) == {"0": -1, "1": 1}
    assert find_polarity(["ネガティブ", "neutral", "Positive"], GUIDE) == {
        "ネガティブ": -1, "neutral": 0, "Positive": 1,
    }  # fmt: skip


def test_a_label_map_names_merges_and_orders_the_labels() -> None:
    config = make_config("guide", labels={"1": "positive", "0": "negative", "-1": "negative"})
    data = split_rows(rows_of(*many("0", 10), *many("1", 20), *many("-1", 10)), config)
    assert data.labels == ["positive", "negative"]
    assert {name: sum(parts.values()) for name, parts in data.report["labels"].items()} == {
        "positive": 20,
        "negative": 20,
    }


def test_a_row_may_have_several_labels_or_none_when_the_task_says_so() -> None:
    config = make_config("guide", task="multi_label", labels={"a": "a", "b": "b"})
    rows = rows_of(*many("a|b", 10), *many("b", 10), *many("", 10), *many(" b | a | b ", 10))
    data = split_rows(rows, config)
    expected = {"a|b": [1, 1], "b": [0, 1], "": [0, 0], " b | a | b ": [1, 1]}
    for split in (data.train, data.valid, data.test):
        for number, target in zip(split.row_numbers, split.targets, strict=True):
            assert target.tolist() == expected[rows.labels[number - 2]]


BAD_FILES: dict[str, tuple[bytes | None, list[str]]] = {
    "missing.csv": (None, ["missing.csv", "name a CSV, TSV, JSONL or Parquet"]),
    "empty.csv": (b"", ["empty.csv is empty", "header"]),
    "empty.jsonl": (b"", ["empty.jsonl is empty"]),
    "blank.csv": (b"\n\n", ["blank.csv", "header"]),
    "onlybom.csv": (b"\xef\xbb\xbf", ["onlybom.csv", "header"]),
    "header.csv": (b"label,text\n", ["header.csv holds no rows"]),
    "columns.csv": (b"mood,words\ngood,hello\n", ["mood, words", "name one of them label", "text"]),
    "bytes.csv": (b"label,text\npositive,\x82\n", ["row 2 of bytes.csv: the row is not UTF-8", "convert"]),
    "bytes.jsonl": (b'{"label": "p", "text": "\x82"}\n', ["not UTF-8"]),
    "no.parquet": (b"PAR1 no", ["no.parquet: the file is not readable Parquet", "write it again"]),
    "no.csv.gz": (b"label,text\n", ["no.csv.gz cannot be unpacked", "fetch it again"]),
    "torn.jsonl": (b'{"label": "p", "text": "a"}\n{"label": "n", "te\n', ["row 2 of torn.jsonl", "not JSON; correct"]),
    "array.jsonl": (b'["p", "a"]\n', ["row 1 of array.jsonl is not a JSON object", '{"label"']),
    "long.csv": (b"label,text\np,a\np," + b"x" * 100_001 + b"\n", ["row 3", "100,001", "shorten or remove it"]),
    "commas.csv": (b"label,text\n1,hello, world\n0,good, bye\n", ["row 2 of commas.csv", "3 columns"]),
    "quote.csv": (b'label,text\np,"open\nn,b\n', ["row 2 of quote.csv: the row cannot be read", "correct it"]),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_that_cannot_be_read_is_refused_in_one_sentence_with_the_remedy(tmp_path: Path, name: str) -> None:
    content, fragments = BAD_FILES[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(BadDataset) as refused:
        read_rows(tmp_path / name)
    assert "\n" not in str(refused.value)
    assert [fragment for fragment in fragments if fragment not in str(refused.value)] == []


@pytest.mark.parametrize(
    ("labelled", "overrides", "fragments"),
    [
        (many("pos", 20), {}, ["label pos", "at least two"]),
        ([*many("pos", 20), *many("neg", 3)], {}, ["'neg' has 3", "row 22", "at least 4", "add rows"]),
        (many("a", 5) + many("b", 4), {"task": "multi_label", "loss": "bce"}, ["9 distinct texts", "at least 10"]),
        ([*many("pos", 20), *many("neg", 4)], {"folds": 5}, ["'neg' has 4", "5 folds", "add rows", "--folds 4"]),
        (many("a|b", 12), {"task": "multi_label", "folds": 13}, ["12 distinct texts", "13 folds", "--folds 12"]),
        (
            [*many("pos", 20), *many("neg", 20), ("poz", "x")],
            {"labels": {"pos": "pos", "neg": "neg"}},
            ["label 'poz' in row 42 is none of pos, neg", "fix the row", "--labels"],
        ),
        (many("pos", 20), {"labels": {"pos": "pos", "neg": "neg"}}, ["'neg' has 0", "add rows"]),
        ([("pos", " "), ("neg", "　")] * 20, {}, ["0 distinct texts", "blank"]),
        ([*many("pos", 20), (" ", "x")], {}, ["row 22 has no label", "fill it in"]),
        (many("a", 60), {"task": "multi_label", "train_size": 0.98, "valid_size": 0.5}, ["60 dist", "at least 100"]),
    ],
)
def test_rows_that_cannot_be_split_are_refused_with_the_value_and_the_remedy(
    labelled: list[tuple[str, str]], overrides: dict[str, Any], fragments: list[str]
) -> None:
    with pytest.raises(BadDataset) as refused:
        split_rows(rows_of(*labelled), make_config("guide", **overrides))
    assert "\n" not in str(refused.value)
    assert [fragment for fragment in fragments if fragment not in str(refused.value)] == []


@pytest.mark.parametrize("unstorable", ["a\\u0000b", "a\\ud800b"])
def test_a_text_that_no_database_can_store_is_refused_before_training(tmp_path: Path, unstorable: str) -> None:
    lines = [f'{{"label": "{label}", "text": "{text}"}}' for label, text in [*many("p", 20), *many("n", 20)]]
    lines[2] = f'{{"label": "p", "text": "{unstorable}"}}'
    (tmp_path / "odd.jsonl").write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(BadDataset, match="row 3"):
        split_rows(read_rows(tmp_path / "odd.jsonl"), GUIDE)


@pytest.mark.parametrize(
    ("tweet", "cleaned"),
    [
        ("最高！  https://t.co/abc　また行く\n", "最高！ また行く"),
        ("@tanaka ありがとう ＠suzuki も", "ありがとう も"),
        ("3 &lt; 5 &amp; 嬉しい", "3 < 5 & 嬉しい"),
        ("連絡は a@example.com まで", "連絡は a@example.com まで"),
        ("https://t.co/abc", "https://t.co/abc"),
        ("これ→https://t.co/abc最高だった", "これ→ 最高だった"),
    ],
)
def test_cleaning_removes_mentions_and_links_and_keeps_emotion(tweet: str, cleaned: str) -> None:
    assert [clean(tweet, version) for version in ("1", "2")] == [cleaned, cleaned]


@pytest.mark.parametrize(
    ("tweet", "cleaned"),
    [
        ("#映画 と ＃音楽（#日本2026）", "映画 と 音楽（日本2026）"),
        ("C# と #1 と a#b は違う", "C# と #1 と a#b は違う"),
        ("すごーーーーーいｗｗｗｗｗｗ！！！！", "すごーーーいｗｗｗ！！！"),
        ("100000円と0000", "100000円と0000"),
        ("😭😭😭😭😭 👍🏽 ❤️ 👩‍👧", "😭😭😭 👍 ❤ 👩👧"),
        ("やった(((o(*ﾟ▽ﾟ*)o)))", "やった(((o(*ﾟ▽ﾟ*)o)))"),
        ("(´▽｀)(；ω；)ヽ(ﾟ∀ﾟ)ノ", "(´▽｀)(；ω；)ヽ(ﾟ∀ﾟ)ノ"),
        ("\ufe0f", "\ufe0f"),
    ],
)
def test_the_second_cleaner_keeps_words_and_kaomoji_and_cuts_repetition(tweet: str, cleaned: str) -> None:
    assert clean(tweet, "2") == cleaned
    assert clean(cleaned, "2") == cleaned


def test_neologdn_makes_widths_one() -> None:
    assert clean("ﾊﾝｶｸ　と Ｆｕｌｌ #映画 すごーーーーい", "neologdn") == "ハンカクとFull映画すごーい"


def test_tokenizers_take_kaomoji_apart_where_a_cleaner_keeps_them() -> None:
    """The tokenizer normalises to NFKC, as in pretraining; `training/text/cleaning.py` explains it."""
    tokens = load_tokenizer(STARTER_FOLDER).tokenize(clean("(´▽｀)"))
    assert "".join(tokens).replace("##", "") == "(\u0301▽`)"
    assert unicodedata.normalize("NFKC", "(ﾟДﾟ)") == "(\u309aД\u309a)"


def test_a_model_is_scored_with_the_cleaner_it_was_trained_with() -> None:
    rows = rows_of(*many("pos", 20), *many("neg", 20), ("pos", "#映画 ｗｗｗｗｗｗ"))
    for cleaner, cleaned in (("1", "#映画 ｗｗｗｗｗｗ"), ("2", "映画 ｗｗｗ")):
        data = split_rows(rows, make_config("fast", cleaner=cleaner))
        assert cleaned in [*data.train.texts, *data.valid.texts, *data.test.texts]
        encoder, tokenizer = BaseModelFolder("starter", STARTER_FOLDER), load_tokenizer(STARTER_FOLDER)
        spec = make_spec(["neg", "pos"], make_config("fast", cleaner=cleaner), encoder, tokenizer)
        assert clean("#映画 ｗｗｗｗｗｗ", spec.cleaner_version) == cleaned
    with pytest.raises(BadConfig, match="cleaner is '3'"):
        make_config("fast", cleaner="3")


def test_the_guide_preset_holds_the_guides_values() -> None:
    expected = {
        "head": "guide", "pooling": "auto", "loss": "bce", "dropout": 0.2, "max_length": 200, "train_size": 0.8,
        "valid_size": 0.5, "seed": 200, "epochs": 20, "train_batch_size": 16, "valid_batch_size": 8,
        "test_batch_size": 8, "optimizer": "adamw", "learning_rate": 1e-5, "schedule": "step", "step_gamma": 0.75,
    }  # fmt: skip
    written = GUIDE.model_dump()
    assert {name: written[name] for name in expected} == expected


def test_a_configuration_survives_the_database_and_cannot_be_changed() -> None:
    config = make_config("fast", labels={"0": "negative", "1": "positive"}, epochs=3)
    assert TrainConfig(**json.loads(config.model_dump_json())) == config
    with pytest.raises(ValueError, match="frozen"):
        config.epochs = 4


@pytest.mark.parametrize(
    ("preset", "overrides", "fragments"),
    [
        ("quick", {}, ["'quick'", "guide, fast"]),
        ("guide", {"epochs": 0}, ["epochs is 0", "greater than or equal to 1"]),
        ("guide", {"train_batch_size": 1}, ["train_batch_size is 1", "greater than or equal to 2"]),
        ("guide", {"learning_rate": "fast"}, ["learning_rate is 'fast'", "number"]),
        ("guide", {"schedule": "cosin"}, ["schedule is 'cosin'", "cosine"]),
        ("guide", {"lr": 1}, ["lr is not a setting", "learning_rate"]),
        ("guide", {"task": "multi_label", "loss": "cross_entropy"}, ["'cross_entropy'", "'bce'"]),
        ("guide", {"labels": {"0": "same", "1": "same"}}, ["['same']", "at least two"]),
        ("guide", {"polarity": {"good": 2}}, ["'good' is 2", "between -1 and 1"]),
        ("guide", {"epochs": 0, "dropout": 1}, ["epochs is 0", "dropout is 1"]),
        ("fast", {"folds": 1}, ["folds is 1", "greater than or equal to 2"]),
        ("fast", {"folds": 5, "split": "guide"}, ["split 'guide'", "copies", "leave out one"]),
    ],
)
def test_a_bad_setting_is_named_with_its_value_and_what_is_allowed(
    preset: str, overrides: dict[str, Any], fragments: list[str]
) -> None:
    with pytest.raises(BadConfig) as refused:
        make_config(preset, **overrides)
    assert "\n" not in str(refused.value)
    assert [fragment for fragment in fragments if fragment not in str(refused.value)] == []
