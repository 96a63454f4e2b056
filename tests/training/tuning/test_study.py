"""A study of trials that only report figures: what is pruned, stopped, stored and continued."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from optuna.distributions import FloatDistribution
from optuna.trial import Trial

from training.config import PRESETS, TrainConfig, make_config
from training.errors import NoTrialFinished, TuningUnavailable
from training.tuning.space import SPACES, space_of, values_of
from training.tuning.study import Limits, TrialResult, best_trial, importance, open_study, report, results, run_trials

SPACE = {"dropout": FloatDistribution(0.0, 1.0)}
PRESET = {"dropout": 0.5}
PARTS = 8
Run = Callable[[Trial, dict[str, Any]], float]


def figure_is_dropout(trial: Trial, values: dict[str, Any]) -> float:
    for part in range(1, PARTS + 1):
        report(trial, part, values["dropout"], PARTS)
    return float(values["dropout"])


def never_ends(trial: Trial, values: dict[str, Any]) -> float:
    raise KeyboardInterrupt


def study_of(
    folder: Path, run: Run, trials: int, *, seconds: float = 300, first: list[float] | None = None, fresh: bool = False
) -> tuple[str, list[TrialResult]]:
    """How the run ended, and the trials by number; `first` are the values of the next trials."""
    with open_study(folder, 1, fresh) as study:
        for value in first or []:
            study.enqueue_trial({"dropout": value})
        ended_by = run_trials(study, SPACE, PRESET, run, Limits(time.monotonic() + seconds, trials), lambda trial: None)
        return ended_by, sorted(results(study), key=lambda trial: trial.number)


def test_every_preset_has_a_space_around_its_own_values() -> None:
    assert set(SPACES) == set(PRESETS)
    for preset, space in SPACES.items():
        config = make_config(preset)
        for name, values in space.items():
            assert name in TrainConfig.model_fields
            value = getattr(config, name)
            assert values._contains(values.to_internal_repr(value)), (preset, name)
            assert values_of({name: value}) == {name: value}


def test_a_fixed_field_is_not_varied_and_no_pooling_is_tried_under_two_names() -> None:
    config = make_config("fast", epochs=3)
    space = space_of("fast", config, {"epochs"}, "mean")
    assert "epochs" not in space
    assert set(space["pooling"].choices) == {"auto", "cls"}
    chosen = make_config("fast", pooling="mean")
    assert set(space_of("fast", chosen, set(), "mean")["pooling"].choices) == {"mean", "cls"}
    assert set(space_of("fast", config, set(), "native")["pooling"].choices) == {"auto", "mean", "cls"}


def test_the_first_trial_is_the_preset_and_the_next_run_continues(tmp_path: Path) -> None:
    _, first = study_of(tmp_path, figure_is_dropout, 3)
    assert [(trial.number, trial.preset) for trial in first] == [(0, True), (1, False), (2, False)]
    assert (first[0].parameters, first[0].value, first[0].state) == (PRESET, 0.5, "complete")
    ended_by, more = study_of(tmp_path, figure_is_dropout, 5)
    assert (ended_by, more[:3], len(more)) == ("trials", first, 5)
    assert len({trial.parameters["dropout"] for trial in more}) == 5  # the continued run does not repeat values
    assert study_of(tmp_path, never_ends, 5) == ("trials", more)
    _, anew = study_of(tmp_path, figure_is_dropout, 1, fresh=True)
    assert [trial.preset for trial in anew] == [True]


def test_a_bad_trial_is_pruned_and_the_best_is_never_below_the_preset(tmp_path: Path) -> None:
    study_of(tmp_path, figure_is_dropout, 1)
    _, trials = study_of(tmp_path, figure_is_dropout, 6, first=[0.6, 0.7, 0.4, 0.1, 0.9])
    states = {trial.parameters["dropout"]: trial.state for trial in trials}
    assert states == {
        0.5: "complete",
        0.6: "complete",
        0.7: "complete",
        0.4: "complete",
        0.1: "pruned",
        0.9: "complete",
    }
    with open_study(tmp_path, 1, fresh=False) as study:
        (pruned,) = study.get_trials(states=(study.trials[4].state,))
        assert max(pruned.intermediate_values) == 2  # not before half of the first training
        assert best_trial(results(study)).parameters == {"dropout": 0.9}
        assert results(study)[-1].state == "pruned"


def test_a_trial_that_the_time_ends_has_no_result_and_the_preset_is_tried_again(tmp_path: Path) -> None:
    def slow(trial: Trial, values: dict[str, Any]) -> float:
        report(trial, 1, 0.9, PARTS)
        while True:
            limits.check_time()

    with open_study(tmp_path, 1, fresh=False) as study:
        limits = Limits(time.monotonic() + 0.3)
        assert run_trials(study, SPACE, PRESET, slow, limits, lambda trial: None) == "time"
        assert 0 < time.monotonic() - limits.deadline < 60
        assert [(trial.state, trial.preset) for trial in results(study)] == [("stopped", True)]
        with pytest.raises(NoTrialFinished, match="more --minutes"):
            best_trial(results(study))
    _, trials = study_of(tmp_path, figure_is_dropout, 2)
    assert [(trial.state, trial.preset) for trial in trials] == [
        ("stopped", True), ("complete", True), ("complete", False),
    ]  # fmt: skip


def test_ctrl_c_and_a_kill_lose_only_the_trial_that_ran(tmp_path: Path) -> None:
    _, before = study_of(tmp_path, figure_is_dropout, 1)
    ended_by, trials = study_of(tmp_path, never_ends, 9)
    assert (ended_by, [trial.state for trial in trials]) == ("interrupted", ["complete", "stopped"])
    with open_study(tmp_path, 1, fresh=False) as study:
        study.ask(SPACE)  # as a killed process leaves it
    _, trials = study_of(tmp_path, figure_is_dropout, 2)
    assert [trial.state for trial in trials] == ["complete", "stopped", "stopped", "complete"]
    assert trials[0] == before[0]


def test_a_study_is_run_by_one_process_at_a_time(tmp_path: Path) -> None:
    with (
        open_study(tmp_path / "fast-1", 1, fresh=False),
        pytest.raises(TuningUnavailable, match="another process runs the study fast-1"),
        open_study(tmp_path / "fast-1", 1, fresh=True),
    ):
        pass


def test_importance_needs_enough_complete_trials(tmp_path: Path) -> None:
    def run(trial: Trial, values: dict[str, Any]) -> float:
        return float(values["dropout"])

    study_of(tmp_path, run, 4)
    with open_study(tmp_path, 1, fresh=False) as study:
        assert importance(study) == {}
    study_of(tmp_path, run, 15)
    with open_study(tmp_path, 1, fresh=False) as study:
        assert importance(study) == {"dropout": pytest.approx(1.0)}
