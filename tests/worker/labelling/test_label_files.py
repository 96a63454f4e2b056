"""Labels from and for Label Studio, doccano and spreadsheets, in the forms that those tools write."""

import csv
import json
import subprocess
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from db import jobs
from db.labelling import labels
from db.models import Tweet
from db.session import Database
from tests.db.labelling.test_labels import give, label_row
from tests.support.rows import NOON, assign, make_version, prediction_row, tweet_row, write
from worker.errors import BadLabels, BadRequest
from worker.labelling.export_labels import export_labels
from worker.labelling.import_labels import import_labels

Run = Callable[..., subprocess.CompletedProcess[str]]


def stored(database: Database) -> list[tuple[str, str, str, str]]:
    """(tweet, annotator, label, source) of every label, in order of time."""
    with database.read() as session:
        rows = labels.known(session, [str(number) for number in range(10)])
        return [(row.tweet_id, row.annotator, row.label, row.source) for row in rows]


def tweets(database: Database, count: int, champion: bool = False, task: str = "single_label", **values: object) -> int:
    with database.begin() as session:  # the job of the champion tells its task
        job = jobs.submit(session, request_id="1", dataset="a.csv", dataset_sha256=None, config={"task": task}).id
    version = make_version(database, job_id=job)
    write(
        database,
        [tweet_row(str(i), received_at=NOON + timedelta(minutes=i), **values) for i in range(1, count + 1)],
        [prediction_row(str(i), version) for i in range(1, count + 1)] if champion else [],
    )
    if champion:
        assign(database, version)
    return version


def saved(path: Path, content: object) -> str:
    path.write_text(content if isinstance(content, str) else json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return str(path)


def annotation(label: str, person: object = 3, **more: object) -> dict[str, Any]:
    """As Label Studio 1.x exports it."""
    result = {
        "id": "Dx_aB91ISN", "from_name": "sentiment", "to_name": "text", "type": "choices", "origin": "manual",
        "value": {"choices": [label]},
    }  # fmt: skip
    return {
        "id": 8, "completed_by": person, "result": [result], "was_cancelled": False, "ground_truth": False,
        "created_at": "2026-02-01T09:00:00.513742Z", "updated_at": "2026-02-01T09:05:00.513742Z", "lead_time": 4.2,
        "prediction": {}, "result_count": 1, "import_id": None, "task": 1, "project": 1, **more,
    }  # fmt: skip


def task(tweet_id: str, *annotations: dict[str, Any], **data: object) -> dict[str, Any]:
    proposal = {"model_version": "tweetscore-1", "score": 0.9, "result": annotation("negative")["result"]}
    return {
        "id": 77, "annotations": list(annotations), "predictions": [proposal], "file_upload": "a.json", "drafts": [],
        "data": {"text": "文", "tweet_id": tweet_id, **data}, "meta": {}, "project": 1,
    }  # fmt: skip


def test_label_studio_annotations_are_imported_once_and_its_predictions_never(
    database: Database, tmp_path: Path
) -> None:
    tweets(database, 2, champion=True)
    by_mail = annotation("negative", {"id": 4, "email": "b@example.jp", "first_name": "B"})
    exported = [
        task("1", annotation("positive"), by_mail),
        task("2", annotation("positive", was_cancelled=True)),
        task("3", annotation("positive"), text="新しいツイート", topic="映画", lang="ja"),
        task("4"),
        task("5", annotation("positive"), text=""),
    ]
    file = saved(tmp_path / "project-1.json", exported)
    report = import_labels(database, file)
    assert (report.added, report.skipped, report.unlabelled, report.stored_tweets) == (3, 1, 1, 1)
    assert (report.missing, report.missing_ids) == (1, ["5"])
    expected = {
        ("1", "3", "positive", "import"), ("1", "b@example.jp", "negative", "import"), ("3", "3", "positive", "import")
    }  # fmt: skip
    assert set(stored(database)) == expected
    with database.read() as session:
        tweet = session.get_one(Tweet, "3")
        assert (tweet.text, tweet.topic, tweet.lang) == ("新しいツイート", "映画", "ja")
        assert {label.at.minute for label in labels.of_tweets(session, ["1", "3"])} == {5}  # of the last change
    again = import_labels(database, file)
    assert (again.added, again.known, again.stored_tweets) == (0, 3, 0)
    assert set(stored(database)) == expected


FLAT = {
    # Label Studio's JSON_MIN and CSV: `id` is that of the task
    "min.json": [
        {
            "text": "文", "tweet_id": "1", "topic": None, "id": 9, "sentiment": "positive", "annotator": 1,
            "annotation_id": 5, "created_at": "2026-02-01T09:00:00Z", "updated_at": "2026-02-01T09:05:00Z",
            "lead_time": 1.5,
        },
        {
            "text": "文", "tweet_id": "2", "id": 10, "annotator": 1, "annotation_id": 6,
            "created_at": "2026-02-01T09:00:00Z", "updated_at": "2026-02-01T09:05:00Z", "lead_time": 1.5,
        },
    ],
    "label-studio.csv": "text,tweet_id,topic,id,sentiment,annotator,annotation_id,created_at,updated_at,lead_time\n"
    "文,1,,9,positive,1,5,2026-02-01T09:00:00Z,2026-02-01T09:05:00Z,1.5\n",
    # doccano: `id` is that of its row; the fields of the imported file are beside it
    "all.jsonl": '{"id":31,"text":"文","tweet_id":"1","topic":null,"label":["positive"],"Comments":[]}\n'
    '{"id":32,"text":"文","tweet_id":"2","label":[],"Comments":[]}\n',
    "text.jsonl": '{"id": "1", "labels": "positive"}\n',
    # Excel: a byte-order mark and CR LF
    "excel.csv": "\ufefftweet_id,label,annotator,at,text\r\n1,positive,1,2026-02-01T09:05:00Z,文\r\n2,,,,文\r\n",
    "japanese.tsv": "id\tラベル\n1\tpositive\n",
}  # fmt: skip


@pytest.mark.parametrize("name", FLAT)
def test_flat_files_are_imported_once(sqlite: Database, tmp_path: Path, name: str) -> None:
    tweets(sqlite, 2, champion=True)
    file = saved(tmp_path / name, FLAT[name])
    assert import_labels(sqlite, file, annotator="1").added == 1
    assert stored(sqlite) == [("1", "1", "positive", "import")]
    assert import_labels(sqlite, file, annotator="1").added == 0
    assert stored(sqlite) == [("1", "1", "positive", "import")]


def test_several_labels_of_a_tweet_are_stored_in_the_order_of_the_model(sqlite: Database, tmp_path: Path) -> None:
    tweets(sqlite, 4, champion=True, task="multi_label")
    both = annotation("positive")
    both["result"][0]["value"]["choices"].append("negative")
    import_labels(sqlite, saved(tmp_path / "a.json", [task("1", both)]))
    import_labels(sqlite, saved(tmp_path / "a.jsonl", '{"tweet_id": "2", "label": ["positive", "negative"]}\n'))
    sheet = '2,"{""choices"": [""positive"", ""negative""]}"\n3,positive|negative\n4,positive\n'
    import_labels(sqlite, saved(tmp_path / "a.csv", f"tweet_id,sentiment\n{sheet}"))
    assert [row[2] for row in stored(sqlite)] == [*["negative|positive"] * 3, "positive"]


def test_proposed_labels_are_kept_apart_from_those_of_people(database: Database, tmp_path: Path) -> None:
    tweets(database, 1)
    give(database, label_row("1", "positive", annotator="a"))
    file = saved(tmp_path / "llm.jsonl", '{"tweet_id": "1", "label": "negative", "annotator": "a"}\n')
    assert import_labels(database, file, proposed=True).added == 1
    assert stored(database)[-1] == ("1", "a", "negative", "model")
    with database.read() as session:
        assert [row.label for row in labels.labelled(session)] == ["positive"]
        assert [row.label for row in labels.proposed(session)] == ["negative"]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.csv", "tweet_id,label\n1,positive\n2,poz\n", r"row 3 of a\.csv: label 'poz' is none of negative, positive"),
        ("a.csv", "tweet_id,label\n1,negative|positive\n", "a tweet has one of them; keep one"),
        ("a.csv", "tweet_id,label,at\n1,positive,昨日\n", "'昨日' cannot be read; write it as 2026"),
        ("a.csv", "tweet_id,label\n1.46E+18,positive\n", "a spreadsheet rounded the tweet id"),
        ("a.csv", "text,label\n文,positive\n", "it has no tweet id; name the field"),
        ("a.jsonl", '{"tweet_id": "1", "label": "positive"}\n{broken\n', "row 2 of a.jsonl: the line is not JSON"),
        ("a.jsonl", '{"tweet_id": "1", "label": [[0, 2, "ORG"]]}\n', "not the name of a label"),
        # doccano's own number of the row is not the id of a tweet
        ("a.jsonl", '{"id": 1, "text": "別の文", "label": ["positive"]}\n', "tweet 1 of row 1 is stored with another"),
        ("a.json", [task("1", annotation("positive") | {"result": [
            {"from_name": one, "type": "choices", "value": {"choices": ["positive"]}} for one in ("mood", "style")
        ]})], 'name the control of the labels "sentiment"'),
    ],
)  # fmt: skip
def test_a_row_that_cannot_be_right_is_refused_before_anything_is_stored(
    sqlite: Database, tmp_path: Path, name: str, content: object, sentence: str
) -> None:
    tweets(sqlite, 2, champion=True)
    with pytest.raises(BadLabels, match=sentence) as refused:
        import_labels(sqlite, saved(tmp_path / name, content))
    assert str(refused.value).endswith("nothing was imported")
    assert stored(sqlite) == []


def test_an_exported_label_that_comes_back_unchanged_is_known(database: Database, tmp_path: Path) -> None:
    version = tweets(database, 3, champion=True, topic="映画")
    give(
        database,
        label_row("1", "positive", "a", minute=1),
        label_row("1", "negative", "b", minute=2),
        label_row("2", "negative", "model", source="model"),
    )
    before = stored(database)
    for name in ("tasks.json", "rows.jsonl", "sheet.csv"):
        assert export_labels(database, str(tmp_path / name)) == 3
        report = import_labels(database, str(tmp_path / name), annotator="c")
        assert (report.added, report.stored_tweets) == (0, 0)
    assert stored(database) == before

    newest, _, oldest = json.loads((tmp_path / "tasks.json").read_text(encoding="utf-8"))
    assert newest["data"] == {"text": "今日は嬉しい3", "tweet_id": "3", "topic": "映画"}
    choice = {"from_name": "sentiment", "to_name": "text", "type": "choices", "value": {"choices": ["positive"]}}
    assert newest["predictions"] == [{"model_version": f"tweetscore-{version}", "score": 0.75, "result": [choice]}]
    assert (newest["annotations"], oldest["annotations"][0]["result"]) == ([], [choice])
    # Label Studio keeps the id as import_id, and gives the annotation to the user who imported the file.
    for one in oldest["annotations"]:
        one["import_id"], one["id"], one["completed_by"], one["updated_at"] = one["id"], 99, 1, "2026-03-01T00:00:00Z"
    oldest["annotations"][1]["result"][0]["value"]["choices"] = ["positive"]  # and that user corrects the second
    assert import_labels(database, saved(tmp_path / "back.json", [oldest])).added == 1
    assert stored(database) == [*before, ("1", "1", "positive", "import")]

    lines = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(line["tweet_id"], line["label"], line["predicted"]) for line in lines] == [
        ("3", [], "positive"), ("2", [], "positive"), ("1", ["negative"], "positive")
    ]  # fmt: skip
    lines[2]["label"] = ["positive"]
    saved(tmp_path / "rows.jsonl", "\n".join(map(json.dumps, lines)))
    assert import_labels(database, str(tmp_path / "rows.jsonl"), annotator="c").added == 1
    assert stored(database)[-1] == ("1", "c", "positive", "import")


def test_a_spreadsheet_gets_text_and_no_formulas_and_gives_the_text_back(sqlite: Database, tmp_path: Path) -> None:
    tweets(sqlite, 1, text="=1+1だよ😀")
    place = tmp_path / "sheet.csv"
    export_labels(sqlite, str(place))
    assert place.read_bytes().startswith(b"\xef\xbb\xbf")
    with place.open(encoding="utf-8-sig", newline="") as file:
        (row,) = csv.DictReader(file)
    assert row == {
        "tweet_id": "1", "text": "'=1+1だよ😀", "label": "", "annotator": "", "predicted": "", "probability": ""
    }  # fmt: skip
    saved(place, "\ufefftweet_id,text,label\n2,'=1+1だよ😀,'-1\n")
    assert import_labels(sqlite, str(place)).stored_tweets == 1
    assert stored(sqlite) == [("2", "import", "-1", "import")]
    with sqlite.read() as session:
        assert session.get_one(Tweet, "2").text == "=1+1だよ😀"


def test_exports_can_be_limited_and_hold_only_what_is_asked_for(database: Database, tmp_path: Path) -> None:
    tweets(database, 4, topic="映画")
    write(database, [tweet_row("5", topic="雨")], [])
    give(database, label_row("2", "positive"), label_row("3", "positive", source="model"))

    def exported(**options: Any) -> list[str]:
        export_labels(database, str(tmp_path / "a.jsonl"), **options)
        lines = (tmp_path / "a.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line)["tweet_id"] for line in lines]

    assert exported(topic="映画", limit=2) == ["4", "3"]
    assert exported(has_label=False, topic="映画") == ["4", "3", "1"]
    assert exported(has_label=True) == ["2"]
    assert exported(since=NOON + timedelta(minutes=3)) == ["4", "3"]
    assert [path.name for path in tmp_path.glob("*a.jsonl*")] == ["a.jsonl"]
    export_labels(database, str(tmp_path / "a.json"), topic="none")
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == []
    with pytest.raises(BadRequest, match="name another file"):
        export_labels(database, str(tmp_path / "missing" / "a.json"))


def test_labels_go_out_and_come_in_on_the_command_line(
    tweetscore: Run, home_database: Database, tmp_path: Path
) -> None:
    tweets(home_database, 2, champion=True)
    sheet = tmp_path / "sheet.csv"
    out = tweetscore("label", "export", str(sheet), "--unlabelled")
    assert (out.returncode, "exported 2 tweets" in out.stderr) == (0, True)
    filled = sheet.read_text(encoding="utf-8-sig").replace(",,,positive,", ",positive,,positive,")
    sheet.write_text(filled + "9,,positive,,,\n", encoding="utf-8")
    came = tweetscore("label", "import", str(sheet), "--annotator", "花子")
    assert came.returncode == 1
    assert "2 labels added, 0 known already" in came.stdout
    assert "1 tweets are not stored, and their rows have no text: 9;" in came.stderr
    counted = json.loads(tweetscore("label", "status", "--json").stdout)
    given = {"source": "import", "annotator": "花子", "label": "positive", "labels": 2}
    assert counted == {"tweets": 2, "labels": [given]}
    assert "花子" in tweetscore("label", "status").stdout
    refused = tweetscore("label", "import", str(sheet), "--format", "xls")
    assert (refused.returncode, "use label-studio, doccano, csv" in refused.stderr) == (2, True)
