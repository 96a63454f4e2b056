"""The sample's rows join those of a small dataset whose labels name sentiments, and no other."""

import numpy as np
import pytest

from tests.support.paths import ROOT
from training.config import make_config
from training.data.dataset import Dataset, Rows, read_rows, split_rows
from training.data.sample import LABELLED, OWN_ROWS_AT_MOST, with_sample
from training.text.cleaning import same_text_key


def dataset(labels: list[str], rows_of_label: int = 20, first: str = "自分の行") -> Dataset:
    texts = [f"{first}{i} {label}" for label in labels for i in range(rows_of_label)]
    rows = Rows(texts, [label for label in labels for _ in range(rows_of_label)], list(range(1, len(texts) + 1)))
    return split_rows(rows, make_config("fast"))


def test_rows_of_each_sentiment_join_the_training_rows_alone() -> None:
    own = dataset(["ポジティブ", "Negative", "neutral"])
    joined = with_sample(own, make_config("fast", sample_weight=0.5))
    added = joined.train.targets[len(own.train) :]
    wanted = [read_rows(LABELLED).labels.count(name) for name in ("negative", "neutral", "positive")]
    assert joined.labels == ["Negative", "neutral", "ポジティブ"]
    assert added.sum(axis=0).tolist() == wanted
    assert joined.report["sample_rows"] == sum(wanted) == len(joined.train) - len(own.train)
    assert joined.train.weights is not None
    assert set(joined.train.weights[: len(own.train)]) == {1.0}
    assert set(joined.train.weights[len(own.train) :]) == {0.5}
    assert joined.train.texts[: len(own.train)] == own.train.texts
    assert (joined.valid, joined.test) == (own.valid, own.test)


@pytest.mark.parametrize(
    ("labels", "options"),
    [
        (["ham", "spam"], {}),
        (["positive", "negative"], {}),
        (["positive", "negative", "other"], {}),
        (["positive", "neutral", "pos", "negative"], {}),  # two name the same sentiment
        (["positive", "neutral", "negative"], {"add_sample": False}),
        (["positive", "neutral", "negative"], {"task": "multi_label"}),
    ],
)
def test_other_labels_and_tasks_stay_alone(labels: list[str], options: dict[str, object]) -> None:
    own = dataset(labels)
    assert with_sample(own, make_config("fast", **options)) is own


def test_many_rows_stay_alone() -> None:
    own = dataset(["positive", "neutral", "negative"], OWN_ROWS_AT_MOST)
    assert with_sample(own, make_config("fast")) is own


def test_a_text_of_the_dataset_is_not_added_again() -> None:
    """Else a test row could be among the training rows; and the sample does not join itself."""
    rows = read_rows(LABELLED)
    own = split_rows(rows, make_config("fast"))
    assert with_sample(own, make_config("fast")) is own
    part = [i for i in range(len(rows.texts)) if i % 10 == 0]
    few = split_rows(Rows(*([values[i] for i in part] for values in (rows.texts, rows.labels, rows.row_numbers))),
                     make_config("fast"))  # fmt: skip
    joined = with_sample(few, make_config("fast"))
    keys = [same_text_key(text) for text in joined.train.texts + joined.valid.texts + joined.test.texts]
    assert len(set(keys)) == len(keys)
    assert joined.report["sample_rows"] == len(rows.texts) - len(part)


def test_epochs_follow_the_number_of_rows_unless_they_are_given() -> None:
    config = make_config("fast", row_passes=10_000)
    assert [config.for_rows(rows).epochs for rows in (100, 2_500, 100_000)] == [config.epochs, 4, 2]
    assert make_config("fast", epochs=3).for_rows(50).epochs == 3
    assert make_config("guide").for_rows(50).epochs == 20


def test_the_sample_is_a_part_of_the_package() -> None:
    assert LABELLED.is_relative_to(ROOT / "training")
    assert np.isin(read_rows(LABELLED).labels, ["negative", "neutral", "positive"]).all()
