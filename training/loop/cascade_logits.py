"""Float32 logits of texts by a model of a cascade, and by the cascade: how both are measured."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from training.evaluation.decisions import Floats, highest, to_probabilities
from training.loop.logits import logits_of
from training.model.artifact import Artifact, Spec, load_artifact
from training.model.cascade import CascadePart, CascadeSpec
from training.store.store import Store
from training.text.cleaning import clean
from training.text.tokenizer import TextEncoder, UnknownShare


@dataclass(frozen=True)
class TextLogits:
    """`logits` (N, K) of texts, in the order of the model's labels, and each text's share of unknown tokens."""

    spec: Spec
    logits: Floats
    unknown_shares: list[float | None]

    def in_order(self, labels: Sequence[str]) -> Floats:
        """Return the logits with the columns in the order of `labels`."""
        return np.ascontiguousarray(self.logits[:, [self.spec.labels.index(label) for label in labels]])

    def probabilities(self, labels: Sequence[str]) -> Floats:
        """Return the probabilities at the model's own temperature."""
        logits = torch.from_numpy(self.in_order(labels))
        found: Floats = to_probabilities(logits, self.spec.config.task, self.spec.temperature).numpy()
        return found


def text_logits(
    artifact: Artifact, texts: Sequence[str], device: torch.device, between_batches: Callable[[], None]
) -> TextLogits:
    """Return the logits of texts as they are before cleaning. `between_batches` may raise to stop."""
    spec, pad_id = artifact.spec, artifact.tokenizer.pad_token_id
    cleaned = [clean(text, spec.cleaner_version) for text in texts]
    rows = TextEncoder(artifact.tokenizer)(cleaned, spec.config.max_length)
    logits = np.zeros((0, len(spec.labels)), np.float32)
    if rows:
        logits = logits_of(artifact.model, rows, pad_id, device, between_batches=between_batches)
    return TextLogits(spec, logits, UnknownShare(artifact.tokenizer)(rows))


def part_logits(
    store: Store,
    part: CascadePart,
    cascade_url: str,
    texts: Sequence[str],
    device: torch.device,
    between_batches: Callable[[], None],
) -> TextLogits:
    """Load a model of a cascade and return its logits of texts. Raises `BadArtifact` and `StoreUnavailable`."""
    with store.fetched(part.url(cascade_url), part.sha256) as folder:
        return text_logits(load_artifact(folder, part.sha256), texts, device, between_batches)


@dataclass(frozen=True)
class CascadeLogits:
    """`logits` (N, K) and `temperatures` (N, 1) of the model that decides each text; `spec` is the teacher's."""

    spec: Spec
    logits: Floats
    temperatures: Tensor


def cascade_logits(
    store: Store,
    spec: CascadeSpec,
    cascade_url: str,
    texts: Sequence[str],
    device: torch.device,
    between_batches: Callable[[], None],
) -> CascadeLogits:
    """Return the logits of texts by a cascade. The models are in memory one after the other."""
    student = part_logits(store, spec.student, cascade_url, texts, device, between_batches)
    passed = highest(student.probabilities(student.spec.labels)) < spec.threshold
    hard = [text for text, is_hard in zip(texts, passed, strict=True) if is_hard]
    teacher = part_logits(store, spec.teacher, cascade_url, hard, device, between_batches)
    logits = student.in_order(teacher.spec.labels)
    logits[passed] = teacher.logits
    temperatures = np.where(passed, spec.teacher.temperature, spec.student.temperature).astype(np.float32)
    return CascadeLogits(teacher.spec, logits, torch.from_numpy(temperatures[:, None]))
