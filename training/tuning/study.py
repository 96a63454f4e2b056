"""An Optuna study of one dataset, base model and space: stored in a folder, and continued by the next run.

FOLDER/study.db   the trials, an SQLite database of Optuna
FOLDER/lock       held while a process runs trials

A trial is stored with its figures after every part of its training, so a killed process loses only the trial that it
ran. Such a trial, and one that the time limit ends, counts as stopped: it has no result, and later trials ignore it.
"""

import fcntl
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import torch
from optuna.trial import FrozenTrial, Trial, TrialState

from training.errors import NoTrialFinished, TuningUnavailable
from training.tuning.space import Space, values_of

optuna.logging.set_verbosity(optuna.logging.ERROR)  # tweetscore shows its own progress

# Trials with random values before the sampler learns from the results.
RANDOM_TRIALS = 8
# Trials that run to their end before others may be pruned. No trial is pruned in the first half of its first training.
UNPRUNED_TRIALS, UNPRUNED_REPORTS = 4, 2
# With fewer complete trials the shares are mostly chance.
IMPORTANCE_TRIALS = 15
FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)
STATES = {TrialState.COMPLETE: "complete", TrialState.PRUNED: "pruned", TrialState.FAIL: "stopped"}
PRESET, FAULT = "preset", "fault"


class TimeIsUp(Exception):
    """Raised in a trial when the time limit of the run is over."""


@dataclass(frozen=True)
class TrialResult:
    """One trial. `state` is complete, pruned, stopped, or failed with a `fault`.

    `value` is the mean validation figure of its splits, for a pruned trial that of the part that it trained; None
    without any. `preset` is True for the trial with the preset's own values.
    """

    number: int
    state: str
    value: float | None
    parameters: dict[str, Any]
    seconds: float
    preset: bool
    fault: str | None = None


@dataclass(frozen=True)
class Limits:
    """When a run ends: at `deadline` by `time.monotonic`, or when the study has `trials` finished trials."""

    deadline: float
    trials: int | None = None

    def check_time(self) -> None:
        """Raise `TimeIsUp` after the deadline."""
        if time.monotonic() >= self.deadline:
            raise TimeIsUp


@contextmanager
def open_study(folder: Path, seed: int, fresh: bool) -> Iterator[optuna.Study]:
    """Provide the study in `folder`, without its earlier trials if `fresh`. Raises `TuningUnavailable` when it is in
    use."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise TuningUnavailable(
                f"another process runs the study {folder.name}; wait until it ends, or stop it"
            ) from error
        if fresh:
            for path in folder.glob("study.db*"):
                path.unlink()
        storage = optuna.storages.RDBStorage(f"sqlite:///{folder / 'study.db'}")
        try:
            study = optuna.create_study(
                study_name=folder.name, storage=storage, direction="maximize", load_if_exists=True,
                pruner=optuna.pruners.MedianPruner(UNPRUNED_TRIALS, UNPRUNED_REPORTS),
            )  # fmt: skip
            # A run that continues must not draw the random values of the first run again.
            seed = (seed + len(study.get_trials(deepcopy=False))) % 2**31
            study.sampler = optuna.samplers.TPESampler(n_startup_trials=RANDOM_TRIALS, seed=seed)
            yield study
        finally:
            storage.engine.dispose()


def run_trials(
    study: optuna.Study,
    space: Space,
    preset: dict[str, Any],
    run: Callable[[Trial, dict[str, Any]], float],
    limits: Limits,
    on_end: Callable[[TrialResult], None],
) -> str:
    """Run trials until a limit is reached. Returns what ended the run: time, trials or interrupted (Ctrl-C).

    `run` trains with the values of `space` and returns the figure to maximise. It may raise `TimeIsUp` and
    `optuna.TrialPruned`. The first trial has the `preset` values; it is run again when it was stopped.
    """
    try:
        _close_stopped(study)
        if not any(trial.user_attrs.get(PRESET) for trial in study.get_trials(states=(*FINISHED, TrialState.WAITING))):
            study.enqueue_trial(preset, user_attrs={PRESET: True})
        while limits.trials is None or len(study.get_trials(deepcopy=False, states=FINISHED)) < limits.trials:
            limits.check_time()
            on_end(_run_one(study, space, run))
        return "trials"
    except TimeIsUp:
        return "time"
    except KeyboardInterrupt:
        return "interrupted"
    finally:
        _close_stopped(study)


def _run_one(study: optuna.Study, space: Space, run: Callable[[Trial, dict[str, Any]], float]) -> TrialResult:
    trial = study.ask(space)
    try:
        ended = study.tell(trial, run(trial, values_of(trial.params)))
    except optuna.TrialPruned:
        ended = study.tell(trial, state=TrialState.PRUNED)
    except torch.OutOfMemoryError:
        trial.set_user_attr(FAULT, "the device has not enough memory")
        ended = study.tell(trial, state=TrialState.FAIL)
    return _result(ended)


def _close_stopped(study: optuna.Study) -> None:
    """End the trials that were running when a process was stopped."""
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL)


def report(trial: Trial, part: int, figure: float, last_part: int) -> None:
    """Store a trial's figure after a part of its training. Raises `optuna.TrialPruned` when it is worse than most.

    The preset's trial always runs to its end, because the others are compared with it.
    """
    trial.report(figure, part)
    if part < last_part and PRESET not in trial.user_attrs and trial.should_prune():
        raise optuna.TrialPruned


def results(study: optuna.Study) -> list[TrialResult]:
    """Return the trials that have ended: complete ones first, the best of them first."""
    ended = [_result(trial) for trial in study.get_trials(states=tuple(STATES))]
    return sorted(ended, key=lambda trial: (trial.state != "complete", -(trial.value or 0.0), trial.number))


def best_trial(trials: list[TrialResult]) -> TrialResult:
    """Return the first of `results`; raises `NoTrialFinished` when it is not complete."""
    if not trials or trials[0].state != "complete":
        fault = next((f" ({trial.fault})" for trial in trials if trial.fault), "")
        raise NoTrialFinished(f"no trial has finished yet{fault}; allow more --minutes or fewer --splits")
    return trials[0]


def importance(study: optuna.Study) -> dict[str, float]:
    """Return each parameter's share of the differences between complete trials, largest first; empty if too few."""
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if len(complete) < IMPORTANCE_TRIALS or len({trial.value for trial in complete}) < 2:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return dict(optuna.importance.get_param_importances(study))


def _result(trial: FrozenTrial) -> TrialResult:
    fault = trial.user_attrs.get(FAULT)
    reported = trial.intermediate_values
    return TrialResult(
        trial.number,
        "failed" if fault else STATES[trial.state],
        trial.value if trial.state == TrialState.COMPLETE else reported[max(reported)] if reported else None,
        values_of(trial.params),
        trial.duration.total_seconds() if trial.duration else 0.0,
        bool(trial.user_attrs.get(PRESET)),
        fault,
    )
