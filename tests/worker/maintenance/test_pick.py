"""`tweetscore data pick`: tweets that are worth labelling, in a file that can be trained on."""

import csv
from pathlib import Path

import pytest

from db.errors import NotFound
from db.session import Database
from tests.support.rows import assign, make_version, prediction_row, tweet_row, write
from training.config import make_config
from training.data.dataset import read_rows, split_rows
from worker.errors import BadRequest
from worker.maintenance.pick import pick


def scored(database: Database, probabilities: list[float]) -> int:
    version = make_version(database)
    rows = [
        prediction_row(
            str(i), version, label="positive", probability=p, probabilities={"positive": p, "negative": 1 - p}
        )
        for i, p in enumerate(probabilities)
    ]
    write(database, [tweet_row(str(i), text=f"文その{i}") for i in range(len(rows))], rows)
    return version


def test_the_least_certain_tweets_are_written_with_an_empty_label(database: Database, tmp_path: Path) -> None:
    assign(database, scored(database, [0.5 + i / 250 for i in range(120)]))
    place = tmp_path / "to-label.csv"
    assert pick(database, str(place), 10) == 10
    with place.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["label"] for row in rows] == [""] * 10
    assert all(int(row["tweet_id"]) < 40 for row in rows)  # of the 40 least certain
    assert all(row["text"] == f"文その{row['tweet_id']}" and row["predicted"] == "positive" for row in rows)
    assert [path.name for path in tmp_path.glob("to-label*")] == [place.name]


def test_the_file_can_be_trained_on_once_it_is_filled_in(database: Database, tmp_path: Path) -> None:
    assign(database, scored(database, [0.5 + i / 250 for i in range(120)]))
    place = tmp_path / "to-label.csv"
    pick(database, str(place), 40)
    lines = place.read_text(encoding="utf-8").splitlines()
    filled = [f"{'positive' if i % 2 else 'negative'}{line}" for i, line in enumerate(lines[1:])]
    place.write_text("\n".join([lines[0], *filled]), encoding="utf-8")
    data = split_rows(read_rows(place), make_config("fast"))
    assert len(data.train) + len(data.valid) + len(data.test) == 40


def test_it_says_what_is_missing(database: Database, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no champion yet"):
        pick(database, str(tmp_path / "a.csv"), 5)
    assign(database, make_version(database))
    with pytest.raises(NotFound, match="has not scored a tweet yet"):
        pick(database, str(tmp_path / "a.csv"), 5)
    assign(database, scored(database, [0.5, 0.6]))
    with pytest.raises(BadRequest, match="cannot be written"):
        pick(database, str(tmp_path / "missing" / "a.csv"), 5)
