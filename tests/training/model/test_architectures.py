"""Encoders of every shape, tiny and random: fine-tuned by the route of a job, loaded by plain transformers."""

import json
import shutil
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertJapaneseTokenizer,
    BertModel,
    DebertaV2Config,
    DebertaV2Model,
    DistilBertConfig,
    DistilBertModel,
    LukeConfig,
    LukeModel,
    ModernBertConfig,
    ModernBertModel,
    RobertaConfig,
    RobertaModel,
    pipeline,
)

from db import jobs, registry
from db.models import ModelVersion
from db.session import Database
from tests.support.classifiers import SMALL, TEXTS
from tests.support.classifiers import save_unigram as unigram
from training.config import make_config
from training.errors import ModelUnavailable
from training.jobs.context import TrainingContext
from training.jobs.run import run_next_job
from training.model import base_model
from training.model.artifact import load_artifact
from training.model.base_model import STARTER_FOLDER, BaseModelFolder, resolve_base_model
from training.model.batching import pad
from training.model.classifier import build_model
from training.text.cleaning import clean
from training.text.tokenizer import encode, load_tokenizer
from worker.connections import training_context
from worker.settings import load_settings


def japanese(folder: Path, **settings: Any) -> None:
    """A MeCab tokenizer with the starter's vocabulary, of which every character and the unknown word are a part."""
    BertJapaneseTokenizer(str(STARTER_FOLDER / "vocab.txt"), word_tokenizer_type="mecab", **settings).save_pretrained(
        str(folder)
    )


def bert(**options: Any) -> BertModel:
    return BertModel(BertConfig(vocab_size=8000, **SMALL), **options)


SHAPES: dict[str, tuple[Callable[[], Any], Callable[[Path], None], str]] = {
    "bert-base-japanese (v1, ipadic)": (bert, lambda f: japanese(f, mecab_kwargs={"mecab_dic": "ipadic"}), "native"),
    "bert-base-japanese-v3 (unidic-lite)": (
        bert, lambda f: japanese(f, mecab_kwargs={"mecab_dic": "unidic_lite"}), "native",
    ),
    "bert-base-japanese-char": (
        bert, lambda f: japanese(f, mecab_kwargs={"mecab_dic": "ipadic"}, subword_tokenizer_type="character"), "native",
    ),
    "bert without a pooler": (lambda: bert(add_pooling_layer=False), unigram, "mean"),
    "distilbert, no token types": (
        lambda: DistilBertModel(DistilBertConfig(vocab_size=64, dim=32, n_layers=2, n_heads=2, hidden_dim=64)),
        unigram, "native",
    ),
    "deberta-v2": (
        lambda: DebertaV2Model(
            DebertaV2Config(vocab_size=64, relative_attention=True, pos_att_type=["p2c", "c2p"], **SMALL)
        ),
        unigram, "native",
    ),
    "modernbert": (
        lambda: ModernBertModel(
            ModernBertConfig(vocab_size=64, pad_token_id=0, cls_token_id=2, sep_token_id=3, **SMALL)
        ),
        unigram, "native",
    ),
    "luke": (
        lambda: LukeModel(
            LukeConfig(vocab_size=64, entity_vocab_size=8, entity_emb_size=16, max_position_embeddings=202,
                       pad_token_id=0, **SMALL)
        ),
        unigram, "native",
    ),
    "roberta": (
        lambda: RobertaModel(RobertaConfig(vocab_size=64, max_position_embeddings=202, pad_token_id=0, **SMALL)),
        unigram, "native",
    ),
}  # fmt: skip


# One that transformers classify with, and one that they do not; the others are slow.
ORDINARY = ("bert-base-japanese (v1, ipadic)", "bert without a pooler")


@pytest.fixture(scope="session")
def shape_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def shape(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("shapes") / "encoder"
            build, save_tokenizer, _ = SHAPES[name]
            torch.manual_seed(0)
            build().save_pretrained(made[name])
            save_tokenizer(made[name])
        return made[name]

    return shape


def here(home: Path, *roots: Path) -> TrainingContext:
    """The context of a trainer in `home`, which may read below `roots`."""
    return training_context(load_settings(home=home, device="cpu", lease_seconds=30, read_roots=roots))


def fine_tuned(database: Database, home: Path, base: Path, dataset: Path, **settings: Any) -> ModelVersion:
    """One epoch by the route of a job."""
    context = here(home, home, base.parent)
    config = make_config(
        "fast", base_model=str(base), **{"epochs": 1, "train_batch_size": 8, "baseline": False, **settings}
    )
    with database.begin() as session:
        job = jobs.submit(
            session, request_id=uuid.uuid4().hex, dataset=str(dataset), dataset_sha256=None,
            config=config.model_dump(mode="json"),
        )  # fmt: skip
    run_next_job(database, context, "here", threading.Event())
    with database.read() as session:
        found = jobs.get(session, job.id)
        assert (found.state, found.error) == ("succeeded", None)
        version = registry.of_job(session, job.id)
    assert version is not None
    return version


def folder_of(version: ModelVersion) -> Path:
    return Path(version.artifact_url.removeprefix("file://"))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in ORDINARY else pytest.mark.slow) for name in SHAPES]
)
def test_every_shape_is_fine_tuned_and_plain_transformers_give_the_same_logits(
    sqlite: Database, shape_of: Callable[[str], Path], tmp_path: Path, labelled_csv: Path, name: str
) -> None:
    artifact = load_artifact(folder_of(fine_tuned(sqlite, tmp_path, shape_of(name), labelled_csv)))
    assert artifact.spec.config.pooling == SHAPES[name][2]
    rows = encode(artifact.tokenizer, list(map(clean, TEXTS)), 200)
    with torch.inference_mode():
        ours = artifact.model(*pad(rows, artifact.tokenizer.pad_token_id))
        alone = torch.cat([artifact.model(*pad([row], artifact.tokenizer.pad_token_id)) for row in rows])
    assert ours.shape == (4, 2)
    assert torch.allclose(ours, alone, atol=1e-5)  # padding is masked
    if artifact.spec.config.pooling == "mean":
        return  # transformers have no classifier of this shape that pools by the mean
    plain = AutoModelForSequenceClassification.from_pretrained(artifact.folder).eval()
    with torch.inference_mode():
        theirs = torch.cat([plain(input_ids=torch.tensor([row])).logits for row in rows])
    assert torch.allclose(ours, theirs, atol=1e-5)
    said = pipeline("text-classification", str(artifact.folder))(TEXTS, top_k=None)
    labels = artifact.spec.labels
    scores = np.array([[next(s["score"] for s in row if s["label"] == label) for label in labels] for row in said])
    assert scores == pytest.approx(ours.softmax(1).numpy(), abs=1e-5)


def test_a_classifier_of_other_labels_is_a_base_model_too(tmp_path: Path, shape_of: Callable[[str], Path]) -> None:
    base = shape_of("luke")
    plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=5)
    plain.save_pretrained(tmp_path / "five")
    model = build_model(BaseModelFolder("five", tmp_path / "five"), 2, make_config("fast"))
    wanted = plain.luke.encoder.layer[0].output.dense.weight
    assert torch.equal(model.network.luke.encoder.layer[0].output.dense.weight, wanted)
    assert model.network.classifier.out_features == 2


@pytest.mark.parametrize("name", ["distilbert, no token types", "luke", "bert without a pooler"])
def test_the_guides_head_takes_the_pooler_where_there_is_one_and_the_masked_mean_elsewhere(
    shape_of: Callable[[str], Path], name: str
) -> None:
    model = build_model(BaseModelFolder(name, shape_of(name)), 2, make_config("guide", max_length=64))
    assert model.config.pooling == ("pooler" if name == "luke" else "mean")
    with torch.inference_mode():
        assert model.eval()(*pad([[2, 7, 8, 3], [2, 9, 3]], 0)).shape == (2, 2)


@pytest.mark.parametrize(
    ("settings", "package", "line"),
    [
        (
            {"word_tokenizer_type": "sudachi", "sudachi_kwargs": {}},
            "sudachipy",
            "pip install sudachipy sudachidict_core",
        ),
        ({"word_tokenizer_type": "jumanpp"}, "rhoknp", "pip install rhoknp"),
        ({"mecab_kwargs": {"mecab_dic": "unidic"}}, "unidic", "pip install unidic"),
    ],
)
def test_a_package_the_tokenizer_lacks_is_named_with_its_pip_line(
    tmp_path: Path, settings: dict[str, Any], package: str, line: str
) -> None:
    folder = tmp_path / "encoder"
    folder.mkdir()
    for name in ("config.json", "vocab.txt", "tokenizer_config.json"):
        shutil.copy(STARTER_FOLDER / name, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config | settings), encoding="utf-8")
    with pytest.raises(ModelUnavailable, match=f"needs the package {package}, .*`{line}`"):
        load_tokenizer(folder)


def test_hub_names_resolve_to_a_pinned_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str | None]] = []

    def fetch(name: str, revision: str | None) -> BaseModelFolder:
        asked.append((name, revision))
        return BaseModelFolder(name, STARTER_FOLDER, revision)

    monkeypatch.setattr(base_model, "_fetch", fetch)
    pinned = "65243d6e5629b969c77309f217bd7b1a79d43c7e"
    resolve_base_model("cl-tohoku/bert-base-japanese-v3", None, [])
    resolve_base_model("tohoku-nlp/bert-base-japanese-v3", "0" * 40, [])
    resolve_base_model("tohoku-nlp/bert-base-japanese", None, [])
    assert asked == [
        ("tohoku-nlp/bert-base-japanese-v3", pinned),
        ("tohoku-nlp/bert-base-japanese-v3", "0" * 40),
        ("tohoku-nlp/bert-base-japanese", None),
    ]


def test_the_first_model_of_a_hub_name_pins_its_revision_for_all_that_follow(
    sqlite: Database, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, labelled_csv: Path, tiny_encoder: Path
) -> None:
    asked: list[str | None] = []

    def fetch(name: str, revision: str | None) -> BaseModelFolder:
        asked.append(revision)
        return BaseModelFolder(name, tiny_encoder, revision or f"{len(asked)}" * 40)

    monkeypatch.setattr(base_model, "_fetch", fetch)
    for name in ("cl-tohoku/bert-base-japanese", "tohoku-nlp/bert-base-japanese"):
        config = make_config("fast", base_model=name, epochs=1, train_batch_size=8, baseline=False)
        with sqlite.begin() as session:
            jobs.submit(
                session, request_id=name, dataset=str(labelled_csv), dataset_sha256=None,
                config=config.model_dump(mode="json"),
            )  # fmt: skip
        context = here(tmp_path / "home", tmp_path)
        run_next_job(sqlite, context, "here", threading.Event())
    assert asked == [None, "1" * 40]
    with sqlite.read() as session:
        assert {v.base_revision for v in registry.versions(session)} == {"1" * 40}
