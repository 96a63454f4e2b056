"""`split: guide`: the rows that the guide's own lines draw, against a literal run of them, and what is done with such
a split further on."""

import json
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sqlalchemy import select

from db import jobs, registry
from db.models import TestPrediction
from db.session import Database
from tests.support.datasets import many, rows_of
from training.config import TrainConfig, make_config
from training.data.dataset import Dataset, read_rows, split_rows
from training.errors import BadDataset
from training.jobs.run import run_next_job
from training.model.artifact import load_artifact
from worker.cli.training import job_output
from worker.connections import training_context
from worker.intake.request_queue import TRAIN, Request
from worker.intake.submit_job import accept_request, submit_training
from worker.settings import Settings

# As they stand in the guide.
THE_GUIDE_READS = """
max_length = 0
train_texts = []
train_labels = []

csv_counter = 0
with open('training_data.csv', 'r', encoding='utf-8') as csv_read:
    csv_reader = csv.reader(csv_read)
    for csv_read_row in csv_reader:
        csv_counter += 1
        if csv_counter > 1:
            train_texts.append(csv_read_row[1])
            train_labels.append(int(csv_read_row[0]))
            if len(csv_read_row[1]) > max_length:
                max_length = len(csv_read_row[1])

data = {'texts':train_texts, 'labels':train_labels}
new_df = pd.DataFrame(data)
"""
THE_GUIDE_SPLITS = """
sample_df=new_df.sample(frac=1,random_state=200)
train_dataset = sample_df.sample(frac=train_size,random_state=200)
test_df = sample_df.drop(train_dataset.index).reset_index(drop=True)
train_dataset = train_dataset.reset_index(drop=True)

valid_dataset = test_df.sample(frac=valid_size,random_state=200)
test_dataset = test_df.drop(valid_dataset.index).reset_index(drop=True)
valid_dataset = valid_dataset.reset_index(drop=True)
"""
Parts = dict[str, list[tuple[str, str]]]


def the_guides(lines: str, settings: dict[str, Any], **names: Any) -> Parts:
    """(label, text) of each row of each part, as the guide's lines leave them."""
    lines = lines.replace("random_state=200", f"random_state={settings.get('seed', 200)}")
    there = {"train_size": 0.8, "valid_size": 0.5, "pd": pd, **settings, **names}
    exec("import csv\n" + lines, there)
    frames = {part: there[f"{part}_dataset"] for part in ("train", "valid", "test")}
    return {part: [(str(label), text) for label, text in zip(f.labels, f.texts, strict=True)]
            for part, f in frames.items()}  # fmt: skip


def ours(path: Path, settings: dict[str, Any]) -> tuple[Parts, Dataset]:
    rows = read_rows(path)
    data = split_rows(rows, make_config("guide", split="guide", **settings))
    place = {number: i for i, number in enumerate(rows.row_numbers)}
    return {
        part: [(rows.labels[place[number]], rows.texts[place[number]]) for number in getattr(data, part).row_numbers]
        for part in ("train", "valid", "test")
    }, data


def labelled(count: int) -> list[tuple[str, str]]:
    """Rows with copies, retweets, blank texts, contradictions, and quotes and line ends within a text."""
    generator = random.Random(count)
    texts = ["嬉しい日", "RT @a: 嬉しい日", "嬉しい日 https://t.co/a", "", "　", 'は"い"\n改行', "NA", "nan", "1,5"]
    texts += [f"今日のこと{i}" for i in range(count)]
    return [(str(generator.randrange(2)), generator.choice(texts)) for _ in range(count)]


def csv_of(rows: list[tuple[str, str]], header: str, order: Callable[[str, str], str]) -> str:
    quoted = [(label, '"' + text.replace('"', '""') + '"') for label, text in rows]
    return "\n".join([header, *(order(*row) for row in quoted)]) + "\n"


SETTINGS: list[dict[str, Any]] = [
    {}, {"seed": 0}, {"seed": 7, "train_size": 0.7}, {"train_size": 0.55, "valid_size": 0.33}, {"valid_size": 0.71},
]  # fmt: skip


@pytest.mark.parametrize("count", [60, 211, 333, 2000])
@pytest.mark.parametrize("settings", SETTINGS)
def test_the_parts_hold_the_rows_that_the_guides_lines_draw(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], count: int
) -> None:
    path = tmp_path / "training_data.csv"
    path.write_text(csv_of(labelled(count), "感情,つぶやき", "{},{}".format), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    expected = the_guides(THE_GUIDE_READS + THE_GUIDE_SPLITS, settings)
    found, data = ours(path, settings)
    assert found == expected  # and in this order
    sizes = {part: len(rows) for part, rows in expected.items()}
    assert (data.report["sizes"], sum(sizes.values())) == (sizes, count)
    for part, rows in expected.items():
        assert [data.labels[k] for k in getattr(data, part).targets.argmax(axis=1)] == [label for label, _ in rows]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "parquet"])
def test_a_file_with_named_columns_is_cut_as_the_guide_would(
    tmp_path: Path, settings: dict[str, Any], ending: str
) -> None:
    rows, path = [({"0": "悪", "1": "良"}[label], text) for label, text in labelled(150)], tmp_path / f"a.{ending}"
    if ending == "parquet":
        pq.write_table(pa.table({"id": range(150), "text": [t for _, t in rows], "label": [k for k, _ in rows]}), path)
    elif ending == "jsonl":
        path.write_text("\n".join(json.dumps({"text": text, "label": label}) for label, text in rows))
    else:
        tab = "," if ending == "csv" else "\t"
        path.write_text(csv_of(rows, f"id{tab}Text{tab}label", lambda label, text: f"7{tab}{text}{tab}{label}"))
    frame = pd.DataFrame({"texts": [text for _, text in rows], "labels": [label for label, _ in rows]})
    assert ours(path, settings)[0] == the_guides(THE_GUIDE_SPLITS, settings, new_df=frame)


def test_the_report_says_how_many_texts_are_tested_after_training_on_them() -> None:
    originals = [*many("pos", 30), *many("neg", 30)]
    copies = [(label, f"RT @someone: {text}") for label, text in originals]
    rows = rows_of(*originals, *copies, ("pos", "negの文、その3"), ("neg", "　"))
    report = split_rows(rows, make_config("guide", split="guide")).report
    kept = ("split", "read", "rows", "duplicates", "blank", "conflicting", "conflicting_rows")
    assert {name: report[name] for name in kept} == {
        "split": "guide", "read": 122, "rows": 122, "duplicates": 61, "blank": 1, "conflicting": 1,
        "conflicting_rows": [35],
    }  # fmt: skip
    data = split_rows(rows, make_config("guide", split="guide"))
    trained = {text.removeprefix("RT : ") for text in data.train.texts}
    for part, split in (("valid", data.valid), ("test", data.test)):
        assert report["also_in_training"][part] == sum(text.removeprefix("RT : ") in trained for text in split.texts)
    assert 0 < report["also_in_training"]["test"] < report["sizes"]["test"]
    mended = split_rows(rows, make_config("guide")).report
    assert (mended["split"], mended["rows"], "also_in_training" in mended) == ("stratified", 59, False)


@pytest.mark.parametrize(
    ("labelled", "settings", "fragments"),
    [
        (many("pos", 3) + many("neg", 4), {}, ["split of 7 rows has no validation rows", "add rows"]),
        (many("pos", 500) + many("neg", 2), {}, ["none of the 2 rows of label 'neg'", "another seed", "--split guide"]),
        (many("pos", 20), {}, ["every row has the label pos", "at least two"]),
        (many("pos", 20), {"labels": {"pos": "pos", "neg": "neg"}}, ["'neg' has 0"]),
        ([("pos", " "), ("neg", "　")] * 40, {}, ["every training row is blank"]),
        ([*many("pos", 20), ("", "x")], {}, ["row 22 has no label"]),
    ],
)
def test_a_part_without_rows_or_without_a_label_is_refused_in_words(
    labelled: list[tuple[str, str]], settings: dict[str, Any], fragments: list[str]
) -> None:
    with pytest.raises(BadDataset) as refused:
        split_rows(rows_of(*labelled), make_config("guide", split="guide", **settings))
    assert "\n" not in str(refused.value)
    assert [fragment for fragment in fragments if fragment not in str(refused.value)] == []


def test_several_labels_a_row_are_cut_the_same_way() -> None:
    rows = rows_of(*[(("a|b", "b", "", "a")[i % 4], f"今日のこと{i % 30}") for i in range(60)])
    config = make_config("guide", split="guide", task="multi_label")
    data = split_rows(rows, config)
    single = split_rows(rows_of(*many("x", 59), ("y", "z")), make_config("guide", split="guide", task="multi_label"))
    for part in ("train", "valid", "test"):
        assert getattr(data, part).row_numbers == getattr(single, part).row_numbers


def test_only_a_job_that_asks_for_it_speaks_of_the_guides_split() -> None:
    """So that a trainer or scorer of a release before takes every other job and model."""
    assert "split" not in make_config("guide").model_dump(mode="json")
    chosen = make_config("guide", split="guide")
    assert TrainConfig(**json.loads(chosen.model_dump_json())) == chosen


def test_every_door_takes_the_guides_split(
    tweetscore: Any, settings: Settings, sqlite: Database, labelled_csv: Path
) -> None:
    said = tweetscore("train", str(labelled_csv), "--split", "guide", "--seed", "1", "--json")
    assert said.returncode == 0, said.stderr
    assert json.loads(said.stdout)["config"]["split"] == "guide"
    settings = settings.model_copy(update={"read_roots": (labelled_csv.parent,)})
    asked = Request("message", TRAIN, [str(labelled_csv)], {"split": "guide", "seed": 1}, None, "{}")
    job = accept_request(settings, sqlite, asked)
    assert job.config["split"] == "guide"


def test_a_model_of_the_guides_split_is_trained_measured_and_described(
    settings: Settings, sqlite: Database, tiny_encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [(str(i % 2), f"{('悲しい', '嬉しい')[i % 2]}日だった{i % 25}") for i in range(120)]
    rows += [("0", "嬉しい日だった1"), ("1", "悲しい日だった0"), ("1", "　"), ("0", "")]
    path = tmp_path / "training_data.csv"
    path.write_text(csv_of(rows, "label,tweet", "{},{}".format), encoding="utf-8")
    wanted = {"base_model": str(tiny_encoder), "epochs": 1, "split": "guide"}
    job_id = submit_training(settings, sqlite, path, "fast", **wanted).id
    run_next_job(sqlite, training_context(settings), "here", threading.Event())
    with sqlite.read() as session:
        job, version = jobs.get(session, job_id), registry.of_job(session, job_id)
        assert (job.state, job.error) == ("succeeded", None)
        assert version is not None
        assert job.data_report is not None
        tested = session.scalars(select(TestPrediction)).all()
        figures = registry.metrics(session, version.id)
    expected, data = ours(path, {})
    assert sorted(row.row_number for row in tested) == sorted(data.test.row_numbers)
    assert sorted(row.actual for row in tested) == sorted(label for label, _ in expected["test"])
    assert figures["f1_macro_low", ""] <= figures["f1_macro", ""] <= figures["f1_macro_high", ""]
    leaked = job.data_report["also_in_training"]
    assert leaked["test"] > 0
    folder = Path(version.artifact_url.removeprefix("file://"))
    reference = load_artifact(folder, version.sha256).reference
    assert reference is not None
    assert len(reference.rows) == len(data.valid)  # what faster engines are held against
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "The split is the guide's: all 124 rows, sampled by pandas with seed 200" in card
    assert f"{leaked['test']:,} test rows have a text that is also a training row" in card
    assert "no text is in two parts" not in card
    job_output.job_summary(sqlite, job)
    said = " ".join(capsys.readouterr().out.split())
    assert "kept as in the guide" in said
    assert f"{leaked['test']} test rows have a text that is also in the training rows" in said
