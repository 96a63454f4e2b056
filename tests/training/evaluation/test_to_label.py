"""What is worth labelling next: uncertain texts that are unlike each other."""

import numpy as np
import pytest

from training.evaluation.to_label import CANDIDATES, parts, pick_to_label, spread_over

TOPICS = (
    "電車が止まって駅で待っています",
    "今日のラーメンはとても美味しい",
    "試合は延長戦に入りました",
    "新しいゲームを買った",
)


def probabilities_of(margins: list[float]) -> np.ndarray:
    return np.array([[0.5 + margin / 2, 0.5 - margin / 2] for margin in margins], np.float32)


def test_one_of_each_kind_of_text_is_picked_among_the_least_certain() -> None:
    texts = [f"{topic}{'！' * i}" for topic in TOPICS for i in range(CANDIDATES)]
    certain = [f"確かな文{i}" for i in range(100)]
    margins = [0.1 + 0.001 * i for i in range(len(texts))] + [0.9] * len(certain)
    picked = pick_to_label(texts + certain, probabilities_of(margins), len(TOPICS))
    assert [index // CANDIDATES for index in picked] == [0, 1, 2, 3]
    assert [index % CANDIDATES for index in picked] == [0, 0, 0, 0]  # the least certain of each


@pytest.mark.parametrize("count", [1, 7, 30, 45])
def test_exactly_as_many_as_wanted_each_once(count: int) -> None:
    texts = [f"文{i % 9}" for i in range(45)]
    picked = pick_to_label(texts, probabilities_of([i / 50 for i in range(45)]), count, seed=3)
    assert len(picked) == len(set(picked)) == count
    assert picked == pick_to_label(texts, probabilities_of([i / 50 for i in range(45)]), count, seed=3)
    assert max(picked) < max(CANDIDATES * count, count)


def test_few_texts_are_all_picked() -> None:
    assert pick_to_label(["一", "二"], probabilities_of([0.5, 0.1]), 5) == [1, 0]


def test_a_spread_covers_the_groups_evenly_and_within_them_every_kind_of_text() -> None:
    texts = [f"{TOPICS[i % 2]}{'！' * (i % 5)}" for i in range(60)] + [f"{topic}。" for topic in TOPICS[2:]]
    groups = ["大"] * 60 + ["小", None]
    picked = spread_over(texts, groups, 6, seed=1)
    assert len(set(picked)) == 6
    assert {60, 61} <= set(picked)  # groups of one text
    assert {index % 2 for index in picked if index < 60} == {0, 1}
    assert len(set(spread_over(["同じ"] * 20, [None] * 20, 5))) == 5
    assert spread_over(texts[:3], groups[:3], 5) == [0, 1, 2]


def test_the_random_share_is_taken_first_and_the_rest_divided_evenly() -> None:
    assert parts(100, 0.5, ["uncertain", "spread"]) == {"random": 50, "uncertain": 25, "spread": 25}
    assert parts(10, 0.25, ["a", "b", "c"]) == {"random": 2, "a": 3, "b": 3, "c": 2}
    assert parts(3, 1, ["a", "b"]) == {"random": 3, "a": 0, "b": 0}
