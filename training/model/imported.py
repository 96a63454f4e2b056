"""Load an existing Hugging Face sequence classifier as it is, so that it becomes a model version without training.

A classifier is refused when a weight is missing, has another shape or would be new: it would then give random labels
without an error.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerBase,
)

from db.errors import TweetscoreError, listed, plain, shown
from training.config import TrainConfig, make_config
from training.data.columns import MULTI_LABEL_SEPARATOR, has_surrogates
from training.errors import BadConfig, ModelUnavailable
from training.model.artifact import SPEC, Spec, make_spec
from training.model.base_model import BaseModelFolder
from training.model.classifier import NativeClassifier, check_length, load_encoder_config, longest_input
from training.text.tokenizer import load_tokenizer


@dataclass(frozen=True)
class ImportOptions:
    """How to use a classifier. None takes the default.

    `labels` maps the model's own labels to names; the other fields are as in `TrainConfig`. `task` defaults to the
    model's problem type. A model that tweetscore trained keeps its task, cleaner, length and temperature.
    """

    labels: Mapping[str, str] | None = None
    polarity: dict[str, float] | None = None
    task: str | None = None
    max_length: int | None = None
    cleaner: str | None = None


@dataclass(frozen=True)
class ImportedClassifier:
    """A loaded classifier in float32, in evaluation mode. `own_labels` are the names in its config.json, in order."""

    model: NativeClassifier
    tokenizer: PreTrainedTokenizerBase
    spec: Spec
    own_labels: list[str]


def load_classifier(source: BaseModelFolder, options: ImportOptions) -> ImportedClassifier:
    """Load a classifier and its tokenizer from a local folder, offline and without code from the folder.

    Raises `ModelUnavailable` when the folder holds no classifier that can be used as it is, and `BadConfig` when
    `options` do not fit it.
    """
    _check_own_code(source)
    encoder_config = _read(source, load_encoder_config, str(source.folder))
    if type(encoder_config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise ModelUnavailable(
            f"model {plain(source.name)} is a {encoder_config.model_type}, for which transformers have no sequence "
            "classifier; import another model"
        )
    own_labels = _own_labels(source, encoder_config)
    labels = label_names(own_labels, options.labels)
    trained = _spec_of_tweetscore(source)
    config = _config(source, encoder_config, options, trained)
    _check_separator(labels, config)
    if unknown := [label for label in config.polarity or {} if label not in labels]:
        raise BadConfig(f"--polarity names {listed(unknown)}; the model's labels are {listed(labels)}")
    network = _load_network(source, encoder_config)
    tokenizer = _read(source, load_tokenizer, source.folder)
    _check_vocabulary(source, tokenizer, network)
    model = NativeClassifier(network, config)
    model.eval()
    spec = make_spec(labels, config, source, tokenizer, trained.temperature if trained else 1.0)
    return ImportedClassifier(model, tokenizer, spec, own_labels)


def label_names(own: list[str], names: Mapping[str, str] | None) -> list[str]:
    """Return the name of each output: `names[label]` for each of the model's own labels, by default the label itself.

    Raises `BadConfig` when `names` leaves out a label or names another one, when two outputs would have one name, and
    for a name that cannot be stored.
    """
    if names is not None:
        if unknown := [label for label in names if label not in own]:
            raise BadConfig(f"--labels names {listed(unknown)}; the model's own labels are {listed(own)}")
        if missing := [label for label in own if label not in names]:
            raise BadConfig(f"--labels leaves out {listed(missing)}; name each of the model's labels: {listed(own)}")
    chosen = [names[label] for label in own] if names is not None else own
    for label in chosen:
        if chosen.count(label) > 1:
            raise BadConfig(f"two outputs of the model would be called {shown(label)}; give each its own name")
        if not label.strip() or "\x00" in label or has_surrogates(label):
            raise BadConfig(f"the label {shown(label)} is blank or cannot be stored; name it with --labels")
    return chosen


def _check_separator(labels: list[str], config: TrainConfig) -> None:
    """Raise `BadConfig` when the labels of a row could not be told apart in the database."""
    for label in labels:
        if config.task == "multi_label" and MULTI_LABEL_SEPARATOR in label:
            raise BadConfig(
                f"the label {shown(label)} contains {MULTI_LABEL_SEPARATOR}, which separates labels; rename it with "
                "--labels"
            )


def _read(source: BaseModelFolder, read: Any, *arguments: Any, **options: Any) -> Any:
    try:
        return read(*arguments, **options)
    except TweetscoreError:
        raise
    except Exception as error:  # files of others may hold anything, and libraries raise errors of many types for them
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelUnavailable(
            f"model {plain(source.name)} cannot be loaded ({lines[0]}); download or save it again"
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    read = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(read, dict):
        raise ValueError(f"{path.name} is not a JSON object")
    return read


def _check_own_code(source: BaseModelFolder) -> None:
    """Raise `ModelUnavailable` when the architecture is not part of transformers."""
    kind = _read(source, _read_json, source.folder / "config.json").get("model_type")
    if kind not in CONFIG_MAPPING:
        raise ModelUnavailable(
            f"model {plain(source.name)} has the model_type {shown(kind)}, which is not part of transformers; code "
            "from a model's repository is never run: import another model"
        )


def _own_labels(source: BaseModelFolder, encoder_config: Any) -> list[str]:
    count = encoder_config.num_labels
    if count < 2 or encoder_config.problem_type == "regression":
        raise ModelUnavailable(
            f"model {plain(source.name)} has {count} output{'' if count == 1 else 's'} for regression, and no labels "
            "to choose from; import a classifier with at least two labels"
        )
    names = encoder_config.id2label or {}
    if set(names) != set(range(count)):
        raise ModelUnavailable(
            f"model {plain(source.name)} does not name each of its {count} outputs; correct id2label in its config.json"
        )
    return [str(names[index]) for index in range(count)]


def _spec_of_tweetscore(source: BaseModelFolder) -> Spec | None:
    """Return what tweetscore stored with a model that it trained; None for any other model."""
    if not (source.folder / SPEC).is_file():
        return None

    def parse() -> Spec:
        written = _read_json(source.folder / SPEC)
        del written["format_version"]
        spec = Spec(**{**written, "config": TrainConfig(**written["config"])})
        if not 0 < float(spec.temperature) < inf:
            raise ValueError(f"temperature is {spec.temperature} in {SPEC}")
        return spec

    spec: Spec = _read(source, parse)
    if spec.config.pooling != "native":
        raise ModelUnavailable(
            f"model {plain(source.name)} has a head of tweetscore (pooling {spec.config.pooling}), which transformers "
            "cannot load; import a model that was trained with a linear head and pooling native"
        )
    return spec


def _config(source: BaseModelFolder, encoder_config: Any, options: ImportOptions, trained: Spec | None) -> TrainConfig:
    """Return the configuration to store: from `options`, else as tweetscore `trained` it, else the defaults."""
    before = trained.config if trained else make_config("guide")
    if trained is None and encoder_config.problem_type == "multi_label_classification":
        before = make_config("guide", task="multi_label")
    task = options.task or before.task
    lengths = (before.max_length, longest_input(encoder_config))
    config = make_config(
        "guide",
        base_model=source.name,
        base_revision=source.revision,
        task=task,
        labels=None if options.labels is None else dict(options.labels),
        polarity=options.polarity or (before.polarity if options.labels is None else None),
        head="linear",
        pooling="native",
        loss="bce" if task == "multi_label" else "cross_entropy",
        max_length=options.max_length or min(length for length in lengths if length is not None),
        cleaner=options.cleaner or before.cleaner,
    )
    check_length(encoder_config, config.max_length)
    return config


def _load_network(source: BaseModelFolder, encoder_config: Any) -> Any:
    network, info = _read(
        source,
        AutoModelForSequenceClassification.from_pretrained,
        str(source.folder),
        config=encoder_config,
        dtype=torch.float32,
        local_files_only=True,
        trust_remote_code=False,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # reported below, with the names of the weights
    )
    inside = f"{network.base_model_prefix}."
    missing = sorted(info["missing_keys"], key=lambda key: (key.startswith(inside), key))
    if missing and not missing[0].startswith(inside):
        raise ModelUnavailable(
            f"model {plain(source.name)} has no trained classifier: its weights lack {listed(missing)}; fine-tune it "
            f"with `tweetscore train DATASET --base-model {plain(source.name)}`"
        )
    if lost := missing + sorted(key for key, *_ in info["mismatched_keys"]):
        raise ModelUnavailable(
            f"model {plain(source.name)} cannot be loaded: {len(lost)} weights are missing or have another shape "
            f"({listed(lost)}); download or save it again"
        )
    return network


def _check_vocabulary(source: BaseModelFolder, tokenizer: PreTrainedTokenizerBase, network: Any) -> None:
    """Raise `ModelUnavailable` for a tokenizer that lacks most of the model's vocabulary.

    Without vocabulary files, transformers build some tokenizers from their special tokens alone, without an error.
    """
    known: int = network.get_input_embeddings().num_embeddings
    if 2 * len(tokenizer) < known:
        raise ModelUnavailable(
            f"the tokenizer of {plain(source.name)} has {len(tokenizer):,} tokens and the model {known:,}; save the "
            "tokenizer that the model was trained with in the same folder"
        )
