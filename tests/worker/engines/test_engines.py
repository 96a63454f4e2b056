"""Engines: each gives what float32 torch gives, and says in one way that its device is full."""

import importlib.metadata
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import BertConfig, BertModel, DistilBertConfig, DistilBertModel, RobertaConfig, RobertaModel

from tests.conftest import LABELS
from tests.support.artifacts import artifact_of, random_rows
from tests.worker.engines.conftest import digest, load_after_trial
from training.config import make_config
from training.model.artifact import Artifact
from training.model.batching import Batch, Logits, pad, pad_arrays
from training.model.classifier import Classifier
from worker.engine_names import FLOAT32_TORCH
from worker.engines.engine_choice import Choice
from worker.engines.engine_selection import choice_folder, select_engine
from worker.engines.engines import (
    Engine,
    EngineBuilder,
    TorchEngine,
    _quantised_rows,
    hardware,
    openvino,
    slower_engines,
)
from worker.errors import DeviceFull
from worker.scoring.scoring_model import ScoringModel

CPU = torch.device("cpu")


class Counting:
    """An engine that counts the rows it runs and has memory for `room` tokens."""

    def __init__(self, inner: Engine, room: int = 10**9) -> None:
        self.name, self.batches, self.inner, self.room = inner.name, inner.batches, inner, room
        self.rows = 0

    def run(self, batches: Sequence[Batch]) -> list[Logits]:
        if any(batch.tokens > self.room for batch in batches):
            raise DeviceFull("no room")
        self.rows += sum(len(batch.rows) for batch in batches)
        return self.inner.run(batches)


def model_on(artifact: Artifact, room: int = 10**9, budget: int = 512) -> ScoringModel:
    engine = Counting(TorchEngine(artifact.model, CPU, torch.float32), room)
    return ScoringModel(1, artifact, engine, Choice(engine.name, budget, "", []))


# --- engines


@pytest.mark.parametrize("name", ["openvino-float32", "torch-float32", "openvino-int8", "torch-bfloat16"])
def test_engine_gives_what_float32_torch_gives_whatever_the_shape(artifact: Artifact, name: str) -> None:
    engine = EngineBuilder(artifact.model, CPU).build(name)
    assert engine.name == name
    rows = random_rows(40, seed=5)
    shapes = [rows[:1], rows[1:4], rows[4:40], [[2, 3]], [[2, *range(5, 203), 3]] * 2]
    batches = [batch for shape in shapes for batch in engine.batches(shape, 10**6)]
    assert len(batches) == len(shapes)
    for batch, logits in zip(batches, engine.run(batches), strict=True):
        with torch.inference_mode():
            expected = artifact.model(*map(torch.from_numpy, batch.arrays)).numpy()
        tolerance = 1e-4 if name.endswith("float32") else 0.05 * float(np.abs(expected).max())
        assert logits.dtype == np.float32
        assert np.abs(logits - expected).max() <= tolerance


def test_int8_weights_are_within_half_a_step_of_their_row() -> None:
    generator = np.random.default_rng(4)
    weights = generator.normal(size=(5, 40)).astype(np.float32)
    weights[1], weights[2], weights[3] = 0.0, 0.25, -abs(weights[3])
    found = np.empty(weights.shape, np.float32)
    node = _quantised_rows(weights)
    model = openvino().Model([node], [])
    found[:] = openvino().Core().compile_model(model, "CPU")([])[0]
    steps = (weights.max(1).clip(min=0) - weights.min(1).clip(max=0)) / 255
    assert (np.abs(found - weights).max(1) <= 0.51 * steps + 1e-3 * np.abs(weights).max(1)).all()
    assert len(np.unique(found[0])) > 20


def test_engine_runs_nothing_and_runs_again(artifact: Artifact) -> None:
    engine = EngineBuilder(artifact.model, CPU).build("openvino-int8")
    [batch] = engine.batches(random_rows(3), 10**6)
    assert engine.run([]) == []
    first, again = engine.run([batch]), engine.run([batch, batch])
    assert np.array_equal(first[0], again[1])


def test_no_room_is_said_in_one_way(artifact: Artifact) -> None:
    engine = TorchEngine(artifact.model, CPU, torch.float32)
    engine._model = lambda ids, mask: torch.empty(10**15)  # type: ignore[assignment]
    with pytest.raises(DeviceFull, match="torch-float32 has no memory left"):
        engine.run(engine.batches([[2, 3]], 8))


def test_a_fault_of_another_kind_stays_what_it_is(artifact: Artifact) -> None:
    for name in ("torch-float32", "openvino-float32"):
        engine = EngineBuilder(artifact.model, CPU).build(name)
        [batch] = engine.batches([[10**9] * 4], 8)
        if name == "torch-float32":  # OpenVINO embeds an unknown id as the zero vector
            with pytest.raises(IndexError):
                engine.run([batch])
        with pytest.raises((RuntimeError, ValueError)) as fault:
            engine.run([replace(batch, arrays=(batch.arrays[0][0], batch.arrays[0][0]))])
        assert not isinstance(fault.value, DeviceFull)
        assert len(engine.run(engine.batches([[2, 3]], 8))) == 1, "the engine works after an error"


@pytest.mark.slow
def test_nothing_phones_home() -> None:
    program = """import worker.engines.engines; worker.engines.engines.openvino()
import sys, openvino.tools.ovc.telemetry_utils as telemetry
print(telemetry.tm.__name__, *sys.modules)"""
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert said[0] == "openvino.tools.ovc.telemetry_stub"
    assert not [name for name in said if name.startswith("openvino_telemetry.")]


def test_without_openvino_its_engines_are_passed_over_with_the_pip_line(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    builder = EngineBuilder(artifact.model, CPU)
    monkeypatch.setattr(builder, "slower", dict)
    engine, choice = select_engine(builder, artifact, CPU, "auto")
    says = {trial.engine: trial.verdict for trial in choice.trials}
    assert "`pip install openvino`" in says["openvino-int8"]
    assert caplog.text.count("`pip install openvino`") == 1
    assert (engine.name, set(says)) == (FLOAT32_TORCH, {"openvino-int8", FLOAT32_TORCH})
    assert hardware(CPU).endswith("without OpenVINO")
    _, wanted = select_engine(builder, artifact, CPU, "openvino-float32")
    assert wanted.engine == FLOAT32_TORCH


VNNI = {"architecture": "x86_64", "avx2": True, "avx512_vnni": True}


@pytest.mark.parametrize(
    ("capabilities", "reason"),
    [
        (VNNI, None),
        ({**VNNI, "amx_bf16": True}, "the AMX units of this CPU are faster in bfloat16"),
        ({"architecture": "x86_64", "avx2": True, "avx_vnni": False}, "this CPU has no int8 products (VNNI)"),
        ({"architecture": "aarch64"}, None),
    ],
)
def test_int8_is_not_tried_on_a_cpu_that_is_faster_without_it(
    capabilities: dict[str, Any], reason: str | None, artifact: Artifact
) -> None:
    built = []

    class Noting(EngineBuilder):
        def slower(self) -> dict[str, str]:
            return slower_engines(capabilities)

        def build(self, name: str) -> Engine:
            built.append(name)
            return super().build(name)

    _, choice = select_engine(Noting(artifact.model, CPU), artifact, CPU, "auto")
    verdict = next(trial.verdict for trial in choice.trials if trial.engine == "openvino-int8")
    assert ("openvino-int8" in built) == (reason is None)
    assert reason is None or f"is not tried: {reason}" in verdict


def test_a_choice_is_found_where_openvino_is_not_installed(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its version is a part of the key."""

    def version(name: str) -> str:
        if name == "openvino":
            raise importlib.metadata.PackageNotFoundError(name)
        return "1.0"

    before = choice_folder(artifact.folder, digest(artifact), CPU, "auto")
    monkeypatch.setattr(importlib.metadata, "version", version)
    assert choice_folder(artifact.folder, digest(artifact), CPU, "auto") != before


@pytest.mark.parametrize("kind", ["bert", pytest.param("distilbert", marks=pytest.mark.slow), "roberta"])
def test_models_of_other_shapes_are_served_and_agree(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    sizes = {"vocab_size": 3100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    encoder = {
        "bert": lambda: BertModel(BertConfig(**sizes, intermediate_size=64)),
        "distilbert": lambda: DistilBertModel(DistilBertConfig(vocab_size=3100, dim=32, n_layers=2, n_heads=2)),
        "roberta": lambda: RobertaModel(RobertaConfig(**sizes, intermediate_size=64)),
    }[kind]()
    made = artifact_of(Classifier(encoder, len(LABELS), make_config("fast", pooling="mean")).eval(), tmp_path / "m")
    _, choice = load_after_trial(made, "openvino-float32")
    assert choice.engine == "openvino-float32", choice.trials
    assert choice.trials[0].mean_difference < 1e-4
    assert "the first that agrees; 100.00% of 200" in choice.reason


# --- memory, equal rows, padding


def test_a_full_device_gets_smaller_batches_and_the_same_answers(
    artifact: Artifact, caplog: pytest.LogCaptureFixture
) -> None:
    rows = random_rows(50, seed=9)
    tight, roomy = model_on(artifact, room=130, budget=4096), model_on(artifact, budget=4096)
    assert tight.forward(rows).probabilities == pytest.approx(roomy.forward(rows).probabilities, abs=1e-5)
    assert tight.token_budget <= 130
    assert "tokens a forward" in caplog.text
    caplog.clear()
    tight.forward(rows)
    assert caplog.text == "", "the smaller budget is kept"


def test_a_row_that_fits_no_device_is_said(artifact: Artifact) -> None:
    model = model_on(artifact, room=20)
    with pytest.raises(DeviceFull):
        model.forward([[2, *range(5, 60), 3], [2, 3]])
    assert model.token_budget == 512, "the budget of other rows stays"


def test_equal_rows_of_one_forward_are_scored_once(artifact: Artifact) -> None:
    rows, model = random_rows(20, seed=4), model_on(artifact)
    first = model.forward(rows).probabilities
    second = model.forward(rows + rows[:5])
    assert second.probabilities == pytest.approx(np.concatenate([first, first[:5]]), abs=1e-6)
    assert second.tokens == sum(map(len, rows))
    assert model.engine.rows == 40  # type: ignore[attr-defined]
    assert model.forward([]).probabilities.shape == (0, len(LABELS))


@given(st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=20), min_size=1, max_size=20))
def test_padding_keeps_every_token_in_its_place(rows: list[list[int]]) -> None:
    ids, mask = pad_arrays(rows, 7)
    assert ids.shape == mask.shape == (len(rows), max(map(len, rows)))
    for row, padded, real in zip(rows, ids.tolist(), mask.tolist(), strict=True):
        assert padded == row + [7] * (len(padded) - len(row))
        assert real == [1] * len(row) + [0] * (len(padded) - len(row))
    assert torch.equal(pad(rows, 7)[0], torch.from_numpy(ids))
