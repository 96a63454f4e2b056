"""A trained model as a folder: whole and proven by its digest, or not there at all.

config.json, model.safetensors   encoder and head; under a native head a plain Hugging Face sequence classifier
tokenizer_config.json, ...       the tokenizer with its dictionary
tweetscore.json                  labels, polarity, cleaner, temperature, and how it was trained
README.md, *.png                 the model card and its pictures
reference.safetensors            validation rows as token ids, with the logits float32 weights give them
SHA256SUMS                       the digest of every file above; its own digest is the artifact's
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
from transformers import PreTrainedTokenizerBase

from training.clean import CLEANERS, NEWEST_CLEANER
from training.config import TrainConfig
from training.encoders import Encoder
from training.errors import BadArtifact
from training.model import Classifier, empty_model, load_encoder_config
from training.paths import file_sha256
from training.sealed import SUMS, drafted, verify
from training.text import load_tokenizer, mecab_dictionary

SPEC = "tweetscore.json"
WEIGHTS = "model.safetensors"
REFERENCE = "reference.safetensors"
FORMAT_VERSION = 1
# Enough to see one changed label in two hundred.
REFERENCE_ROWS = 2_000

POSITIVE = {"positive", "pos", "ポジティブ", "肯定"}
NEGATIVE = {"negative", "neg", "ネガティブ", "否定"}
NEUTRAL = {"neutral", "neu", "ニュートラル", "中立"}


@dataclass(frozen=True)
class Spec:
    """What scoring has to know beside the weights."""

    labels: list[str]
    polarity: dict[str, float] | None
    config: TrainConfig
    base_model: str
    base_revision: str | None
    mecab_dictionary: str | None
    cleaner_version: str = NEWEST_CLEANER
    temperature: float = 1.0


@dataclass(frozen=True)
class Reference:
    """What any faster engine is measured by: token ids of N rows, and their logits (N, K) in float32."""

    rows: list[list[int]]
    logits: NDArray[np.float32]


@dataclass(frozen=True)
class Artifact:
    """`reference` is None in a model that was saved without one."""

    folder: Path
    model: Classifier
    tokenizer: PreTrainedTokenizerBase
    spec: Spec
    reference: Reference | None


def make_spec(
    labels: list[str],
    config: TrainConfig,
    encoder: Encoder,
    tokenizer: PreTrainedTokenizerBase,
    temperature: float = 1.0,
) -> Spec:
    return Spec(
        labels,
        find_polarity(labels, config),
        config,
        encoder.name,
        encoder.revision,
        mecab_dictionary(tokenizer),
        config.cleaner,
        temperature,
    )


def find_polarity(labels: list[str], config: TrainConfig) -> dict[str, float] | None:
    """Label -> -1..1, or None where nobody has said which label is good: which integer is positive is never guessed."""
    if config.polarity is not None:
        return {label: config.polarity.get(label, 0.0) for label in labels}
    folded = {label: label.casefold() for label in labels}
    if not all(name in POSITIVE | NEGATIVE | NEUTRAL for name in folded.values()):
        return None
    return {label: float(name in POSITIVE) - float(name in NEGATIVE) for label, name in folded.items()}


def save_artifact(
    folder: Path,
    model: Classifier,
    tokenizer: PreTrainedTokenizerBase,
    spec: Spec,
    reference: Reference | None = None,
    describe: Callable[[Path], None] = lambda draft: None,
) -> str:
    """Write the artifact beside its place, then rename it there. Returns its sha256; raises `CannotSave`.

    `describe` may put files of its own into the folder before it is sealed.
    """
    encoder_config = _described(model, spec)
    written = {"format_version": FORMAT_VERSION, **asdict(spec), "config": spec.config.model_dump(mode="json")}
    with drafted(folder) as draft:
        encoder_config.save_pretrained(str(draft))
        tokenizer.save_pretrained(str(draft))
        save_weights(draft / WEIGHTS, model)
        (draft / SPEC).write_text(json.dumps(written, ensure_ascii=False, indent=2), encoding="utf-8")
        if reference is not None:
            save_arrays(_pack(reference), str(draft / REFERENCE))
        describe(draft)
    return file_sha256(folder / SUMS)


def _described(model: Classifier, spec: Spec) -> Any:
    """The configuration by which plain transformers load the folder and name its labels."""
    encoder_config = model.encoder_config
    encoder_config.id2label = dict(enumerate(spec.labels))
    encoder_config.label2id = {label: index for index, label in enumerate(spec.labels)}
    several = spec.config.task == "multi_label"
    encoder_config.problem_type = f"{'multi' if several else 'single'}_label_classification"
    if spec.config.pooling == "native":
        encoder_config.architectures = [type(model.network).__name__]
    return encoder_config


def save_weights(path: Path, model: Classifier) -> None:
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.network.state_dict().items()}
    save_file(state, str(path), metadata={"format": "pt"})


def make_reference(rows: Sequence[Sequence[int]], logits: NDArray[np.float32]) -> Reference:
    """The first `REFERENCE_ROWS` of the validation rows; their split has shuffled them."""
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


def load_artifact(folder: Path, sha256: str | None = None) -> Artifact:
    """The model in evaluation mode with its tokenizer; raises `BadArtifact` when any part is not as registered."""
    verify(folder, sha256)
    try:
        written: dict[str, Any] = json.loads((folder / SPEC).read_text(encoding="utf-8"))
        if written.pop("format_version") != FORMAT_VERSION:
            raise BadArtifact(f"{folder} has an artifact format this version does not read; upgrade tweetscore")
        spec = Spec(**{**written, "config": TrainConfig(**written["config"])})
        model = empty_model(load_encoder_config(str(folder)), len(spec.labels), spec.config)
        model.network.load_state_dict(load_file(str(folder / WEIGHTS)))
        reference = _load_reference(folder / REFERENCE)
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        raise BadArtifact(f"{folder} cannot be loaded: {str(error).splitlines()[0]}") from error
    tokenizer = load_tokenizer(folder)
    if mecab_dictionary(tokenizer) != spec.mecab_dictionary:
        raise BadArtifact(
            f"{folder} was trained on words of {spec.mecab_dictionary} and its tokenizer uses "
            f"{mecab_dictionary(tokenizer)}; restore its tokenizer_config.json"
        )
    if spec.cleaner_version not in CLEANERS:
        raise BadArtifact(
            f"{folder} needs cleaner {spec.cleaner_version}, which this version lacks; upgrade tweetscore"
        )
    model.eval()
    return Artifact(folder, model, tokenizer, spec, reference)
