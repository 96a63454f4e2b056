"""What is worth labelling next: uncertain texts that are unlike each other."""

import numpy as np
import pytest

from training.evaluation.to_label import CANDIDATES, pick_to_label

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
