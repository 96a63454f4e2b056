"""The selection of an engine: it serves only if it agrees with float32 torch."""

import itertools
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import LABELS
from tests.support.artifacts import random_rows
from tests.worker.engines.conftest import digest, load_after_trial
from training.errors import BadArtifact
from training.model.artifact import Artifact, Reference, load_artifact
from training.model.batching import Batch, Logits
from worker.engine_names import FLOAT32_TORCH
from worker.engines.engine_choice import read_choice, saved_choices
from worker.engines.engine_selection import MIN_AGREEMENT, choice_folder, load_engine, select_engine, trial_memory
from worker.engines.engines import (
    Engine,
    EngineBuilder,
)

CPU = torch.device("cpu")


def test_the_fastest_that_agrees_serves_and_the_choice_is_saved(artifact: Artifact) -> None:
    engine, choice = load_after_trial(artifact, "auto")
    assert engine.name == choice.engine
    assert {trial.engine for trial in choice.trials} >= {"openvino-int8", "openvino-float32", "torch-float32"}
    speeds = [trial.tweets_per_second for trial in choice.trials if trial.tweets_per_second is not None]
    assert len(speeds) >= 2
    assert speeds == sorted(speeds, reverse=True)
    [serving] = [trial for trial in choice.trials if trial.serves]
    assert serving.engine == choice.engine
    assert serving.agreement >= MIN_AGREEMENT
    assert serving.verdict == choice.reason
    assert "the first that agrees" in choice.reason or choice.engine == FLOAT32_TORCH
    folder = choice_folder(artifact.folder, digest(artifact), CPU, "auto")
    assert read_choice(folder) == choice
    assert trial_memory(400_000_000) > 4 * 400_000_000, "a trial holds several engines at once"
    assert choice in saved_choices(artifact.folder, artifact.folder)
    written = (folder / "choice.json").stat().st_mtime_ns
    again, same = load_after_trial(artifact, "auto")
    assert (again.name, same) == (engine.name, choice)
    assert (folder / "choice.json").stat().st_mtime_ns == written
    assert list(artifact.folder.parent.glob("*/.*")) == [], "a draft was left"


def test_another_wish_or_artifact_is_another_choice(artifact: Artifact) -> None:
    pairs = itertools.product(("0" * 64, "1" * 64), ("auto", FLOAT32_TORCH))
    assert len({choice_folder(artifact.folder, sha, CPU, wanted) for sha, wanted in pairs}) == 4


class Turned:
    """An engine that is fast and wrong on some rows."""

    def __init__(self, inner: Engine, share: float) -> None:
        self.name, self.batches, self.inner, self.share = inner.name, inner.batches, inner, share

    def run(self, batches: Sequence[Batch]) -> list[Logits]:
        found = self.inner.run(batches)
        for logits in found:
            wrong = np.arange(len(logits)) < self.share * len(logits)
            logits[wrong] = logits[wrong][:, ::-1] + 5 * np.eye(len(LABELS), dtype=np.float32)[0]
        return found


class Dishonest(EngineBuilder):
    """Builds a wrong int8 engine and fails for the other OpenVINO engines."""

    def slower(self) -> dict[str, str]:
        return {}

    def build(self, name: str) -> Engine:
        if name in ("openvino-bfloat16", "openvino-float32"):  # the first only where the CPU has it
            raise ValueError("no operator for this")
        built = super().build(name)
        return Turned(built, 0.3) if name == "openvino-int8" else built


def test_an_engine_that_disagrees_or_cannot_be_built_is_passed_over(
    artifact: Artifact, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    engine, choice = select_engine(Dishonest(artifact.model, CPU), artifact, CPU, "auto")
    assert engine.name == choice.engine == FLOAT32_TORCH
    verdicts = {trial.engine: trial.verdict for trial in choice.trials}
    assert verdicts["openvino-int8"].startswith("does not serve") or choice.trials[0].engine == FLOAT32_TORCH
    assert [trial.engine for trial in choice.trials if trial.serves] == [FLOAT32_TORCH]
    assert verdicts["openvino-float32"] == "cannot run here: no operator for this"
    assert "engine openvino-float32 cannot run this model" in caplog.text


def test_numbers_that_are_none_never_serve(artifact: Artifact) -> None:
    class Nothing(Turned):
        def run(self, batches: Sequence[Batch]) -> list[Logits]:
            return [np.full_like(logits, np.nan) for logits in self.inner.run(batches)]

    class Broken(EngineBuilder):
        def build(self, name: str) -> Engine:
            built = super().build(name)
            return built if name == FLOAT32_TORCH else Nothing(built, 0)

    assert select_engine(Broken(artifact.model, CPU), artifact, CPU, "auto")[1].engine == FLOAT32_TORCH


def test_without_validation_rows_plain_torch_serves(tiny_artifact: Any) -> None:
    bare = load_artifact(tiny_artifact.folder, tiny_artifact.sha256)
    assert bare.reference is None
    _, choice = select_engine(EngineBuilder(bare.model, CPU), bare, CPU, "auto")
    assert choice.engine == FLOAT32_TORCH
    assert "no validation rows" in choice.reason


def test_when_nothing_can_run_it_is_said(artifact: Artifact) -> None:
    class Nothing(EngineBuilder):
        def build(self, name: str) -> Engine:
            raise RuntimeError("the device is gone")

    with pytest.raises(BadArtifact, match=r"no engine can run .* the device is gone"):
        select_engine(Nothing(artifact.model, CPU), artifact, CPU, "auto")


@pytest.mark.parametrize("damage", ["choice", "graph", "weights"])
def test_a_saved_engine_that_is_damaged_is_made_again(
    artifact: Artifact, damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copied = load_artifact(shutil.copytree(artifact.folder, tmp_path / "tiny"))
    load_after_trial(copied, "openvino-float32")
    saved = choice_folder(copied.folder, digest(copied), CPU, "openvino-float32")
    if damage == "choice":
        (saved / "choice.json").write_text("{", encoding="utf-8")
    elif damage == "graph":
        (saved / "graph.xml").write_text("<net>", encoding="utf-8")
    else:
        weights = np.fromfile(saved / "graph.bin", np.uint8)
        weights[:] = 60
        weights.tofile(saved / "graph.bin")
    _, choice = load_after_trial(copied, "openvino-float32")
    assert choice.engine == "openvino-float32"
    assert ("cannot be used" in caplog.text) == (damage != "choice")
    assert read_choice(saved) == choice


def test_a_store_that_cannot_be_written_still_serves(artifact: Artifact, tmp_path: Path) -> None:
    (tmp_path / "tiny.engines").write_text("no folder", encoding="utf-8")
    folder = choice_folder(tmp_path / "tiny", digest(artifact), CPU, FLOAT32_TORCH)
    _, choice, final = load_engine(artifact, CPU, FLOAT32_TORCH, [folder])
    assert (choice.engine, final) == (FLOAT32_TORCH, True)
    assert read_choice(folder) is None


def test_the_reference_survives_saving(artifact: Artifact) -> None:
    assert isinstance(artifact.reference, Reference)
    assert artifact.reference.rows == random_rows(200)
    assert artifact.reference.logits.shape == (200, len(LABELS))
    listed = (artifact.folder / "SHA256SUMS").read_text(encoding="utf-8")
    assert "reference.safetensors" in listed


def test_the_listing_of_a_choice_is_plain_json(artifact: Artifact) -> None:
    load_after_trial(artifact, "auto")
    folder = choice_folder(artifact.folder, digest(artifact), CPU, "auto")
    written = json.loads((folder / "choice.json").read_text(encoding="utf-8"))
    assert set(written) == {"engine", "token_budget", "hardware", "trials", "window_tweets"}
