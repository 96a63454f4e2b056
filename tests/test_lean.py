"""An install without the extras and without the CPU engines: what it can do, and what it says of the rest."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from training.errors import ModelUnavailable
from training.model import base_model
from training.model.base_model import STARTER_FOLDER, resolve_base_model
from training.text.tokenizer import load_tokenizer, mecab_dictionary
from worker.intake.submit_job import prepare_base_model
from worker.settings import Settings

BLOCKED = (
    *("openvino", "unidic_lite", "streamlit", "s3fs", "flower"),
    *("cleanlab", "optuna"),
)
BLOCK = f"import sys\nfor name in {BLOCKED!r}:\n    sys.modules[name] = None\n"
UNIDIC_LINE = "pip install 'tweetscore[unidic-lite]'"
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def lean(tweetscore_process: Run, tmp_path: Path) -> Run:
    """The command where the packages cannot be imported, by it and by the workers that it starts."""
    folder = tmp_path / "blocked"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(BLOCK, encoding="utf-8")
    paths = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    return lambda *arguments, **options: tweetscore_process(*arguments, PYTHONPATH=paths, **options)


def unidic_encoder(folder: Path) -> Path:
    """The starter with the dictionary of the newer Tohoku models."""
    shutil.copytree(STARTER_FOLDER, folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {"mecab_kwargs": {"mecab_dic": "unidic_lite"}}
    path.write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.mark.slow
def test_a_model_is_trained_and_scores_on_plain_torch(
    lean: Run, labelled_csv: Path, tiny_encoder: Path, tmp_path: Path
) -> None:
    trained = lean(
        "train", str(labelled_csv), "--preset", "fast", "--base-model", str(tiny_encoder), "--epochs", "1", "--wait"
    )
    assert trained.returncode == 0, trained.stdout + trained.stderr
    assert lean("models", "promote", "1").returncode == 0
    tweets = tmp_path / "tweets.jsonl"
    tweets.write_text('{"id": "1", "text": "とても嬉しい"}\n', encoding="utf-8")
    scored = lean("score", str(tweets), "--json", TWEETSCORE_ENGINE="auto")
    assert scored.returncode == 0, scored.stderr
    assert json.loads(scored.stdout)["label"] in ("positive", "negative")
    examined = {check["name"]: check for check in json.loads(lean("doctor", "--json").stdout)}
    assert examined["engines"]["ok"]
    assert "`pip install openvino`" in examined["engines"]["finding"]
    assert examined["champion"]["ok"]


def test_a_base_model_that_needs_unidic_lite_is_refused_at_submission(
    tweetscore: Run, labelled_csv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "unidic_lite", None)
    refused = tweetscore("train", str(labelled_csv), "--base-model", str(unidic_encoder(tmp_path / "encoder")))
    assert (refused.returncode, UNIDIC_LINE in refused.stderr, len(refused.stderr.splitlines())) == (2, True, 1)
    assert json.loads(tweetscore("jobs", "list", "--json").stdout) == []


@pytest.mark.parametrize("name", ["cl-tohoku/bert-base-japanese-v2", "tohoku-nlp/bert-large-japanese-v2"])
def test_a_hub_model_that_needs_unidic_lite_is_refused_before_it_is_fetched(
    name: str, monkeypatch: pytest.MonkeyPatch, settings: Settings
) -> None:
    monkeypatch.setattr(base_model, "snapshot_download", lambda *_, **__: pytest.fail("it was fetched"))
    monkeypatch.setitem(sys.modules, "unidic_lite", None)
    with pytest.raises(ModelUnavailable, match=re.escape(UNIDIC_LINE)):
        resolve_base_model(name, None, [])
    with pytest.raises(ModelUnavailable, match=re.escape(UNIDIC_LINE)):
        prepare_base_model(settings, name)
    # Workers on another machine may have the package.
    assert prepare_base_model(settings.model_copy(update={"redis_url": "redis://elsewhere"}), name) == name
    assert prepare_base_model(settings, "tohoku-nlp/bert-base-japanese") == "tohoku-nlp/bert-base-japanese"


def test_a_tokenizer_that_needs_unidic_lite_is_refused_when_it_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = unidic_encoder(tmp_path / "encoder")
    assert mecab_dictionary(load_tokenizer(folder)) == "unidic_lite"
    monkeypatch.setitem(sys.modules, "unidic_lite", None)
    with pytest.raises(ModelUnavailable, match=re.escape(UNIDIC_LINE)):
        load_tokenizer(folder)


def test_the_console_names_its_extra(lean: Run) -> None:
    refused = lean("console")
    assert refused.returncode == 2
    assert refused.stderr.splitlines() == [
        "error: the console needs Streamlit (import of streamlit halted; None in sys.modules); "
        "`pip install 'tweetscore[console]'`"
    ]
