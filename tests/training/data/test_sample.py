"""The sample is learned before a small dataset whose labels name sentiments, and before no other."""

import numpy as np
import pytest

from tests.support.paths import ROOT
from training.config import WITH_MANY_ROWS, make_config
from training.data.dataset import Dataset, Rows, read_rows, split_rows
from training.data.sample import LABELLED, OWN_ROWS_AT_MOST, sample_for
from training.text.cleaning import same_text_key


def dataset(labels: list[str], rows_of_label: int = 20, first: str = "自分の行") -> Dataset:
    texts = [f"{first}{i} {label}" for label in labels for i in range(rows_of_label)]
    rows = Rows(texts, [label for label in labels for _ in range(rows_of_label)], list(range(1, len(texts) + 1)))
    return split_rows(rows, make_config("fast"))


def test_the_sample_has_the_labels_of_the_dataset_in_their_order() -> None:
    own = dataset(["ポジティブ", "Negative", "neutral"])
    parts = sample_for(own, make_config("fast"))
    assert parts is not None
    train, valid = parts
    wanted = [read_rows(LABELLED).labels.count(name) for name in ("negative", "neutral", "positive")]
    assert own.labels == ["Negative", "neutral", "ポジティブ"]
    assert (train.targets.sum(axis=0) + valid.targets.sum(axis=0)).tolist() == wanted
    assert len(valid) == pytest.approx(sum(wanted) / 20, abs=1)
    assert not set(train.texts) & set(valid.texts)


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
    assert sample_for(dataset(labels), make_config("fast", **options)) is None


def test_many_rows_stay_alone() -> None:
    assert sample_for(dataset(["positive", "neutral", "negative"], OWN_ROWS_AT_MOST), make_config("fast")) is None


def test_a_text_of_the_dataset_is_left_out() -> None:
    """Else a test row could be among the training rows."""
    rows = read_rows(LABELLED)
    part = [i for i in range(len(rows.texts)) if i % 10 == 0]
    few = split_rows(Rows(*([values[i] for i in part] for values in (rows.texts, rows.labels, rows.row_numbers))),
                     make_config("fast"))  # fmt: skip
    parts = sample_for(few, make_config("fast"))
    assert parts is not None
    texts = [text for split in (*parts, few.train, few.valid, few.test) for text in split.texts]
    assert len({same_text_key(text) for text in texts}) == len(texts) == len(rows.texts)


def test_epochs_follow_the_number_of_rows_unless_they_are_given() -> None:
    config = make_config("fast", row_passes=10_000)
    assert [config.for_rows(rows).epochs for rows in (100, 2_500, 100_000)] == [config.epochs, 4, 2]
    assert make_config("fast", epochs=3).for_rows(50).epochs == 3
    assert make_config("guide").for_rows(50).epochs == 20


def test_many_rows_train_faster_unless_a_setting_of_it_is_given() -> None:
    def trained(rows: int, **given: float) -> dict[str, float | None]:
        config = make_config("fast", **given).for_rows(rows)
        return {name: getattr(config, name) for name in WITH_MANY_ROWS}

    few = {"encoder_dropout": None, "train_batch_size": 16, "learning_rate": 1e-4}
    assert (trained(5_000), trained(6_000)) == (few, WITH_MANY_ROWS)
    assert trained(6_000, learning_rate=3e-4) == {**few, "learning_rate": 3e-4}
    assert trained(6_000, epochs=2) == few


def test_the_sample_is_a_part_of_the_package() -> None:
    assert LABELLED.is_relative_to(ROOT / "training")
    assert np.isin(read_rows(LABELLED).labels, ["negative", "neutral", "positive"]).all()
