"""What the routes need of a model, what a model gives for tweets, and the columns of `predictions` that come of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import numpy as np

from db.models import PROBABILITY_DECIMALS, utc_now
from training.data.columns import VALUE
from training.data.numbers import TargetScale
from training.evaluation.decisions import Floats, choose, confidence, label_texts
from training.model.artifact import Spec
from worker.engines.engine_choice import Choice
from worker.engines.engine_trial import EngineTrial
from worker.engines.engines import Engine

# Of stored probabilities by label. PostgreSQL stores decimals in groups of four.
DECIMALS = 8

# Name of a column of `predictions` -> its values, one per tweet.
Columns = dict[str, list[Any]]


@dataclass(frozen=True)
class Scores:
    """`probabilities` (N, K) float32 in the order of `rows`, token ids; the tokens run, without and with padding.

    `decided_by` (N,) names the model version of a cascade that decided each row, and `passed_on` counts those that the
    teacher decided; None for any other model.
    """

    probabilities: Floats
    tokens: int
    padded_tokens: int
    rows: Sequence[Sequence[int]]
    decided_by: list[int] | None = None
    passed_on: int | None = None


class Model(Protocol):
    """A loaded model version: a model on its engine, or a cascade of two.

    `tokenise` turns raw texts into what `forward` takes. `parts` are the models that compute, each on its own engine.
    `planned_share` is the share of tweets that a cascade is to pass on, and None for any other model.
    """

    version_id: int

    @property
    def spec(self) -> Spec: ...
    @property
    def unknown_shares(self) -> Callable[[Sequence[Sequence[int]]], list[float | None]]: ...
    @property
    def parts(self) -> Sequence["Part"]: ...
    @property
    def planned_share(self) -> float | None: ...
    def with_part(self, index: int, part: "Part") -> "Model": ...
    def tokenise(self, texts: Sequence[str]) -> Any: ...
    def forward(self, rows: Any) -> Scores: ...
    def score(self, texts: Sequence[str]) -> list[dict[str, Any]]: ...


class Part(Model, Protocol):
    """A model on its engine. `start_trial` starts the search for a faster one after some seconds; None when there is
    nothing to search."""

    engine: Engine
    choice: Choice
    token_budget: int
    start_trial: Callable[[float], EngineTrial] | None

    def on(self, engine: Engine, choice: Choice) -> Self: ...


def describe(spec: Spec, probabilities: Floats) -> Columns:
    """Probabilities (N, K) -> columns of predictions; `score_signed` is the mean polarity, None without any."""
    if spec.scale is not None:
        return _describe_values(spec.scale, probabilities)
    chosen = choose(probabilities, spec.config.task)
    # float32 has no more digits; as float64 the JSON would have twice as many.
    rounded: Any = np.round(probabilities.astype(np.float64), DECIMALS)
    signed: list[float | None] = [None] * len(probabilities)
    if spec.polarity is not None:
        polarity = np.array([spec.polarity[label] for label in spec.labels], np.float64)
        signed = (rounded @ polarity).clip(-1.0, 1.0).tolist()
    return {
        "label": label_texts(chosen, spec.labels),
        "probability": confidence(rounded, chosen, spec.config.task).round(PROBABILITY_DECIMALS).tolist(),
        "score_signed": signed,
        "probabilities": [dict(zip(spec.labels, row, strict=True)) for row in rounded.tolist()],
    }


def _describe_values(scale: TargetScale, outputs: Floats) -> Columns:
    """Outputs (N, 1) of a continuous model -> columns of predictions: the only label is `value`."""
    values = scale.values(outputs)[:, 0].tolist()
    return {
        "label": [VALUE] * len(values),
        "probability": [1.0] * len(values),
        "score_signed": [scale.signed(value) for value in values],
        "probabilities": [{VALUE: value} for value in values],
    }


def prediction_columns(model: Model, tweet_ids: Sequence[str], scores: Scores) -> Columns:
    """The columns of `predictions` for tweets in the order of `scores`, one value per tweet."""
    decided_by = {} if scores.decided_by is None else {"decided_by": scores.decided_by}
    return {
        "tweet_id": list(tweet_ids),
        "model_version_id": [model.version_id] * len(tweet_ids),
        "scored_at": [utc_now()] * len(tweet_ids),
        "unknown_share": model.unknown_shares(scores.rows),
        **describe(model.spec, scores.probabilities),
        **decided_by,
    }


def prediction_rows(model: Model, tweet_ids: Sequence[str], scores: Scores) -> list[dict[str, Any]]:
    """`prediction_columns` as rows."""
    return as_rows(prediction_columns(model, tweet_ids, scores))


def as_rows(columns: Columns) -> list[dict[str, Any]]:
    """Columns as one dictionary per tweet."""
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
