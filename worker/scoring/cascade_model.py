"""A cascade: the student scores every text, and what it is not sure of is scored by the teacher, in the same window.

Both have engines, trials and tokenizers of their own.
"""

import copy
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from training.evaluation.decisions import Floats, highest
from training.model.artifact import Spec
from training.model.cascade import CascadePart, CascadeSpec
from worker.scoring.scores import Part, Scores, as_rows, describe


@dataclass(frozen=True)
class CascadeTexts:
    """Raw texts, and the token ids of the student; the teacher tokenises those that are passed on."""

    texts: Sequence[str]
    rows: Sequence[Sequence[int]]


class CascadeModel:
    """One loaded cascade. `spec` is the teacher's, so the labels are in its order."""

    def __init__(self, version_id: int, cascade: CascadeSpec, student: Part, teacher: Part) -> None:
        self.version_id = version_id
        self.cascade = cascade
        self.student, self.teacher = student, teacher
        # Two windows are in `forward` at once, and a tokenizer is not thread-safe.
        self._tokenising = threading.Lock()
        self._order = [student.spec.labels.index(label) for label in teacher.spec.labels]

    @property
    def spec(self) -> Spec:
        return self.teacher.spec

    @property
    def unknown_shares(self) -> Callable[[Sequence[Sequence[int]]], list[float | None]]:
        """Those of the student, which reads every text."""
        return self.student.unknown_shares

    @property
    def parts(self) -> Sequence[Part]:
        return self.student, self.teacher

    @property
    def planned_share(self) -> float:
        return self.cascade.planned_share

    def with_part(self, index: int, part: Part) -> Self:
        """The same cascade with another student (0) or teacher (1)."""
        other = copy.copy(self)
        setattr(other, ("student", "teacher")[index], part)
        return other

    def tokenise(self, texts: Sequence[str]) -> CascadeTexts:
        return CascadeTexts(texts, self.student.tokenise(texts))

    def forward(self, rows: CascadeTexts) -> Scores:
        """Texts -> the probabilities of the model that decides each. Errors are those of `ScoringModel.forward`."""
        student, teacher = self.cascade.student, self.cascade.teacher
        first = self.student.forward(rows.rows)
        passed = highest(first.probabilities) < self.cascade.threshold
        probabilities = _at(first.probabilities[:, self._order], self.student, student)
        tokens, padded = first.tokens, first.padded_tokens
        if passed.any():
            texts = [rows.texts[i] for i in np.flatnonzero(passed).tolist()]
            with self._tokenising:
                hard = self.teacher.tokenise(texts)
            second = self.teacher.forward(hard)
            probabilities[passed] = _at(second.probabilities, self.teacher, teacher)
            tokens, padded = tokens + second.tokens, padded + second.padded_tokens
        decided_by = np.where(passed, teacher.model_version, student.model_version).tolist()
        return Scores(probabilities, tokens, padded, first.rows, decided_by, int(passed.sum()))

    def score(self, texts: Sequence[str]) -> list[dict[str, Any]]:
        """Texts -> label, probability, score_signed and the probability of every label."""
        return as_rows(describe(self.spec, self.forward(self.tokenise(texts)).probabilities))


def _at(probabilities: Floats, model: Part, part: CascadePart) -> Floats:
    """Probabilities (N, K) at a model's own temperature -> those at its temperature in the cascade."""
    powers = probabilities.astype(np.float64) ** (model.spec.temperature / part.temperature)
    scaled: Floats = (powers / powers.sum(axis=1, keepdims=True)).astype(np.float32)
    return scaled
