"""Splits of labels with few rows, and the folds of a cross-validation: what holds for every dataset."""

from itertools import chain

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.datasets import many, rows_of
from training.config import TrainConfig, make_config
from training.data.dataset import Dataset, Rows, split_rows
from training.data.splits import MIN_ROWS_OF_LABEL, fold_splits, rows_needed
from worker.intake.file_report import check_file

PARTS = ("train", "valid", "test")
# Rows of each label: some with few, some with many.
COUNTS = st.lists(st.integers(MIN_ROWS_OF_LABEL, 40), min_size=2, max_size=5)


def labelled(counts: list[int]) -> Rows:
    return rows_of(*chain(*(many(f"label{k}", count) for k, count in enumerate(counts))))


def of_label(data: Dataset, part: str) -> list[int]:
    return [int(n) for n in getattr(data, part).targets.sum(axis=0)]


@given(counts=COUNTS, seed=st.integers(0, 2**31 - 1), shares=st.sampled_from([(0.8, 0.5), (0.5, 0.5), (0.1, 0.9)]))
def test_every_part_has_every_label_and_every_row_is_in_one_part(
    counts: list[int], seed: int, shares: tuple[float, float]
) -> None:
    config = make_config("fast", seed=seed, train_size=shares[0], valid_size=shares[1])
    few = min(counts) < rows_needed(config)
    rows = labelled(counts)
    data = split_rows(rows, config)
    numbers = [number for part in PARTS for number in getattr(data, part).row_numbers]
    assert sorted(numbers) == rows.row_numbers
    assert [min(of_label(data, part)) >= (2 if part == "train" and few else 1) for part in PARTS] == [True] * 3
    assert ("notes" in data.report) == few
    again = split_rows(rows, config)
    assert [getattr(again, part).row_numbers for part in PARTS] == [getattr(data, part).row_numbers for part in PARTS]
    for part in PARTS:
        split = getattr(data, part)
        assert [rows.labels[n - 2] for n in split.row_numbers] == [data.labels[k] for k in split.targets.argmax(axis=1)]


def test_the_rows_of_a_common_label_keep_their_shares_beside_a_rare_one() -> None:
    data = split_rows(labelled([4, 200]), make_config("fast"))
    assert [of_label(data, part) for part in PARTS] == [[2, 160], [1, 20], [1, 20]]
    other = split_rows(labelled([4, 200]), make_config("fast", seed=1))
    assert other.test.row_numbers != data.test.row_numbers


@pytest.mark.parametrize(
    ("counts", "folds", "note"),
    [
        ([10, 10], None, None),
        (
            [9, 30],
            None,
            "few rows: label0 9 (1 in the test part); the test figures of these labels and macro-F1 say next to "
            "nothing: label more rows, or train with --folds 5, which measures on every row",
        ),
        ([6, 4], None, "few rows: label0 6 (1 in the test part), label1 4 (1 in the test part); "),
        ([6, 4], None, "--folds 4"),
        ([6, 4], 3, "say next to nothing: go by the cross-validation, and label more rows"),
    ],
)
def test_the_report_says_in_words_what_few_test_rows_are_worth(
    counts: list[int], folds: int | None, note: str | None
) -> None:
    notes = split_rows(labelled(counts), make_config("fast", folds=folds)).report.get("notes")
    assert notes is None if note is None else note in notes[0]


def test_a_file_with_few_rows_of_a_label_is_reported_before_training(tmp_path) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "few.csv"
    rows = [*many("rare", 3), *many("few", 6), *many("common", 30)]
    path.write_text("label,text\n" + "".join(f"{label},{text}\n" for label, text in rows), encoding="utf-8")
    advice = check_file(str(path), "starter", 50)["advice"]
    assert advice == [
        "labels with fewer than 4 rows cannot be split; add rows: rare",
        "labels with fewer than 10 rows: few; their test figures and macro-F1 will say next to nothing: label more "
        "rows, or train with --folds 5",
    ]


@given(counts=COUNTS, folds=st.integers(2, 20), seed=st.integers(0, 2**31 - 1), single=st.booleans())
def test_each_row_is_held_out_once_and_never_trained_on_in_its_fold(
    counts: list[int], folds: int, seed: int, single: bool
) -> None:
    folds = min(folds, *counts)
    config = make_config("fast", folds=folds, seed=seed, task="single_label" if single else "multi_label")
    targets = np.repeat(np.eye(len(counts), dtype=np.float32), counts, axis=0)
    splits = fold_splits(targets, config)
    assert len(splits) == folds
    assert sorted(chain(*(split["test"] for split in splits))) == list(range(len(targets)))
    for split in splits:
        assert sorted(chain(*split.values())) == list(range(len(targets)))
        shares = [targets[split[part]].sum(axis=0).min() for part in PARTS]
        assert min(shares) >= 1 or not single
        assert min(map(len, split.values())) >= 1
    again = fold_splits(targets, config)
    assert all(np.array_equal(a[part], b[part]) for a, b in zip(splits, again, strict=True) for part in PARTS)


def test_the_validation_rows_of_a_fold_have_the_share_of_the_ordinary_split() -> None:
    targets = np.repeat(np.eye(2, dtype=np.float32), [450, 450], axis=0)
    sizes = [[len(split[part]) for part in PARTS] for split in fold_splits(targets, make_config("fast", folds=5))]
    assert sizes == [[640, 80, 180]] * 5  # 8 : 1 of the rows that are not held out


def test_only_a_job_that_asks_for_folds_speaks_of_them() -> None:
    """So that a trainer or scorer of a release before takes every other job and model."""
    assert "folds" not in make_config("fast").model_dump(mode="json")
    chosen = make_config("fast", folds=5)
    assert TrainConfig(**chosen.model_dump(mode="json")) == chosen
