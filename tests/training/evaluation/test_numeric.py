"""Ordinal levels and continuous targets: figures, intervals, decisions, losses and baselines."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import (
    accuracy_score,
    cohen_kappa_score,
    d2_absolute_error_score,
    f1_score,
    mean_absolute_error,
    r2_score,
    root_mean_squared_error,
)

from training.config import make_config
from training.data.dataset import Dataset, Split
from training.data.numbers import TargetScale
from training.evaluation.baselines import baselines, majority
from training.evaluation.bootstrap import resamples
from training.evaluation.calibration import fit_temperature
from training.evaluation.decisions import agreement, choose, confidence
from training.evaluation.epoch_quality import epoch_quality
from training.evaluation.metrics import metrics, model_figures
from training.evaluation.numeric import figures_of, intervals_of, ordinal_measure, value_measure
from training.loop.predict import loss_function, soft_levels

LEVELS = ["-2", "-1", "0", "1", "2"]
SCALE = TargetScale(mean=3.0, deviation=2.0, low=1.0, high=7.0)

levels = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=2, max_size=40)
distributions = arrays(
    np.float32, st.tuples(st.integers(1, 20), st.integers(2, 6)), elements=st.floats(0.015625, 1, width=32)
)


@given(levels)
def test_ordinal_figures_are_those_of_scikit_learn(pairs: list[tuple[int, int]]) -> None:
    actual, predicted = np.array(pairs).T
    figures = figures_of(ordinal_measure(actual, predicted, [0.0, 1.0, 2.0, 10.0]), len(pairs))
    places = np.array([0, 1, 2, 10])
    assert figures["mean_absolute_error"] == pytest.approx(mean_absolute_error(places[actual], places[predicted]))
    if len({*actual, *predicted}) > 1:
        wanted = cohen_kappa_score(actual, predicted, labels=range(4), weights="quadratic")
        assert figures["quadratic_kappa"] == pytest.approx(wanted, abs=1e-9)
    else:
        assert "quadratic_kappa" not in figures  # scikit-learn returns NaN


@given(st.lists(st.tuples(st.integers(-50, 50), st.integers(-50, 50)), min_size=3, max_size=40))
def test_continuous_figures_are_those_of_scipy(pairs: list[tuple[int, int]]) -> None:
    actual, predicted = np.array(pairs, np.float64).T
    figures = figures_of(value_measure(actual, predicted), len(pairs))
    assert figures["mean_absolute_error"] == pytest.approx(mean_absolute_error(actual, predicted))
    assert figures["root_mean_squared_error"] == pytest.approx(root_mean_squared_error(actual, predicted))
    if np.ptp(actual) and np.ptp(predicted):
        assert figures["pearson"] == pytest.approx(pearsonr(actual, predicted).statistic, abs=1e-9)
        assert figures["spearman"] == pytest.approx(spearmanr(actual, predicted).statistic, abs=1e-9)
    else:
        assert not {"pearson", "spearman"} & set(figures)


def test_intervals_are_those_of_rows_repeated_as_often_as_they_were_drawn() -> None:
    generator = np.random.default_rng(0)
    actual = generator.integers(0, 20, 80).astype(np.float64)  # with ties
    predicted = actual + generator.normal(0, 4, 80)
    ends = intervals_of(value_measure(actual, predicted), 80, seed=3)
    drawn = np.concatenate(list(resamples(80, 3))).astype(int)
    assert drawn.sum(axis=1).tolist() == [80] * 1000
    rhos = [spearmanr(np.repeat(actual, times), np.repeat(predicted, times)).statistic for times in drawn]
    assert (ends["spearman_low"], ends["spearman_high"]) == pytest.approx(tuple(np.percentile(rhos, (2.5, 97.5))))
    for name, value in figures_of(value_measure(actual, predicted), 80).items():
        assert ends[f"{name}_low"] < value < ends[f"{name}_high"]


def test_intervals_leave_out_resamples_in_which_a_figure_is_undefined() -> None:
    levels = np.array([0, 0, 1])  # some resamples hold one level only
    ends = intervals_of(ordinal_measure(levels, levels, [0.0, 1.0]), 3, seed=0)
    assert ends == {
        "quadratic_kappa_low": 1, "quadratic_kappa_high": 1,
        "mean_absolute_error_low": 0, "mean_absolute_error_high": 0,
    }  # fmt: skip


@given(distributions)
def test_the_predicted_level_is_the_median_and_no_other_level_is_closer_on_average(weights: Any) -> None:
    probabilities = weights / weights.sum(axis=1, keepdims=True)
    chosen = choose(probabilities, "ordinal")
    assert chosen.sum(axis=1).tolist() == [1] * len(chosen)
    steps = np.arange(probabilities.shape[1])
    errors = probabilities.astype(np.float64) @ np.abs(np.subtract.outer(steps, steps))
    assert (errors[chosen == 1] <= errors.min(axis=1) + 1e-5).all()
    sure = confidence(probabilities, chosen, "ordinal")
    assert sure.tolist() == probabilities[chosen == 1].tolist()
    certain = probabilities.max(axis=1) > 0.501
    assert (chosen.argmax(axis=1) == probabilities.argmax(axis=1))[certain].all()


def test_engines_agree_on_values_that_are_close() -> None:
    outputs = np.array([[0.0], [1.0], [2.0], [3.0]], np.float32)
    moved = outputs + np.array([[0.0], [0.05], [-0.05], [0.5]], np.float32)
    assert agreement(outputs, moved, "continuous") == 0.75
    assert agreement(np.eye(3)[[0, 1]], np.eye(3)[[0, 2]], "ordinal") == 0.5


def ordinal_loss(logits: Any, targets: Any, **settings: Any) -> torch.Tensor:
    loss: torch.Tensor = loss_function(make_config("fast", task="ordinal"), **settings)(logits, targets)
    return loss


@given(st.integers(2, 6), st.integers(0, 5))
def test_the_ordinal_loss_rises_with_the_distance_of_a_confident_mistake(count: int, level: int) -> None:
    level = min(level, count - 1)
    target = torch.eye(count)[[level]]
    losses = [float(ordinal_loss(5 * torch.eye(count)[[said]], target)) for said in range(count)]
    upward, downward = losses[level:], losses[level::-1]
    for direction in (upward[:3], downward[:3]):  # beyond, the smoothed target is too small for float32
        assert all(near < far for near, far in itertools.pairwise(direction))


def test_the_ordinal_loss_takes_soft_targets_and_gives_a_loss_per_row() -> None:
    logits, targets = torch.randn(4, 3), torch.eye(3)[[0, 1, 2, 1]]
    of_rows = ordinal_loss(logits, targets, reduction="none")
    assert of_rows.shape == (4,)
    assert float(ordinal_loss(logits, targets)) == pytest.approx(float(of_rows.mean()))
    mixed = ordinal_loss(logits[:1], torch.tensor([[0.25, 0.75, 0.0]]))
    parts = [float(ordinal_loss(logits[:1], torch.eye(3)[[level]])) for level in (0, 1)]
    assert float(mixed) == pytest.approx(0.25 * parts[0] + 0.75 * parts[1], rel=1e-5)


def test_balanced_weights_multiply_the_terms_of_rare_levels() -> None:
    config = make_config("fast", task="ordinal", class_weights="balanced")
    targets = np.eye(2, dtype=np.float32)[[0, 0, 0, 1]]
    logits = torch.randn(2, 2)
    terms = -soft_levels(2) * logits.log_softmax(1) * torch.tensor([4 / (2 * 3), 4 / 2])
    weighted = loss_function(config, targets, "none")(logits, torch.eye(2))
    assert weighted.tolist() == pytest.approx(terms.sum(1).tolist())


@pytest.mark.parametrize("count", [2, 3, 7])
def test_soft_levels_are_distributions_that_fall_with_the_distance(count: int) -> None:
    soft = soft_levels(count)
    assert soft.sum(1).tolist() == pytest.approx([1] * count)
    assert soft.argmax(1).tolist() == list(range(count))
    assert torch.allclose(soft, soft.flip(0, 1))
    assert torch.all(soft[0].diff() < 0)


def test_the_continuous_loss_is_the_squared_error_of_each_row() -> None:
    config = make_config("guide", task="continuous")
    loss = loss_function(config, reduction="none")(torch.tensor([[1.0], [2.0]]), torch.tensor([[0.0], [4.0]]))
    assert loss.tolist() == [[1.0], [4.0]]


def test_ordinal_models_have_the_figures_of_labels_and_of_levels() -> None:
    generator = np.random.default_rng(1)
    targets = np.eye(5, dtype=np.float32)[generator.integers(0, 5, 200)]
    logits = (2 * targets + generator.normal(size=targets.shape)).astype(np.float32)
    config = make_config("fast", task="ordinal")
    figures = model_figures(targets, logits, 1.0, LEVELS, config)
    for name in ("accuracy", "f1_macro", "quadratic_kappa", "mean_absolute_error"):
        assert figures[f"{name}_low", ""] < figures[name, ""] < figures[f"{name}_high", ""]
    assert {"ece", "brier", "roc_auc"} <= {name for name, _ in figures}
    # Labels that are no numbers count steps, which are half as long here.
    doubled = model_figures(targets, logits, 1.0, ["-4", "-2", "0", "2", "4"], config)
    assert doubled["mean_absolute_error", ""] == pytest.approx(2 * figures["mean_absolute_error", ""])
    named = model_figures(targets, logits, 1.0, list("edcba"), config)
    assert named["mean_absolute_error", ""] == pytest.approx(figures["mean_absolute_error", ""])


def test_continuous_models_have_the_figures_of_values_alone_in_the_unit_of_the_targets() -> None:
    generator = np.random.default_rng(1)
    targets = generator.normal(size=(60, 1)).astype(np.float32)
    outputs = (targets + generator.normal(0, 0.3, size=(60, 1))).astype(np.float32)
    figures = model_figures(targets, outputs, 1.0, ["value"], make_config("fast", task="continuous"), SCALE)
    names = ("mean_absolute_error", "root_mean_squared_error", "pearson", "spearman")
    assert {name for name, _ in figures} == {f"{name}{end}" for name in names for end in ("", "_low", "_high")}
    assert figures["mean_absolute_error", ""] == pytest.approx(2 * float(np.abs(outputs - targets).mean()))
    assert fit_temperature(outputs, targets, "continuous") == 1.0


def test_the_quality_of_an_epoch_is_highest_where_the_absolute_error_is_lowest() -> None:
    targets = np.array([[-1.0], [0.0], [2.0]], np.float32)
    better, worse = (epoch_quality(targets, targets + shift, "continuous") for shift in (0.1, 0.4))
    assert 1 > better[1] > worse[1] > 0
    assert epoch_quality(targets, targets, "continuous") == (1.0, 1.0)
    assert epoch_quality(targets, targets + 100, "continuous") == (0.0, 0.0)
    assert epoch_quality(targets[:1], targets[:1], "continuous") == (0.0, 0.0)  # one row has no spread


@pytest.mark.parametrize("task", ["single_label", "multi_label", "continuous"])
def test_the_quality_of_an_epoch_is_that_of_scikit_learn(task: str) -> None:
    generator = np.random.default_rng(2)
    probabilities = generator.random((50, 1 if task == "continuous" else 4)).astype(np.float32)
    targets = probabilities + generator.normal(0, 0.2, probabilities.shape).astype(np.float32)
    if task == "continuous":
        expected = r2_score(targets, probabilities), d2_absolute_error_score(targets, probabilities)
    else:
        targets, probabilities = targets * [1, 1, 1, 0], probabilities * [1, 1, 1, 0]  # a label that no row has
        targets = choose(targets, task).astype(np.float32)
        chosen = choose(probabilities, task)
        expected = accuracy_score(targets, chosen), f1_score(targets, chosen, average="macro", zero_division=0)
    assert epoch_quality(targets, probabilities, task) == pytest.approx(expected, rel=1e-5)
    assert 0 < min(expected) < 1


def test_the_baselines_of_levels_are_the_commonest_level_and_logistic_regression() -> None:
    words = ["とても悲しい", "ふつう", "嬉しい", "とても嬉しい", "まあまあ"]
    texts = [f"{words[i % 5]}日{i}" for i in range(60)]
    split = Split(texts, np.eye(5, dtype=np.float32)[[i % 5 for i in range(60)]], list(range(60)))
    figures, notes = baselines(Dataset(LEVELS, split, split, split), "ordinal")
    assert notes == []
    assert figures["tfidf_quadratic_kappa", ""] > 0.9
    assert figures["majority_quadratic_kappa", ""] == 0
    # Not the median of the training rows, which would be the second level.
    uneven = Split(["a"] * 7, np.eye(3, dtype=np.float32)[[0, 0, 0, 1, 1, 2, 2]], list(range(7)))
    assert majority(uneven, uneven, "ordinal")[0].tolist() == [1, 0, 0]


def test_the_baselines_of_numbers_are_their_mean_and_ridge_regression() -> None:
    generator = np.random.default_rng(0)
    values = generator.integers(0, 3, 90)
    texts = [f"{'とても' * value}嬉しい{i}" for i, value in enumerate(values)]
    targets = SCALE.outputs(values[:, None].astype(np.float64))
    split = Split(texts, targets, list(range(90)))
    data = Dataset(["value"], split, split, split, scale=SCALE)
    figures, notes = baselines(data, "continuous")
    assert notes == []
    assert figures["majority_mean_absolute_error", ""] == pytest.approx(np.abs(values - values.mean()).mean(), rel=1e-5)
    assert figures["tfidf_mean_absolute_error", ""] < figures["majority_mean_absolute_error", ""] / 2
    assert figures["tfidf_spearman", ""] > 0.8
    assert ("majority_pearson", "") not in figures  # a constant has no correlation
    assert metrics(targets, targets, ["value"], "continuous", SCALE)["mean_absolute_error", ""] == 0
