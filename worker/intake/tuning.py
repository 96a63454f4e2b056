"""`tweetscore tune`: run the trials of a study in this process, on the training and validation rows of a dataset."""

import hashlib
import json
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass
from math import sqrt
from statistics import mean
from typing import Any

from optuna.distributions import distribution_to_json
from optuna.trial import Trial

from db import registry
from db.session import Database
from training.config import TrainConfig, make_config
from training.data.dataset import Dataset, read_rows, split_rows
from training.errors import BadConfig
from training.jobs.inputs import fetched_base_model
from training.loop.sample_base import sample_trained
from training.model.base_model import BaseModelFolder, adapted_id, current_hub_name
from training.model.classifier import build_model
from training.model.devices import pick_device
from training.store.paths import file_sha256
from training.tuning.space import Space, space_of
from training.tuning.study import (
    Limits,
    TrialResult,
    best_trial,
    importance,
    open_study,
    report,
    results,
    run_trials,
)
from training.tuning.trial import NoCheckpoints, TrialHooks, prepare_trials, run_trial
from worker.connections import training_context
from worker.intake.submit_job import job_config, local_copy, usable_base_model
from worker.settings import Settings

STUDIES_FOLDER = "tune"
# Fields that add other trainings to a job. A trial trains on labelled rows only.
NOT_IN_TRIALS = ("folds", "unlabelled", "teacher")


@dataclass(frozen=True)
class TuningRequest:
    """A dataset, a preset (None: that of the settings) with fixed `options`, and the limits of the run.

    `trials` counts the finished trials of the study, `splits` those of each trial; None: as many as the time allows,
    and as many as the number of validation rows needs.
    """

    dataset: str
    preset: str | None
    options: dict[str, Any]
    minutes: float
    trials: int | None = None
    splits: int | None = None
    fresh: bool = False


@dataclass(frozen=True)
class Tuned:
    """What a study found. `options` are those of a job with the best values.

    `ended_by` is time, trials or interrupted. `standard_error` is that of the best value, from the number of validation
    rows.
    """

    study: str
    preset: str
    ended_by: str
    splits: int
    validation_rows: int
    standard_error: float
    best: TrialResult
    trials: list[TrialResult]
    importance: dict[str, float]
    options: dict[str, Any]

    @property
    def preset_value(self) -> float | None:
        return next((trial.value for trial in self.trials if trial.preset and trial.state == "complete"), None)

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "preset_value": self.preset_value}


@dataclass(frozen=True)
class Notices:
    """Callbacks of a run: `on_progress` gets seconds since the start and a text, `on_trial` each trial that ended."""

    on_progress: Callable[[float, str], None]
    on_trial: Callable[[TrialResult], None]


def tune(settings: Settings, database: Database, request: TuningRequest, notices: Notices) -> Tuned:
    """Run trials until the request's limits, and return the results of the whole study.

    Nothing is queued and no model is stored. Only the training and validation rows of the job's own split are used.
    Raises the errors of `submit_training`, `TuningUnavailable` and `NoTrialFinished`.
    """
    for field in NOT_IN_TRIALS:
        if request.options.get(field):
            raise BadConfig(f"{field} cannot be used in tuning; leave it out here, and give it to `tweetscore train`")
    preset = request.preset or settings.preset
    config = job_config(settings, preset, request.options)
    with ExitStack() as stack:
        path = stack.enter_context(local_copy(request.dataset))
        rows = split_rows(read_rows(path), config)
        base = stack.enter_context(_base_model(settings, database, config))
        base = stack.enter_context(_learned_sample(settings, base, rows, config, notices))
        config = config.for_rows(len(rows.train))
        started = time.monotonic()
        limits = Limits(started + 60 * request.minutes, request.trials)
        auto_pooling = build_model(base, len(rows.labels), config.model_copy(update={"pooling": "auto"})).config.pooling
        space = space_of(preset, config, set(request.options), auto_pooling)
        inputs = prepare_trials(
            base, rows.train, rows.valid, rows.labels, config, pick_device(settings.device), request.splits
        )
        name = f"{preset}-{_digest(file_sha256(path), base, config, space, len(inputs.splits))}"
        study = stack.enter_context(open_study(settings.home / STUDIES_FOLDER / name, config.seed, request.fresh))

        def run(trial: Trial, values: dict[str, Any]) -> float:
            def on_step(position: str) -> None:
                limits.check_time()
                notices.on_progress(time.monotonic() - started, f"trial {trial.number}, {position}")

            hooks = TrialHooks(on_step, lambda part, figure: report(trial, part, figure, inputs.last_report))
            chosen = make_config("guide", **{**config.model_dump(mode="json"), **values})
            return mean(run_trial(inputs, chosen, hooks))

        values_of_preset = {field: getattr(config, field) for field in space}
        ended_by = run_trials(study, space, values_of_preset, run, limits, notices.on_trial)
        trials = results(study)
        best = best_trial(trials)
        changed = {field: value for field, value in best.parameters.items() if value != values_of_preset[field]}
        return Tuned(
            name, preset, ended_by, len(inputs.splits), inputs.validation_rows,
            standard_error(best.value or 0.0, inputs.validation_rows), best, trials, importance(study),
            {**request.options, **changed},
        )  # fmt: skip


def standard_error(figure: float, rows: int) -> float:
    """Return the standard error of a share that was measured on this many rows."""
    return sqrt(figure * (1 - figure) / rows)


def _base_model(settings: Settings, database: Database, config: TrainConfig) -> AbstractContextManager[BaseModelFolder]:
    """Provide the base model that a job with this configuration would use."""
    name, context = usable_base_model(settings, database, config.base_model), training_context(settings)
    with database.read() as session:
        adapted = adapted_id(name)
        if adapted is not None:
            name = registry.base_model(session, adapted).url
        used = registry.revision_used(session, current_hub_name(name))
    return fetched_base_model(name, config.base_revision or used, context.input_store, context.read_roots)


def _learned_sample(
    settings: Settings, base: BaseModelFolder, rows: Dataset, config: TrainConfig, notices: Notices
) -> AbstractContextManager[BaseModelFolder]:
    """Provide the base model trained on the sample, as a job would. The time of the search begins afterwards."""

    def on_step(step: int, total: int, loss: float | None, rate: float | None) -> None:
        notices.on_progress(0.0, f"learning the sample first, step {step} of {total}")

    device, cache = pick_device(settings.device), training_context(settings).cache
    return sample_trained(cache, base, rows, config, device, NoCheckpoints(), on_step, lambda rows, passes: None)


def _digest(dataset_sha256: str, base: BaseModelFolder, config: TrainConfig, space: Space, splits: int) -> str:
    """Return 12 hex digits of everything that makes the figures of two trials comparable."""
    weights = sorted({*base.folder.glob("*.safetensors"), *base.folder.glob("pytorch_model*.bin")})
    parts = {
        "dataset": dataset_sha256,
        "weights": [file_sha256(path) for path in weights],
        "config": config.model_dump(mode="json", exclude={"base_model", "base_revision"}),
        "space": {field: distribution_to_json(values) for field, values in space.items()},
        "splits": splits,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]
