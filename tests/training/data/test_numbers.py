"""Labels that are numbers: levels in order, and targets on a scale."""

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.support.datasets import many, rows_of
from training.config import TrainConfig, make_config
from training.data.dataset import split_rows
from training.data.numbers import TargetScale, level_polarity, level_values
from training.errors import BadConfig, BadDataset
from training.model.artifact import find_polarity

ORDINAL, CONTINUOUS = make_config("fast", task="ordinal"), make_config("fast", task="continuous")


def test_levels_are_ordered_by_value_and_a_number_has_one_spelling() -> None:
    data = split_rows(rows_of(*many("10", 10), *many("-0.5", 10), *many("2", 10), *many("2.0", 10, 10)), ORDINAL)
    assert data.labels == ["-0.5", "2", "10"]
    assert data.report["labels"]["2"] == {"train": 16, "valid": 2, "test": 2}  # stratified
    assert level_values(data.labels) == [-0.5, 2.0, 10.0]
    assert level_polarity(data.labels) == {"-0.5": -1, "2": pytest.approx(-1 + 2 * 2.5 / 10.5), "10": 1}


def test_named_levels_keep_the_order_in_which_they_are_given_also_as_json_with_sorted_keys() -> None:
    config = make_config("fast", task="ordinal", labels={"m": "mid", "h": "high", "xx": "low"})
    stored = json.dumps(config.model_dump(mode="json"), sort_keys=True)  # JSONB orders keys in its own way
    again = TrainConfig(**json.loads(stored))
    assert again == config
    data = split_rows(rows_of(*many("xx", 10), *many("m", 10), *many("h", 10)), again)
    assert data.labels == ["mid", "high", "low"]
    assert level_values(data.labels) == [0, 1, 2]
    assert find_polarity(data.labels, again) == {"mid": -1, "high": 0, "low": 1}


def test_the_polarity_of_levels_can_be_given_and_names_of_sentiments_keep_theirs() -> None:
    assert find_polarity(["positive", "neutral", "negative"], ORDINAL) == {"positive": 1, "neutral": 0, "negative": -1}
    config = make_config("fast", task="ordinal", polarity={"0": 1, "1": -1})
    assert find_polarity(["0", "1", "2"], config) == {"0": 1, "1": -1, "2": 0}
    assert find_polarity(["value"], make_config("fast", task="continuous", polarity={"0": -1, "1": 1})) is None


def test_other_tasks_are_stored_as_before() -> None:
    assert "levels" not in make_config("fast", labels={"0": "a", "1": "b"}).model_dump(mode="json")


@pytest.mark.parametrize(
    ("settings", "fragments"),
    [
        ({"task": "ordinal", "loss": "bce"}, ["'bce'", "ordinal", "'cross_entropy'"]),
        ({"task": "continuous", "loss": "cross_entropy"}, ["'cross_entropy'", "continuous", "'mse'"]),
        ({"loss": "mse"}, ["'mse'", "single_label", "'cross_entropy' or 'bce'"]),
        ({"task": "continuous", "labels": {"1": "a", "2": "b"}}, ["numbers instead of labels"]),
        ({"task": "continuous", "class_weights": "balanced"}, ["leave out labels and class_weights"]),
        ({"task": "continuous", "polarity": {"good": 1, "bad": -1}}, ["good, bad", "two numbers"]),
        ({"task": "continuous", "polarity": {"1": 1, "1.0": -1}}, ["two numbers"]),
        ({"levels": ["a", "b"]}, ["levels", "ordinal"]),
        ({"task": "ordinal", "levels": ["a", "b"]}, ["names in labels"]),
        ({"task": "ordinal", "labels": {"a": "a", "b": "b"}, "levels": ["b", "c"]}, ["b, c", "names in labels"]),
        ({"task": "ordinal", "labels": {"a": ["x"], "b": "b"}}, ["labels.a is ['x']"]),
    ],
)
def test_what_does_not_fit_a_task_is_refused(settings: dict[str, Any], fragments: list[str]) -> None:
    with pytest.raises(BadConfig) as refused:
        make_config("fast", **settings)
    assert [fragment for fragment in fragments if fragment not in str(refused.value)] == []


def test_presets_take_the_loss_of_the_task() -> None:
    losses = [make_config(preset, task=task).loss for preset in ("guide", "fast") for task in ("ordinal", "continuous")]
    assert losses == ["cross_entropy", "mse"] * 2


@pytest.mark.parametrize(
    ("config", "label", "fragments"),
    [
        (ORDINAL, "good", ["'good' in row 12", "ordinal", "--labels low,mid,high"]),
        (CONTINUOUS, "nan", ["'nan' in row 12", "continuous", "remove the row"]),
        (CONTINUOUS, "1e999", ["'1e999' in row 12"]),
        (CONTINUOUS, "", ["row 12 has no label"]),
    ],
)
def test_a_label_that_is_no_number_is_refused_with_its_row(
    config: TrainConfig, label: str, fragments: list[str]
) -> None:
    with pytest.raises(BadDataset) as refused:
        split_rows(rows_of(*many("1", 10), (label, "なにか"), *many("2", 10)), config)
    assert [fragment for fragment in fragments if fragment not in str(refused.value)] == []


def test_a_number_with_few_rows_is_no_level_but_may_be_a_target() -> None:
    rows = rows_of(*(pair for value in range(30) for pair in many(str(value / 10), 1)))
    with pytest.raises(BadDataset, match="or predict the number itself with --task continuous"):
        split_rows(rows, ORDINAL)
    data = split_rows(rows, CONTINUOUS)
    assert data.labels == ["value"]
    assert data.scale is not None
    for split in (data.train, data.valid, data.test):
        assert (split.targets.shape, split.targets.dtype) == ((len(split), 1), np.float32)
        wanted = [float(rows.labels[number - 2]) for number in split.row_numbers]
        values = data.scale.values(split.targets)[:, 0]
        assert values == pytest.approx(wanted, abs=1e-6)
        assert [float(data.scale.text(value)) for value in values] == wanted
    assert (data.train.targets.mean(), data.train.targets.std()) == pytest.approx((0, 1), abs=1e-6)


def test_a_text_with_two_different_numbers_is_left_out_and_the_same_number_twice_is_not() -> None:
    rows = rows_of(*many("1", 10), *many("2.5", 10), ("1", "二度"), ("1.0", "二度"), ("3", "矛盾"), ("4", "矛盾"))
    report = split_rows(rows, CONTINUOUS).report
    assert (report["rows"], report["duplicates"], report["conflicting"]) == (21, 2, 1)
    assert "labels" not in report


@pytest.mark.parametrize("labels", [["7"] * 20, ["1e308", "-1e308"] * 10])
def test_targets_without_a_standard_deviation_are_refused(labels: list[str]) -> None:
    with pytest.raises(BadDataset, match="numbers that differ and can be squared"):
        split_rows(rows_of(*((label, f"文{i}") for i, label in enumerate(labels))), CONTINUOUS)


numbers = st.floats(-1e6, 1e6).map(lambda value: round(value, 3))


@given(st.lists(numbers, min_size=2, max_size=30))
def test_a_scale_gives_values_back_and_the_ends_of_the_range_the_highest_scores(values: list[float]) -> None:
    array = np.array(values)
    assume(array.std() > 1e-3 * (1 + abs(array.mean())))
    scale = TargetScale.fitted(array, None)
    assert scale.values(scale.outputs(array)) == pytest.approx(array, rel=1e-4, abs=1e-4 * float(array.std()))
    assert (scale.signed(min(values)), scale.signed(max(values))) == (-1, pytest.approx(1))
    assert scale.signed(max(values) + 1) == 1


@given(numbers, numbers, st.sampled_from([(-1.0, 1.0), (1.0, -1.0), (0.0, 0.5)]))
def test_the_polarity_of_a_continuous_task_is_the_line_through_two_points(
    one: float, other: float, scores: tuple[float, float]
) -> None:
    assume(abs(one - other) > 0.01)
    config = make_config("fast", task="continuous", polarity={str(one): scores[0], str(other): scores[1]})
    scale = TargetScale.fitted(np.array([1.0, 2.0, 5.0]), config.polarity)
    assert (scale.signed(one), scale.signed(other)) == pytest.approx(scores, abs=1e-6)
    assert scale.signed((one + other) / 2) == pytest.approx(sum(scores) / 2, abs=1e-6)
