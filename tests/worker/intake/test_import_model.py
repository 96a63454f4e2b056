"""`tweetscore models import` and `models evaluate`: from a folder to scored tweets and stored figures."""

import json
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from sqlalchemy import func, select
from transformers import AutoModelForSequenceClassification

import worker
from db import registry
from db.errors import NotFound
from db.models import Evaluation, EvaluationMetric, ModelVersion, Prediction
from db.session import Database
from tests.support.bench import Bench, wire
from tests.support.classifiers import save_bert, save_roberta
from tests.support.job_rows import submit
from tests.support.rows import answer, make_version
from training.errors import BadConfig, BadDataset, ModelUnavailable
from training.evaluation.metrics import metrics
from training.loop.reference import sample_reference
from training.model import base_model
from training.model.artifact import load_artifact
from training.model.base_model import STARTER_FOLDER, BaseModelFolder
from training.model.imported import ImportOptions
from training.store.paths import file_sha256
from training.text.cleaning import clean
from training.text.tokenizer import encode
from worker.engines.engine_selection import select_engine
from worker.engines.engines import EngineBuilder
from worker.intake.evaluate_model import evaluate_model
from worker.intake.import_model import find_source, import_model
from worker.settings import Settings

Run = Callable[..., subprocess.CompletedProcess[str]]
CPU = torch.device("cpu")
NAMES = {"LABEL_0": "negative", "LABEL_1": "neutral", "LABEL_2": "positive"}
MAPPED = ",".join(f"{own}={name}" for own, name in NAMES.items())


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bert(tmp_path_factory.mktemp("bert") / "bert", num_labels=3, ipadic_named=False)


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("many") / "many"
    return save_bert(folder, num_labels=3, problem_type="multi_label_classification")


@pytest.fixture(scope="module")
def roberta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_roberta(tmp_path_factory.mktemp("roberta") / "roberta")


def imported(settings: Settings, database: Database, folder: Path, **options: object) -> ModelVersion:
    version, _ = import_model(settings, database, str(folder), None, ImportOptions(**options))  # type: ignore[arg-type]
    return version


def folder_of(version: ModelVersion) -> Path:
    return Path(version.artifact_url.removeprefix("file://"))


def labelled(path: Path, *rows: tuple[str, str]) -> Path:
    path.write_text("label,text\n" + "".join(f"{label},{text}\n" for label, text in rows), encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def _few_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """An import runs 50 texts of the sample, not all of them; the same code in less time."""
    monkeypatch.setattr("worker.intake.import_model.sample_reference", partial(sample_reference, limit=50))


# --- import


@pytest.mark.parametrize("kind", ["bert", "many", "roberta"])
def test_an_imported_model_scores_the_stream_as_plain_transformers_do(
    lite: Bench, settings: Settings, request: pytest.FixtureRequest, kind: str
) -> None:
    source = request.getfixturevalue(kind)
    version = imported(settings, lite.database, source, labels=None if kind == "roberta" else NAMES)
    with lite.database.begin() as session:
        assert version.job_id is None
        registry.assign(session, registry.CHAMPION, version.id)
    texts = ["今日は最高！！！！ #猫", "電車が遅れて最悪", "@someone ただの報告です https://example.com"]
    lite.stream.publish([wire(i, text) for i, text in enumerate(texts)])
    assert lite.worker().drain() == len(texts)
    artifact = load_artifact(folder_of(version), version.sha256)
    plain = AutoModelForSequenceClassification.from_pretrained(source).eval()
    rows = {row["tweet_id"]: row for row in lite.rows(Prediction)}
    for i, text in enumerate(texts):
        ids = encode(artifact.tokenizer, [clean(text)], artifact.spec.config.max_length)
        with torch.inference_mode():
            logits = plain(input_ids=torch.tensor(ids)).logits[0]
        expected = logits.sigmoid() if kind == "many" else logits.softmax(0)
        assert list(rows[str(i)]["probabilities"]) == version.labels
        assert list(rows[str(i)]["probabilities"].values()) == pytest.approx(expected.tolist(), abs=1e-4)
        assert rows[str(i)]["score_signed"] is not None


def test_its_sample_texts_verify_other_engines(sqlite: Database, settings: Settings, roberta: Path) -> None:
    version = imported(settings, sqlite, roberta)
    artifact = load_artifact(folder_of(version), version.sha256)
    assert artifact.reference is not None
    assert len(artifact.reference.rows) == 50
    _, choice = select_engine(EngineBuilder(artifact.model, CPU), artifact, CPU, "torch-float32")
    assert choice.trials[0].agreement == 1
    assert choice.trials[0].mean_difference == pytest.approx(0, abs=1e-5)


def test_a_refused_import_leaves_nothing(sqlite: Database, settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name, match in (
        (str(tmp_path / "nothing"), "there is no folder .*nothing; name a folder, or a hub model"),
        ("s3://bucket/model", "there is no folder s3://bucket/model"),
        (str(tmp_path / "empty"), "has no config.json"),
        ("../../owner/model", "there is no folder"),
        ("owner/model/more", "is not a hub name"),
        ("starter", "model starter has no trained classifier"),
        (str(STARTER_FOLDER), "has no trained classifier"),
    ):
        with pytest.raises(ModelUnavailable, match=match):
            import_model(settings, sqlite, name)
    with pytest.raises(BadConfig, match=r"--revision is 'abc', but .* is a folder"):
        import_model(settings, sqlite, str(STARTER_FOLDER), "abc")
    assert answer(sqlite, "SELECT count(*) FROM model_versions") == [(0,)]
    assert not (settings.home / "models").exists()


def test_an_artifact_is_removed_when_its_row_cannot_be_stored(
    sqlite: Database, settings: Settings, roberta: Path
) -> None:
    def refuse() -> None:
        raise BadConfig("no row today")

    sqlite.guard = lambda _: refuse()
    with pytest.raises(BadConfig, match="no row today"):
        imported(settings, sqlite, roberta)
    assert list((settings.home / "models").iterdir()) == []


def test_a_hub_name_is_taken_at_the_revision_given_or_used_before(
    sqlite: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch, roberta: Path
) -> None:
    asked: list[tuple[str, str | None]] = []

    def fetch(name: str, revision: str | None) -> BaseModelFolder:
        asked.append((name, revision))
        return BaseModelFolder(name, roberta, revision or "2" * 40)

    monkeypatch.setattr(base_model, "_fetch", fetch)
    assert find_source(sqlite, "owner/model", None).revision == "2" * 40
    version, spec = import_model(settings, sqlite, "owner/model", "1" * 40)
    assert (version.base_model, version.base_revision) == ("owner/model", "1" * 40)
    assert (spec.base_model, spec.base_revision) == ("owner/model", "1" * 40)
    find_source(sqlite, "owner/model", None)
    assert asked == [("owner/model", None), ("owner/model", "1" * 40), ("owner/model", "1" * 40)]


def test_a_failed_download_names_the_model_and_the_way_out(
    sqlite: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_: object, **__: object) -> str:
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr(base_model, "snapshot_download", unreachable)
    with pytest.raises(ModelUnavailable, match=r"'owner/model' could not be downloaded .*or name a folder"):
        import_model(settings, sqlite, "owner/model")


# --- evaluate


def test_an_evaluation_stores_the_figures_of_a_jobs_test_rows_and_replaces_those_of_the_same_file(
    database: Database, settings: Settings, bert: Path, tmp_path: Path
) -> None:
    version = imported(settings, database, bert, labels=NAMES)
    rows = [(list(NAMES.values())[i % 3], f"今日の報告その{'あいうえおかきくけこ'[i % 10]}{i}") for i in range(40)]
    file = labelled(
        tmp_path / "held-out.csv", *rows, rows[0], ("negative", "同じ文"), ("positive", "同じ文"), ("neutral", " ")
    )
    done = [evaluate_model(settings, database, version.id, str(file)) for _ in range(2)][1]
    counts = {name: done.report[name] for name in ("read", "rows", "duplicates", "conflicting", "blank")}
    assert counts == {"read": 44, "rows": 40, "duplicates": 2, "conflicting": 1, "blank": 1}
    artifact = load_artifact(folder_of(version))
    with torch.inference_mode():
        ids = encode(artifact.tokenizer, [clean(text) for _, text in rows], 200)
        logits = torch.cat([artifact.model(torch.tensor([row]), torch.ones(1, len(row))) for row in ids])
    targets = np.eye(3, dtype=np.float32)[[i % 3 for i in range(40)]]
    expected = metrics(targets, logits.softmax(1).numpy(), version.labels, "single_label")
    with database.read() as session:
        [(evaluation, figures)] = registry.evaluations(session, version.id)
        assert session.scalar(select(func.count()).select_from(EvaluationMetric)) == len(figures)
    assert (evaluation.dataset, evaluation.rows) == ("held-out.csv", 40)
    assert evaluation.dataset_sha256 == file_sha256(file)
    assert {key: figures[key] for key in expected} == pytest.approx(expected)
    low, high = figures["f1_macro_low", ""], figures["f1_macro_high", ""]
    assert low <= figures["f1_macro", ""] <= high
    assert low < high
    sql = "SELECT dataset, rows, f1_macro, f1_macro_low, accuracy, ece FROM v_model_evaluations"
    whole = tuple(figures[name, ""] for name in ("f1_macro", "f1_macro_low", "accuracy", "ece"))
    assert answer(database, sql) == [("held-out.csv", 40, *map(pytest.approx, whole))]
    assert answer(database, "SELECT f1_macro FROM v_model_leaderboard") == [(None,)]


def test_labels_of_the_file_are_mapped_and_unknown_ones_refused(
    sqlite: Database, settings: Settings, bert: Path, tmp_path: Path
) -> None:
    version = imported(settings, sqlite, bert, labels=NAMES)
    file = labelled(tmp_path / "rows.csv", ("0", "悲しい"), ("2", "嬉しい"), ("LABEL_1", "報告"), ("neutral", "雨"))
    with pytest.raises(BadDataset, match=r"label '0' in row 2 is none of negative, .*name it in --labels"):
        evaluate_model(settings, sqlite, version.id, str(file))
    with pytest.raises(BadConfig, match="--labels maps to good; the model's labels are negative, neutral, positive"):
        evaluate_model(settings, sqlite, version.id, str(file), {"0": "good"})
    done = evaluate_model(settings, sqlite, version.id, str(file), {"0": "negative", "2": "positive"})
    assert done.report["labels"] == {"negative": 1, "neutral": 2, "positive": 1}
    few = labelled(tmp_path / "few.csv", ("negative", "悲しい"))
    assert evaluate_model(settings, sqlite, version.id, str(few)).notes == [
        "no row has the label neutral, positive; its F1 counts as 0 in macro-F1"
    ]
    empty = labelled(tmp_path / "blank.csv", ("negative", " "))
    with pytest.raises(BadDataset, match="none of the 1 rows can be scored"):
        evaluate_model(settings, sqlite, version.id, str(empty))
    with pytest.raises(NotFound, match="there is no model 99"):
        evaluate_model(settings, sqlite, 99, str(few))


def test_rows_of_several_labels_are_measured_by_label(
    sqlite: Database, settings: Settings, many: Path, tmp_path: Path
) -> None:
    version = imported(settings, sqlite, many, labels=NAMES)
    file = labelled(tmp_path / "rows.csv", ("negative|neutral", "悲しい"), ("positive", "嬉しい"), ("", "雨が降った"))
    done = evaluate_model(settings, sqlite, version.id, str(file))
    assert done.report["labels"] == {"negative": 1, "neutral": 1, "positive": 1}
    assert done.figures["support", "neutral"] == 1


def test_a_trained_model_is_measured_on_another_file_and_on_its_own_with_a_note(
    sqlite: Database, settings: Settings, bert: Path, tmp_path: Path
) -> None:
    version = imported(settings, sqlite, bert, labels=NAMES)
    file = labelled(tmp_path / "own.csv", *((name, f"文{name}") for name in NAMES.values()))
    job = submit(sqlite, dataset_sha256=file_sha256(file))
    with sqlite.begin() as session:
        registry.get(session, version.id).job_id = job  # as if the job had trained it
    [note] = evaluate_model(settings, sqlite, version.id, str(file)).notes
    assert "trained on rows of this file" in note
    other = labelled(tmp_path / "other.csv", *((name, f"他の{name}") for name in NAMES.values()))
    assert evaluate_model(settings, sqlite, version.id, str(other)).notes == []
    with sqlite.read() as session:
        assert [e.dataset for e, _ in registry.evaluations(session, version.id)] == ["own.csv", "other.csv"]


def test_a_model_that_was_deleted_is_not_evaluated_and_keeps_its_evaluations(sqlite: Database) -> None:
    version = make_version(sqlite)

    def evaluate(sha256: str) -> None:
        row = Evaluation(model_version_id=version, dataset="a.csv", dataset_sha256=sha256, rows=1)
        with sqlite.begin() as session:
            registry.add_evaluation(session, row, [{"metric": "accuracy", "label": "", "value": 1.0}])

    evaluate("1")
    with sqlite.begin() as session:
        registry.mark_deleted(session, version, predictions=True)
    with pytest.raises(NotFound, match="was deleted"):
        evaluate("2")
    assert answer(sqlite, "SELECT accuracy FROM v_model_evaluations") == [(1.0,)]


# --- the commands


def test_the_commands_say_that_there_are_no_test_figures_until_there_are_some(
    home_database: Database, tweetscore: Run, bert: Path, tmp_path: Path
) -> None:
    first = tweetscore("models", "import", str(bert), "--labels", MAPPED)
    assert first.returncode == 0, first.stderr
    assert "model 1 imported from" in first.stdout
    assert "no test figures" in first.stdout
    assert "tweetscore models promote 1" in first.stdout
    assert "score_signed" not in first.stdout
    second = json.loads(tweetscore("models", "import", str(bert), "--cleaner", "1", "--json").stdout)
    assert (second["id"], second["job_id"], second["cleaner_version"], second["polarity"]) == (2, None, "1", None)
    assert "score_signed stays empty" in tweetscore("models", "import", str(bert)).stdout
    for arguments in (["list"], ["show", "1"], ["compare", "1", "2"]):
        assert "no test figures" in tweetscore("models", *arguments).stdout
    file = labelled(tmp_path / "own.csv", *((name, f"文{name}") for name in NAMES.values()))
    evaluated = tweetscore("models", "evaluate", "1", str(file))
    assert evaluated.returncode == 0, evaluated.stderr
    assert "own.csv, 3 rows: model 1" in evaluated.stdout
    assert "95 %" in evaluated.stdout
    written = json.loads(tweetscore("models", "evaluate", "2", str(file), "--labels", _to_own(), "--json").stdout)
    assert (written["dataset"], written["rows"], written["data"]["read"]) == ("own.csv", 3, 3)
    figures = {row["metric"]: row["value"] for row in written["metrics"] if not row["label"]}
    interval = f"{figures['f1_macro']:.3f} ({figures['f1_macro_low']:.3f} to {figures['f1_macro_high']:.3f})"
    for arguments in (["list"], ["compare", "1", "2"]):
        assert interval in tweetscore("models", *arguments).stdout
    shown = tweetscore("models", "show", "2").stdout
    assert "own.csv, 3 rows" in shown
    assert "no test figures" in shown
    listed = json.loads(tweetscore("models", "list", "--json").stdout)
    assert [(row["f1_macro"], len(row["evaluations"])) for row in listed] == [(None, 0), (None, 1), (None, 1)]


def _to_own() -> str:
    return ",".join(f"{name}={own}" for own, name in NAMES.items())


def test_a_mistake_is_one_sentence(home_database: Database, tweetscore: Run, bert: Path) -> None:
    for arguments, match in (
        (["import", str(bert), "--labels", "LABEL_0=negative"], "--labels leaves out LABEL_1, LABEL_2"),
        (["import", str(bert) + "x"], "there is no folder"),
        (["evaluate", "1", "nothing.csv"], "there is no model 1"),
    ):
        ended = tweetscore("models", *arguments)
        assert ended.returncode == 2
        assert match in ended.stderr
        assert "Traceback" not in ended.stderr


def test_python_imports_and_evaluates(home_database: Database, roberta: Path, tmp_path: Path) -> None:
    version = worker.import_model(str(roberta), labels={"NEGATIVE": "negative", "POSITIVE": "positive"})
    file = labelled(tmp_path / "rows.csv", ("negative", "悲しい"), ("1", "嬉しい"))
    found = worker.evaluate_model(version, str(file), labels={"1": "positive"})
    assert found["accuracy"] in (0, 0.5, 1)
    assert answer(home_database, "SELECT accuracy FROM v_model_evaluations") == [(found["accuracy"],)]
