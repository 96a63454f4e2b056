"""Save and load an artifact: a trained model as a sealed folder.

config.json, model.safetensors   encoder and head; with a native head, a plain Hugging Face sequence classifier
tokenizer_config.json, ...       the tokenizer and the name of its MeCab dictionary
tweetscore.json                  labels, polarity, cleaner, temperature, scale, and the training configuration
README.md, *.png                 the model card and its figures
reference.safetensors            token ids of validation rows, with their float32 logits
SHA256SUMS                       sha256 of every file above; the sha256 of this file identifies the artifact
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedTokenizerBase

from training.config import TrainConfig
from training.data.columns import sentiment_of
from training.data.numbers import TargetScale, level_polarity
from training.errors import BadArtifact
from training.model.base_model import BaseModelFolder
from training.model.classifier import Classifier, empty_model, load_encoder_config
from training.store.paths import file_sha256
from training.store.sealed_folder import SUMS, new_sealed_folder, verify
from training.text.cleaning import CLEANERS, NEWEST_CLEANER
from training.text.tokenizer import load_tokenizer, mecab_dictionary

SPEC = "tweetscore.json"
WEIGHTS = "model.safetensors"
REFERENCE = "reference.safetensors"
FORMAT_VERSION = 1
# Validation rows kept to compare engines: enough to detect one changed label in 200.
REFERENCE_ROWS = 2_000
# The names of transformers: with them a plain pipeline applies softmax, sigmoid or nothing.
PROBLEM_TYPES = {
    "single_label": "single_label_classification",
    "multi_label": "multi_label_classification",
    "ordinal": "single_label_classification",
    "continuous": "regression",
}
# What fills a new module's weights with random numbers.
RANDOM_WEIGHTS = {
    Tensor.normal_, Tensor.uniform_, nn.init.normal_, nn.init.uniform_, nn.init.trunc_normal_, nn.init.kaiming_uniform_,
    nn.init.xavier_uniform_,
}  # fmt: skip

POLARITY = {"positive": 1.0, "negative": -1.0, "neutral": 0.0}


@dataclass(frozen=True)
class Spec:
    """What scoring needs besides the weights. `polarity` maps labels to -1..1, or is None when unknown.

    `scale` converts the outputs of a continuous model, and is None for any other.
    """

    labels: list[str]
    polarity: dict[str, float] | None
    config: TrainConfig
    base_model: str
    base_revision: str | None
    mecab_dictionary: str | None
    cleaner_version: str = NEWEST_CLEANER
    temperature: float = 1.0
    scale: TargetScale | None = None


@dataclass(frozen=True)
class Reference:
    """Reference outputs that other engines are compared with: token ids of N rows, and logits (N, K) float32."""

    rows: list[list[int]]
    logits: NDArray[np.float32]


@dataclass(frozen=True)
class Artifact:
    """A loaded artifact. `reference` is None when the artifact was saved without one."""

    folder: Path
    model: Classifier
    tokenizer: PreTrainedTokenizerBase
    spec: Spec
    reference: Reference | None


def make_spec(
    labels: list[str],
    config: TrainConfig,
    base: BaseModelFolder,
    tokenizer: PreTrainedTokenizerBase,
    temperature: float = 1.0,
    scale: TargetScale | None = None,
) -> Spec:
    """Return the `Spec` of a model trained with `config` from a base model."""
    return Spec(
        labels,
        find_polarity(labels, config),
        config,
        base.name,
        base.revision,
        mecab_dictionary(tokenizer),
        config.cleaner,
        temperature,
        scale,
    )


def find_polarity(labels: list[str], config: TrainConfig) -> dict[str, float] | None:
    """Return label -> -1..1, or None when `config` has no polarity and a label is not a known name of a sentiment.

    The levels of an ordinal task rise from -1 to 1, unless they are such names. A continuous task has no labels.
    """
    if config.task == "continuous":
        return None
    if config.polarity is not None:
        return {label: config.polarity.get(label, 0.0) for label in labels}
    sentiments = {label: sentiment_of(label) for label in labels}
    if None in sentiments.values():
        return level_polarity(labels) if config.task == "ordinal" else None
    return {label: POLARITY[str(sentiment)] for label, sentiment in sentiments.items()}


def save_artifact(
    folder: Path,
    model: Classifier,
    tokenizer: PreTrainedTokenizerBase,
    spec: Spec,
    reference: Reference | None = None,
    describe: Callable[[Path], None] = lambda draft: None,
) -> str:
    """Write an artifact to a draft folder, seal it and rename it to `folder`. Returns its sha256.

    `describe(draft)` can add files before the folder is sealed. Raises `CannotSave`.
    """
    encoder_config = _hub_config(model, spec)
    written = {"format_version": FORMAT_VERSION, **asdict(spec), "config": spec.config.model_dump(mode="json")}
    if spec.scale is None:
        del written["scale"]  # earlier releases refuse it
    with new_sealed_folder(folder) as draft:
        encoder_config.save_pretrained(str(draft))
        tokenizer.save_pretrained(str(draft))
        save_weights(draft / WEIGHTS, model)
        (draft / SPEC).write_text(json.dumps(written, ensure_ascii=False, indent=2), encoding="utf-8")
        if reference is not None:
            save_arrays(_pack(reference), str(draft / REFERENCE))
        describe(draft)
    return file_sha256(folder / SUMS)


def _hub_config(model: Classifier, spec: Spec) -> Any:
    """Return the configuration with which plain transformers load the folder and name its labels."""
    encoder_config = model.encoder_config
    encoder_config.id2label = dict(enumerate(spec.labels))
    encoder_config.label2id = {label: index for index, label in enumerate(spec.labels)}
    encoder_config.problem_type = PROBLEM_TYPES[spec.config.task]
    if spec.config.pooling == "native":
        encoder_config.architectures = [type(model.network).__name__]
    return encoder_config


def save_weights(path: Path, model: Classifier) -> None:
    """Write a model's state dict to a safetensors file."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.network.state_dict().items()}
    save_file(state, str(path), metadata={"format": "pt"})


def make_reference(rows: Sequence[Sequence[int]], logits: NDArray[np.float32]) -> Reference:
    """Return the first `REFERENCE_ROWS` validation rows, a random sample because the split shuffles them."""
    return Reference([list(row) for row in rows[:REFERENCE_ROWS]], logits[:REFERENCE_ROWS])


def _pack(reference: Reference) -> dict[str, NDArray[Any]]:
    return {
        "ids": np.array([token for row in reference.rows for token in row], np.int32),
        "lengths": np.array([len(row) for row in reference.rows], np.int32),
        "logits": np.ascontiguousarray(reference.logits, np.float32),
    }


def _load_reference(path: Path) -> Reference | None:
    if not path.is_file():
        return None
    arrays = load_arrays(str(path))
    ends = np.cumsum(arrays["lengths"])
    rows = [row.tolist() for row in np.split(arrays["ids"], ends[:-1])]
    return Reference(rows, arrays["logits"])


class _WithoutRandomWeights(TorchFunctionMode):
    """Skip the random weights of a model whose weights are loaded next: they take a second at base size.

    Affects only its own thread, as another one may build a model to train.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in RANDOM_WEIGHTS:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def load_artifact(folder: Path, sha256: str | None = None) -> Artifact:
    """Verify an artifact, then load its model, in evaluation mode, and its tokenizer.

    Raises `BadArtifact` when the digest is not `sha256`, or a file is missing, damaged or from a newer version.
    """
    verify(folder, sha256)
    try:
        written: dict[str, Any] = json.loads((folder / SPEC).read_text(encoding="utf-8"))
        if written.pop("format_version") != FORMAT_VERSION:
            raise BadArtifact(f"{folder} has an artifact format that this version cannot read; upgrade tweetscore")
        scale = TargetScale(**written["scale"]) if "scale" in written else None
        spec = Spec(**{**written, "config": TrainConfig(**written["config"]), "scale": scale})
        with _WithoutRandomWeights():
            model = empty_model(load_encoder_config(str(folder)), len(spec.labels), spec.config)
        model.network.load_state_dict(load_file(str(folder / WEIGHTS)))
        reference = _load_reference(folder / REFERENCE)
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        raise BadArtifact(f"{folder} cannot be loaded: {str(error).splitlines()[0]}") from error
    tokenizer = load_tokenizer(folder)
    if mecab_dictionary(tokenizer) != spec.mecab_dictionary:
        raise BadArtifact(
            f"{folder} was trained with the dictionary {spec.mecab_dictionary}, but its tokenizer uses "
            f"{mecab_dictionary(tokenizer)}; restore its tokenizer_config.json"
        )
    if spec.cleaner_version not in CLEANERS:
        raise BadArtifact(
            f"{folder} needs cleaner {spec.cleaner_version}, which this version lacks; upgrade tweetscore"
        )
    model.eval()
    return Artifact(folder, model, tokenizer, spec, reference)
