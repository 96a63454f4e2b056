"""The benchmark of labels, on a few rows: every way but SetFit runs, and no test tweet is fitted or drawn."""

import csv
from pathlib import Path

import pytest

from tests.benchmarks import labels
from tests.benchmarks.labels import Bench, Point, draw, measure, pool_and_test, table
from training.data import sample
from training.model.base_model import BaseModelFolder

WORDS = {"negative": "悲しい日", "neutral": "駅に着いた", "positive": "嬉しい日"}


def rows(path: Path, count: int, start: int = 0) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "label", "text"])
        for i in range(start, start + count):
            label = labels.LABELS[i % 3]
            writer.writerow([str(i), label, f"{WORDS[label]}だった、その{i}"])
    return path


@pytest.mark.slow
def test_every_way_is_measured(tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labels, "POOL_ROWS", 60)
    monkeypatch.setattr(sample, "LABELLED", rows(tmp_path / "sample.csv", 60, start=1_000))
    bench = Bench(BaseModelFolder("tiny", tiny_encoder), {"epochs": 1}, tmp_path, rows(tmp_path / "real.csv", 90))
    points = measure(bench, ["default", "chosen", "review", "tfidf", "trainer"], [0, 40], [1])
    assert [(point.way, point.labels) for point in points] == [
        (way, count) for way in ("default", "chosen", "review", "tfidf", "trainer") for count in (0, 40)
    ]
    assert all(0 <= value <= 1 for point in points for value in point.values)
    picked = bench.review_picks(40, 1)
    assert len(set(picked)) == 40
    assert picked[:20] == bench.draw(20, 1)
    assert points[7].mean == 1.0  # TF-IDF reads the words
    assert 0 <= bench.scaled_error(1) <= 1
    draw(points, tmp_path / "labels.png", "tiny")
    assert (tmp_path / "labels.png").stat().st_size > 10_000


def test_pool_and_test_are_always_the_same_and_share_no_tweet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labels, "POOL_ROWS", 60)
    path = rows(tmp_path / "real.csv", 90)
    pool, test = pool_and_test(path)
    assert (len(pool), len(test)) == (60, 30)
    assert not set(pool.texts) & set(test.texts)
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join([lines[0], *reversed(lines[1:])]), encoding="utf-8")
    assert pool_and_test(path) == (pool, test)


def test_the_table_has_mean_and_spread_by_way_and_count() -> None:
    points = [Point("default", 0, [0.5, 0.6]), Point("tfidf", 0, [0.4]), Point("tfidf", 50, [0.45, 0.55])]
    assert table(points, [0, 50]).splitlines() == [
        "| own labels | 0 | 50 |",
        "|---|---|---|",
        "| tweetscore, labels drawn at random | 0.550 ± 0.071 |  |",
        "| TF-IDF and logistic regression | 0.400 ± 0.000 | 0.500 ± 0.071 |",
    ]
