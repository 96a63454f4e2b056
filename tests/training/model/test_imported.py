"""Classifiers of others: loaded as they are, or refused with the reason."""

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2ForSequenceClassification,
)

from tests.support.classifiers import SMALL, TEXTS, change_json, copy_of, save_bert, save_roberta, save_unigram
from training.errors import BadConfig, ModelUnavailable
from training.loop.reference import sample_reference, sample_texts
from training.model.artifact import REFERENCE_ROWS, load_artifact, save_artifact
from training.model.base_model import STARTER_FOLDER, BaseModelFolder
from training.model.imported import ImportedClassifier, ImportOptions, label_names, load_classifier
from training.reporting.model_card import write_imported_card
from training.text.cleaning import clean
from training.text.tokenizer import encode

CPU = torch.device("cpu")
NAMES = {"LABEL_0": "negative", "LABEL_1": "neutral", "LABEL_2": "positive"}


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three labels without names, in half precision, and a tokenizer that names no dictionary: bert v1, fine-tuned."""
    return save_bert(tmp_path_factory.mktemp("bert") / "bert", num_labels=3, dtype=torch.float16, ipadic_named=False)


@pytest.fixture(scope="module")
def roberta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_roberta(tmp_path_factory.mktemp("roberta") / "roberta")


@pytest.fixture
def copied(bert: Path, tmp_path: Path) -> Path:
    """A copy of the BERT, to be changed."""
    return copy_of(bert, tmp_path / "copy")


def load(folder: Path, **options: Any) -> ImportedClassifier:
    return load_classifier(BaseModelFolder("owner/model", folder, "a" * 40), ImportOptions(**options))


def refused(folder: Path, match: str, **options: Any) -> None:
    with pytest.raises(ModelUnavailable, match=match):
        load(folder, **options)


def test_the_sample_gives_the_same_distinct_texts_every_time() -> None:
    texts = sample_texts()
    assert sample_texts() == texts
    assert 1_000 < len(texts) == len(set(texts)) <= REFERENCE_ROWS
    assert set(sample_texts(10)) <= set(texts)


def test_the_artifact_gives_the_logits_of_plain_transformers_in_float32(bert: Path, tmp_path: Path) -> None:
    imported = load(bert, labels=NAMES)
    reference = sample_reference(imported, CPU, limit=100)
    save_artifact(tmp_path / "artifact", imported.model, imported.tokenizer, imported.spec, reference)
    artifact = load_artifact(tmp_path / "artifact")
    spec = artifact.spec
    assert (spec.labels, spec.temperature, spec.cleaner_version) == (list(NAMES.values()), 1.0, "2")
    assert (spec.base_model, spec.base_revision) == ("owner/model", "a" * 40)
    assert spec.polarity == {"negative": -1, "neutral": 0, "positive": 1}
    assert (spec.config.head, spec.config.pooling, spec.config.task) == ("linear", "native", "single_label")
    plain = AutoModelForSequenceClassification.from_pretrained(bert, dtype=torch.float32).eval()
    rows = encode(artifact.tokenizer, [clean(text) for text in sample_texts(100)], spec.config.max_length)
    assert artifact.reference is not None
    assert artifact.reference.rows == rows
    with torch.inference_mode():
        expected = torch.cat([plain(input_ids=torch.tensor([row])).logits for row in rows]).numpy()
        ours = torch.cat([artifact.model(torch.tensor([row]), torch.ones(1, len(row))) for row in rows[:5]]).numpy()
    assert np.allclose(artifact.reference.logits, expected, atol=1e-4)
    assert np.allclose(ours, expected[:5], atol=1e-4)
    assert expected.std(axis=0).min() > 0.05  # texts have different logits
    assert {weight.dtype for weight in artifact.model.state_dict().values()} == {torch.float32}


def test_a_tokenizer_that_names_no_dictionary_gets_ipadic_as_bert_base_japanese_v1_needs(
    bert: Path, tmp_path: Path
) -> None:
    imported = load(bert)
    assert imported.spec.mecab_dictionary == "ipadic"
    named = load(save_bert(tmp_path / "named", num_labels=3))
    assert encode(imported.tokenizer, TEXTS, 64) == encode(named.tokenizer, TEXTS, 64)


def test_the_models_own_labels_task_and_length_are_the_defaults(roberta: Path, tmp_path: Path) -> None:
    spec = load(roberta).spec
    assert spec.labels == ["NEGATIVE", "POSITIVE"]
    assert spec.polarity == {"NEGATIVE": -1, "POSITIVE": 1}
    assert spec.config.max_length == 65  # positions begin after the padding's
    many = save_bert(tmp_path / "many", num_labels=4, problem_type="multi_label_classification")
    assert load(many).spec.config.task == "multi_label"
    assert load(many, task="single_label").spec.config.task == "single_label"
    own = load(many, polarity={"LABEL_3": 0.5}, cleaner="1", max_length=32).spec
    assert own.polarity == {"LABEL_0": 0, "LABEL_1": 0, "LABEL_2": 0, "LABEL_3": 0.5}
    assert (own.cleaner_version, own.config.max_length) == ("1", 32)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"labels": {"LABEL_0": "a", "LABEL_1": "b"}}, "leaves out LABEL_2; .* LABEL_0, LABEL_1, LABEL_2"),
        ({"labels": NAMES | {"LABEL_3": "x"}}, "--labels names LABEL_3; .* are LABEL_0, LABEL_1, LABEL_2"),
        ({"labels": NAMES | {"LABEL_1": "negative"}}, "two outputs .* called 'negative'"),
        ({"labels": NAMES | {"LABEL_1": "a\x00"}}, "cannot be stored"),
        ({"labels": NAMES | {"LABEL_1": "a|b"}, "task": "multi_label"}, "contains |, which separates labels"),
        ({"labels": NAMES, "polarity": {"LABEL_0": 1}}, "--polarity names LABEL_0; .* negative, neutral, positive"),
        ({"task": "regression"}, "task is 'regression'"),
        ({"max_length": 513}, "max_length is 513; .* at most 512"),
        ({"cleaner": "9"}, "cleaner is '9'"),
    ],
)
def test_an_option_that_does_not_fit_the_model_is_refused(bert: Path, options: dict[str, Any], match: str) -> None:
    with pytest.raises(BadConfig, match=match):
        load(bert, **options)


def test_an_encoder_without_a_trained_classifier_is_refused(tmp_path: Path) -> None:
    refused(STARTER_FOLDER, r"no trained classifier: its weights lack classifier.bias, classifier.weight; fine-tune")
    BertModel(BertConfig(vocab_size=8000, num_labels=3, **SMALL)).save_pretrained(tmp_path / "bare")
    refused(tmp_path / "bare", "no trained classifier")


def test_a_classifier_with_lost_or_other_weights_is_refused(copied: Path) -> None:
    change_json(copied / "config.json", id2label={"0": "a", "1": "b"}, label2id={"a": 0, "b": 1})
    refused(copied, r"2 weights are missing or have another shape \(classifier.bias, classifier.weight\)")
    change_json(copied / "config.json", id2label=None, label2id=None, num_labels=3, num_hidden_layers=3)
    refused(copied, r"16 weights are missing .*bert.encoder.layer.2")


def test_a_regression_head_is_refused(copied: Path, tmp_path: Path) -> None:
    refused(save_bert(tmp_path / "one", num_labels=1), "1 output for regression")
    change_json(copied / "config.json", problem_type="regression")
    refused(copied, "3 outputs for regression")


def test_code_in_the_folder_is_never_run(copied: Path) -> None:
    change_json(copied / "config.json", model_type="fancy", auto_map={"AutoConfig": "code.Config"})
    (copied / "code.py").write_text("raise SystemExit('run')", encoding="utf-8")
    refused(copied, "model_type 'fancy', which is not part of transformers; code .* is never run")


class Touch:
    """Pickled, it makes a file when it is read without care."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_a_pickle_is_read_when_it_holds_weights_alone(copied: Path, tmp_path: Path) -> None:
    weights = AutoModelForSequenceClassification.from_pretrained(copied).state_dict()
    (copied / "model.safetensors").unlink()
    torch.save(weights, copied / "pytorch_model.bin")
    assert load(copied).spec.labels == list(NAMES)
    for content in (b"no pickle at all", pickle.dumps(Touch(tmp_path / "touched"))):
        (copied / "pytorch_model.bin").write_bytes(content)
        refused(copied, r"cannot be loaded \(.*\); download or save it again")
    assert not (tmp_path / "touched").exists()


BERT = '{"model_type": "bert", '


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *(("config.json", text) for text in ("[1", "[1]", BERT + '"id2label": ["a"]}', BERT + '"hidden_size": "x"}')),
        *(("tokenizer.json", text) for text in ("[1", "{}")),
        *(("tweetscore.json", text) for text in ("[1", "{}")),
    ],
)
def test_a_file_that_cannot_be_read_is_refused(roberta: Path, tmp_path: Path, name: str, content: str) -> None:
    (copy_of(roberta, tmp_path / "copy") / name).write_text(content, encoding="utf-8")
    refused(tmp_path / "copy", "cannot be loaded")


def test_outputs_without_a_usable_name_are_refused(copied: Path) -> None:
    change_json(copied / "config.json", id2label={"0": "a", "2": "b", "3": "c"}, label2id=None)
    refused(copied, "does not name each of its 3 outputs; correct id2label")
    for name, match in (("a", "two outputs .* called 'a'"), (" ", "' ' is blank"), ("\ud800", "cannot be stored")):
        with pytest.raises(BadConfig, match=match):
            label_names(["a", name], None)


def test_a_folder_without_the_models_vocabulary_is_refused(copied: Path) -> None:
    (copied / "vocab.txt").unlink()
    (copied / "tokenizer_config.json").unlink()
    refused(copied, "has 5 tokens and the model 8,000; save the tokenizer")


def test_a_model_that_cannot_run_on_tweets_is_refused(roberta: Path, tmp_path: Path) -> None:
    folder = save_bert(tmp_path / "small", num_labels=2)
    network = AutoModelForSequenceClassification.from_pretrained(folder)
    network.resize_token_embeddings(5_000)  # the tokenizer has ids up to 8,000
    network.save_pretrained(folder)
    with pytest.raises(ModelUnavailable, match="owner/model cannot classify tweets"):
        sample_reference(load(folder), CPU, limit=200)
    broken = load(roberta)
    with torch.no_grad():
        broken.model.network.classifier.out_proj.bias.fill_(float("nan"))
    with pytest.raises(ModelUnavailable, match="not finite"):
        sample_reference(broken, CPU, limit=10)


def test_a_model_whose_logits_depend_on_padding_is_refused(tmp_path: Path) -> None:
    """Causal models classify by the last token that is no padding by their own configuration."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2, num_labels=2, pad_token_id=0, n_positions=256)
    config.bos_token_id = config.eos_token_id = 3
    GPT2ForSequenceClassification(config).save_pretrained(tmp_path / "gpt2")
    save_unigram(tmp_path / "gpt2")
    assert len(sample_reference(load(tmp_path / "gpt2"), CPU, limit=50).rows) == 50
    change_json(tmp_path / "gpt2" / "config.json", pad_token_id=5)
    with pytest.raises(ModelUnavailable, match=r"other logits for a padded text .*; correct pad_token_id"):
        sample_reference(load(tmp_path / "gpt2"), CPU, limit=50)


def test_a_model_that_tweetscore_trained_keeps_its_temperature_and_settings(bert: Path, tmp_path: Path) -> None:
    first = load(bert, labels=NAMES, cleaner="1", max_length=48)
    hotter = replace(first.spec, temperature=1.7)
    save_artifact(tmp_path / "artifact", first.model, first.tokenizer, hotter)
    again = load(tmp_path / "artifact").spec
    assert (again.temperature, again.cleaner_version, again.config.max_length) == (1.7, "1", 48)
    assert again.labels == list(NAMES.values())
    own_head = first.spec.config.model_copy(update={"pooling": "mean"}).model_dump(mode="json")
    change_json(tmp_path / "artifact" / "tweetscore.json", config=own_head)
    refused(tmp_path / "artifact", r"a head of tweetscore \(pooling mean\)")


def test_the_card_names_the_source_the_labels_and_that_there_are_no_test_figures(bert: Path, tmp_path: Path) -> None:
    write_imported_card(tmp_path, load(bert, labels=NAMES))
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "base_model: owner/model" in card
    assert f"`owner/model` at revision `{'a' * 40}`" in card
    assert "| `LABEL_0` | `negative` | -1 |" in card
    assert "No test figures" in card
