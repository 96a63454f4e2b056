"""Tokenising with the dictionary a model was trained on, and finding base models: starter, folders, the hub."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fugashi
import ipadic
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tests.conftest import PATIENCE_SECONDS
from tests.support.paths import ROOT
from training.config import make_config
from training.errors import BadArtifact, ModelUnavailable
from training.model.artifact import load_artifact
from training.model.base_model import STARTER, STARTER_FOLDER, BaseModelFolder, resolve_base_model
from training.model.classifier import build_model
from training.store.sealed_folder import seal
from training.text.tokenizer import UnknownShare, encode, load_tokenizer, mecab_dictionary

# ipadic has 公務員 as one word, unidic-lite cuts it into 公務 and 員.
SENTENCE = "国家公務員になりたくなかった。"
JAPANESE = {"tokenizer_class": "BertJapaneseTokenizer"}
MECAB = {"word_tokenizer_type": "mecab", "subword_tokenizer_type": "wordpiece", "do_lower_case": False}


def v1_folder(folder: Path, tokenizer_config: dict[str, Any]) -> Path:
    """A folder like that of `bert-base-japanese` (v1), with its tokenizer settings."""
    folder.mkdir(parents=True)
    shutil.copy(STARTER_FOLDER / "vocab.txt", folder)
    config = json.loads((STARTER_FOLDER / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | JAPANESE), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config), encoding="utf-8")
    return folder


def words(tokenizer: PreTrainedTokenizerBase, text: str) -> list[str]:
    """The words the pieces came from."""
    return " ".join(tokenizer.tokenize(text)).replace(" ##", "").split()


def ipadic_words(text: str) -> list[str]:
    return [word.surface for word in fugashi.GenericTagger(ipadic.MECAB_ARGS)(text)]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer(STARTER_FOLDER)


@pytest.mark.parametrize(
    "tokenizer_config",
    [
        pytest.param({**JAPANESE, **MECAB}, id="class in both files"),
        pytest.param({**MECAB, "model_max_length": 512}, id="class in config.json alone, as on the hub"),
        pytest.param({**JAPANESE, **MECAB, "mecab_kwargs": None}, id="mecab_kwargs null"),
    ],
)
def test_a_v1_model_that_names_no_dictionary_is_segmented_with_ipadic(
    tmp_path: Path, tokenizer_config: dict[str, Any]
) -> None:
    folder = v1_folder(tmp_path / "v1", tokenizer_config)
    ours, plain = load_tokenizer(folder), AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    assert mecab_dictionary(ours) == "ipadic"
    assert words(ours, SENTENCE) == ipadic_words(SENTENCE)
    assert words(plain, SENTENCE) != ipadic_words(SENTENCE)  # the trap itself


def test_a_model_that_names_its_dictionary_keeps_it(tmp_path: Path) -> None:
    folder = v1_folder(tmp_path / "v2", {**JAPANESE, **MECAB, "mecab_kwargs": {"mecab_dic": "unidic_lite"}})
    loaded = load_tokenizer(folder)
    assert mecab_dictionary(loaded) == "unidic_lite"
    assert words(loaded, SENTENCE) != ipadic_words(SENTENCE)


def test_saving_a_v1_tokenizer_writes_the_dictionary_down_for_every_other_reader(tmp_path: Path) -> None:
    load_tokenizer(v1_folder(tmp_path / "v1", MECAB)).save_pretrained(str(tmp_path / "saved"))
    shutil.copy(tmp_path / "v1" / "config.json", tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert saved["mecab_kwargs"] == {"mecab_dic": "ipadic"}
    plain = AutoTokenizer.from_pretrained(str(tmp_path / "saved"), local_files_only=True)
    assert words(plain, SENTENCE) == ipadic_words(SENTENCE)


def test_an_artifact_whose_tokenizer_changed_its_dictionary_is_refused(
    tiny_artifact: SimpleNamespace, tmp_path: Path
) -> None:
    """Even with sound digests: the words must be those the model was trained on."""
    assert load_artifact(tiny_artifact.folder, tiny_artifact.sha256).spec.mecab_dictionary == "ipadic"
    draft = shutil.copytree(tiny_artifact.folder, tmp_path / "draft")
    path = draft / "tokenizer_config.json"
    changed = json.loads(path.read_text(encoding="utf-8")) | {"mecab_kwargs": {"mecab_dic": "unidic_lite"}}
    path.write_text(json.dumps(changed), encoding="utf-8")
    sha256 = seal(draft, tmp_path / "resealed")
    with pytest.raises(BadArtifact, match=r"dictionary ipadic.*unidic_lite; restore its tokenizer_config\.json"):
        load_artifact(tmp_path / "resealed", sha256)


@pytest.mark.parametrize("text", ["これは[SEP]と[MASK]だ", "[CLS][PAD][UNK]", "[SEP]", "[MASK] 嬉しい [SEP] 悲しい"])
def test_a_special_token_written_in_a_tweet_is_text(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    (ids,) = encode(tokenizer, [text], 50)
    assert (ids[0], ids[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)
    assert not set(ids[1:-1]) & set(tokenizer.all_special_ids)


@pytest.mark.parametrize("max_length", [8, 16, 200])
def test_a_long_text_is_cut_to_max_length_and_keeps_its_closing_token(
    tokenizer: PreTrainedTokenizerBase, max_length: int
) -> None:
    long, short = encode(tokenizer, ["とても長い文章です。" * 100, "短い"], max_length)
    assert len(long) == max_length
    assert long[-1] == short[-1] == tokenizer.sep_token_id
    assert long[:-1] == encode(tokenizer, ["とても長い文章です。" * 100], 2000)[0][: max_length - 1]
    assert len(short) < 8  # nothing is padded here


def test_the_share_of_unknown_tokens_leaves_special_tokens_out(tokenizer: PreTrainedTokenizerBase) -> None:
    """Even where the special tokens are unknown ones themselves."""
    known = tokenizer.convert_tokens_to_ids("雨")
    unknown = tokenizer.unk_token_id
    cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
    rows = [[cls, known, unknown, known, known, sep], [cls, unknown, sep], [cls, sep], [cls, known, sep]]
    assert encode(tokenizer, ["雨"], 8) == [rows[3]]
    assert UnknownShare(tokenizer)(rows) == [0.25, 1.0, 0.0, 0.0]
    ends = load_tokenizer(STARTER_FOLDER)
    ends.unk_token = ends.sep_token
    assert UnknownShare(ends)([[cls, known, sep, sep], [cls, known, sep]]) == [0.5, 0.0]
    ends.unk_token = None
    assert UnknownShare(ends)(rows[:2]) == [None, None]


def test_texts_without_any_word_still_become_a_row(tokenizer: PreTrainedTokenizerBase) -> None:
    assert encode(tokenizer, ["", "　"], 50) == [[tokenizer.cls_token_id, tokenizer.sep_token_id]] * 2
    assert encode(tokenizer, [], 50) == []


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda folder: shutil.rmtree(folder), id="no folder"),
        pytest.param(lambda folder: (folder / "vocab.txt").unlink(), id="no vocabulary"),
        pytest.param(lambda folder: (folder / "tokenizer_config.json").write_text("{"), id="torn configuration"),
    ],
)
def test_a_tokenizer_that_cannot_be_loaded_is_named(tmp_path: Path, spoil: Callable[[Path], object]) -> None:
    folder = v1_folder(tmp_path / "v1", {**JAPANESE, **MECAB})
    spoil(folder)
    with pytest.raises(ModelUnavailable, match="v1 cannot be loaded"):
        load_tokenizer(folder)


def test_the_starter_needs_no_folder_and_no_network() -> None:
    assert resolve_base_model(STARTER, None, []) == BaseModelFolder(STARTER, STARTER_FOLDER)


def test_a_local_folder_inside_the_roots_is_taken(tiny_encoder: Path, tmp_path: Path) -> None:
    found = resolve_base_model(str(tiny_encoder), "ignored", [tmp_path, tiny_encoder.parent])
    assert found == BaseModelFolder(str(tiny_encoder), tiny_encoder.resolve(), None)


def escape_by_itself(root: Path, outside: Path) -> str:
    return str(outside)


def escape_by_dots(root: Path, outside: Path) -> str:
    return f"{root}/../{outside.name}"


def escape_by_symlink(root: Path, outside: Path) -> str:
    (root / "link").symlink_to(outside)
    return str(root / "link")


def escape_by_a_like_name(root: Path, outside: Path) -> str:
    return str(outside.rename(root.with_name(root.name + "-other")))


def escape_by_relative_path(root: Path, outside: Path) -> str:
    return f"./{os.path.relpath(outside)}"


@pytest.mark.parametrize(
    "escape",
    [escape_by_itself, escape_by_dots, escape_by_symlink, escape_by_a_like_name, escape_by_relative_path],
)
def test_a_folder_outside_the_roots_is_refused_however_it_is_named(
    tmp_path: Path, escape: Callable[[Path, Path], str]
) -> None:
    root, outside = tmp_path / "models", v1_folder(tmp_path / "private", MECAB)
    root.mkdir()
    name = escape(root, outside)
    with pytest.raises(ModelUnavailable) as refused:
        resolve_base_model(name, None, [root])
    assert repr(name) in str(refused.value)
    assert "TWEETSCORE_READ_ROOTS" in str(refused.value)


@pytest.mark.parametrize("name", ["owner/../x", "owner/model/../../etc", "a b", "", "owner/model\n", "http://x/y"])
def test_what_is_neither_a_path_nor_a_hub_name_is_refused(name: str) -> None:
    with pytest.raises(ModelUnavailable, match="is not a hub name; use owner/model, a folder, or 'starter'"):
        resolve_base_model(name, None, [])


def test_a_folder_without_a_model_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ModelUnavailable, match=r"has no config\.json; save a model there first"):
        resolve_base_model(str(tmp_path), None, [tmp_path])


def resolve_offline(name: str, revision: str | None, hub: Path) -> subprocess.CompletedProcess[str]:
    """In a process of its own, since huggingface_hub reads its settings when it is imported."""
    code = (
        "import sys; from training.model.base_model import resolve_base_model\n"
        "from training.errors import ModelUnavailable\n"
        f"try: found = resolve_base_model({name!r}, {revision!r}, [])\n"
        "except ModelUnavailable as error: sys.exit(str(error))\n"
        "print(found.name, found.folder, found.revision, sep='\\n')"
    )
    environment = {**os.environ, "HF_HOME": str(hub), "HF_HUB_CACHE": str(hub / "hub"), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
    )


def test_a_hub_name_offline_names_the_model_and_the_way_out(tmp_path: Path) -> None:
    ended = resolve_offline("someone/some-bert", None, tmp_path)
    assert ended.returncode == 1
    for fragment in ("'someone/some-bert'", "check the name and the network", "local copy", "'starter'"):
        assert fragment in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("pinned", [True, False])
def test_the_guides_old_hub_name_finds_the_renamed_model_and_pins_its_revision(tmp_path: Path, pinned: bool) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    cache = tmp_path / "hub" / "models--tohoku-nlp--bert-base-japanese"
    snapshot = v1_folder(cache / "snapshots" / commit, MECAB)
    (snapshot / "model.safetensors").write_bytes(b"")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(commit)
    ended = resolve_offline("cl-tohoku/bert-base-japanese", commit if pinned else None, tmp_path)
    assert ended.stdout.splitlines() == ["tohoku-nlp/bert-base-japanese", str(snapshot), commit], ended.stderr


def cut_in_the_middle(weights: Path) -> None:
    weights.write_bytes(weights.read_bytes()[:-1000])


def cut_in_the_header(weights: Path) -> None:
    weights.write_bytes(weights.read_bytes()[:100])


def without_a_layer(weights: Path) -> None:
    kept = {name: tensor for name, tensor in load_file(weights).items() if "layer.1." not in name}
    save_file(kept, weights, metadata={"format": "pt"})


def of_another_size(weights: Path) -> None:
    tensors = load_file(weights) | {"embeddings.word_embeddings.weight": torch.zeros(10, 32)}
    save_file(tensors, weights, metadata={"format": "pt"})


@pytest.mark.parametrize(
    "damage", [Path.unlink, cut_in_the_middle, cut_in_the_header, without_a_layer, of_another_size]
)
def test_damaged_weights_are_refused_in_one_sentence(
    tiny_encoder: Path, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    """Above all, no part of an encoder is ever left at random because its weights were not in the file."""
    folder = shutil.copytree(tiny_encoder, tmp_path / "damaged")
    damage(folder / "model.safetensors")
    with pytest.raises(ModelUnavailable) as refused:
        build_model(BaseModelFolder("damaged", folder), 2, make_config("fast", base_model="damaged"))
    assert "base model 'damaged' cannot be loaded" in str(refused.value)
    assert "\n" not in str(refused.value)
