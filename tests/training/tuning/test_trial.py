"""One trial on a few easy rows: its splits, its figures, and that a hook ends it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest

from tests.support.training_loop import CPU, Bench, maker
from training.data.dataset import Split
from training.tuning.trial import TrialHooks, inner_splits, prepare_trials, run_trial, splits_needed

NO_HOOKS = TrialHooks(lambda position: None, lambda part, figure: None)


@pytest.fixture
def made(tiny_encoder: Path, labelled_csv: Path) -> Bench:
    return maker(tiny_encoder, labelled_csv)(pooling="mean", learning_rate=1e-2)


def prepared(made: Bench, count: int | None = None) -> Any:
    data = made.data
    return prepare_trials(made.encoder, data.train, data.valid, data.labels, made.config, CPU, count)


def split_of(targets: list[list[float]], first: int = 0) -> Split:
    numbers = list(range(first, first + len(targets)))
    return Split([f"text {n}" for n in numbers], np.array(targets, np.float32), numbers)


def test_one_split_is_that_of_the_job(made: Bench, tmp_path: Path) -> None:
    inputs = prepared(made, 1)
    assert inputs.splits[0].train.row_numbers == made.data.train.row_numbers
    assert inputs.splits[0].valid.texts == made.data.valid.texts
    assert inputs.splits[0].valid_ids == made.rows["valid"]
    # The figure is that of the epoch that a job keeps.
    epochs = made.fit(made.model(), tmp_path)
    assert run_trial(inputs, made.config, NO_HOOKS) == [[e for e in epochs if e.kept][-1].valid_f1_macro]


def test_several_splits_share_no_validation_row_and_use_no_test_row(made: Bench) -> None:
    inputs = prepared(made)
    assert len(inputs.splits) == 5
    numbers = [number for split in inputs.splits for number in split.valid.row_numbers]
    assert len(numbers) == len(set(numbers)) == inputs.validation_rows == 30
    for split in inputs.splits:
        assert split.valid.targets.sum(axis=0).tolist() == [3, 3]
        used = {*split.train.row_numbers, *split.valid.row_numbers}
        assert used == {*made.data.train.row_numbers, *made.data.valid.row_numbers}
        assert not used & set(made.data.test.row_numbers)


def test_splits_are_as_many_as_the_validation_rows_need() -> None:
    assert [splits_needed(rows) for rows in (6, 100, 150, 399, 400, 5000)] == [5, 4, 3, 2, 1, 1]


def test_rows_with_several_labels_or_few_of_one_are_split_too() -> None:
    several = [[1.0, 1.0], [0.0, 0.0], [1.0, 0.0], [0.0, 1.0]] * 5
    _, positions = inner_splits(split_of(several[:16]), split_of(several[16:], 16), 1, 5)
    assert sorted(int(row) for _, valid in positions for row in valid) == list(range(20))
    few = [[1.0, 0.0]] * 4 + [[0.0, 1.0]] * 20
    rows, positions = inner_splits(split_of(few[:20]), split_of(few[20:], 20), 1, 5)
    assert len(positions) == 4
    assert all(rows.targets[valid, 0].sum() == 1 for _, valid in positions)


def test_weights_stay_with_their_rows(made: Bench) -> None:
    weights = np.arange(len(made.data.train), dtype=np.float32)
    weighted = replace(made, data=replace(made.data, train=replace(made.data.train, weights=weights)))
    inputs = prepared(weighted, 3)
    known = dict(zip(made.data.train.row_numbers, weights, strict=True))
    for split in inputs.splits:
        assert split.train.weights is not None
        assert split.train.weights.tolist() == [known.get(number, 1.0) for number in split.train.row_numbers]


@pytest.mark.parametrize(("epochs", "splits", "parts"), [(3, 2, [1, 2, 4, 5, 6, 8]), (8, 1, [1, 2, 3, 4])])
def test_figures_are_reported_at_the_same_parts_whatever_the_epochs(
    tiny_encoder: Path, labelled_csv: Path, epochs: int, splits: int, parts: list[int]
) -> None:
    made = maker(tiny_encoder, labelled_csv)(epochs=epochs)
    inputs = prepared(made, splits)
    told: list[tuple[int, float]] = []
    figures = run_trial(inputs, made.config, TrialHooks(lambda position: None, lambda *found: told.append(found)))
    assert [part for part, _ in told] == parts
    assert parts[-1] == inputs.last_report
    assert told[-1][1] == pytest.approx(sum(figures) / splits)


@pytest.mark.parametrize("hook", ["on_step", "on_report"])
def test_a_hook_ends_the_trial_at_once(made: Bench, hook: str) -> None:
    told: list[str] = []

    def end(*_: object) -> None:
        raise optuna.TrialPruned

    hooks: dict[str, Callable[..., None]] = {"on_step": told.append, "on_report": lambda *_: None, hook: end}
    with pytest.raises(optuna.TrialPruned):
        run_trial(prepared(made, 2), made.config, TrialHooks(**hooks))
    assert all(position.startswith("split 1 of 2") for position in told)
    assert bool(told) == (hook == "on_report")
