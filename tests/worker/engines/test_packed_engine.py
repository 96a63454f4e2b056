"""The engine of packed rows, on the CPU: the code is that of a GPU but for graphs."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import XLMRobertaConfig, XLMRobertaModel

from tests.support.artifacts import random_rows
from tests.support.classifiers import SMALL
from training.config import make_config
from training.model.artifact import Artifact
from training.model.classifier import Classifier
from training.model.packing import ROW_TOKENS
from worker.engine_names import CUDA_ENGINES, FLOAT32_TORCH
from worker.engines import engine_selection
from worker.engines.engine_choice import Choice
from worker.engines.engine_selection import select_engine, smallest_near_best
from worker.engines.engines import EngineBuilder, TorchEngine
from worker.engines.packed_engine import HEIGHTS, PackedEngine
from worker.errors import DeviceFull
from worker.scoring.scoring_model import ScoringModel

CPU = torch.device("cpu")


@pytest.fixture
def engine(artifact: Artifact) -> PackedEngine:
    return PackedEngine("packed", artifact.model, CPU, torch.float32)


def model_on(artifact: Artifact, engine: Any, budget: int) -> ScoringModel:
    return ScoringModel(1, artifact, engine, Choice(engine.name, budget, "", []))


@pytest.mark.parametrize("budget", [64, 512, 4096])
def test_a_window_has_the_probabilities_of_float32_torch(artifact: Artifact, engine: PackedEngine, budget: int) -> None:
    rows = [*random_rows(200, seed=5), [2, 3], [2, *range(5, 195), 3]]
    expected = model_on(artifact, TorchEngine(artifact.model, CPU, torch.float32), 512).forward(rows)
    found = model_on(artifact, engine, budget).forward(rows)
    np.testing.assert_allclose(found.probabilities, expected.probabilities, atol=1e-5)
    assert found.tokens == expected.tokens


def test_shapes_are_few_and_a_longer_text_has_longer_rows(engine: PackedEngine) -> None:
    shapes = set()
    for count in range(1, 400, 7):
        batches = engine.batches([*random_rows(count, seed=count), [2, *range(5, 195), 3]], 32 * ROW_TOKENS)
        assert sorted(i for batch in batches for i in batch.rows) == list(range(count + 1))
        assert all(batch.arrays[0].size == batch.tokens <= 32 * ROW_TOKENS for batch in batches)
        shapes |= {batch.arrays[0].shape for batch in batches}
    assert {size for _, size in shapes} == {ROW_TOKENS, 2 * ROW_TOKENS}
    assert len(shapes) <= 2 * HEIGHTS


@pytest.mark.parametrize(("rows", "height"), [(1, 8), (9, 16), (32, 32), (33, 64), (65, 128), (500, 512), (512, 512)])
def test_a_small_batch_is_not_as_high_as_the_steps_of_a_large_one(engine: PackedEngine, rows: int, height: int) -> None:
    (batch,) = engine.batches([[2] * ROW_TOKENS] * rows, 512 * ROW_TOKENS)
    assert batch.arrays[0].shape == (height, ROW_TOKENS)


def test_without_room_the_budget_is_halved_down_to_a_row(artifact: Artifact, engine: PackedEngine) -> None:
    run, room = engine.run, 4 * ROW_TOKENS

    def cramped(batches: Any) -> Any:
        if any(batch.tokens > room for batch in batches):
            raise DeviceFull("no room")
        return run(batches)

    engine.run = cramped  # type: ignore[method-assign]
    model, rows = model_on(artifact, engine, 64 * ROW_TOKENS), random_rows(400, seed=3)
    assert np.isfinite(model.forward(rows).probabilities).all()
    assert model.token_budget <= room
    room = ROW_TOKENS - 1
    with pytest.raises(DeviceFull):
        model.forward(rows)


def test_a_gpu_tries_packed_rows_where_the_architecture_allows(artifact: Artifact) -> None:
    cuda = torch.device("cuda")
    assert EngineBuilder(artifact.model, cuda).names() == list(CUDA_ENGINES)
    torch.manual_seed(1)
    other = XLMRobertaModel(XLMRobertaConfig(vocab_size=64, pad_token_id=0, **SMALL))
    names = EngineBuilder(Classifier(other, 3, make_config("fast", pooling="mean")), cuda).names()
    assert names == ["torch-float16", "torch-bfloat16", FLOAT32_TORCH]


def test_the_settings_can_name_it_on_a_cpu(artifact: Artifact) -> None:
    engine, choice = select_engine(EngineBuilder(artifact.model, CPU), artifact, CPU, "packed-bfloat16")
    assert engine.name == choice.engine == "packed-bfloat16"
    assert choice.trials[0].agreement is not None
    assert choice.trials[0].agreement > 0.99


def test_the_smallest_budget_that_is_near_the_best_is_taken() -> None:
    assert smallest_near_best({1: 70.0, 2: 97.9, 4: 98.1, 8: 100.0, 16: 99.0}) == 4


def test_the_window_of_a_gpu_is_one_of_those_compared(
    artifact: Artifact, engine: PackedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    batches = engine.batches
    monkeypatch.setattr(engine, "batches", lambda rows, budget: seen.append(len(rows)) or batches(rows, budget))
    monkeypatch.setattr(engine_selection, "GPU_WINDOWS", (50, 400))
    assert artifact.reference is not None
    assert engine_selection._fastest_window(engine, artifact.reference, 4096) in (50, 400)
    assert set(seen) == {50, 400}


def test_an_attention_that_a_device_lacks_is_passed_over(artifact: Artifact) -> None:
    _, choice = select_engine(EngineBuilder(artifact.model, CPU), artifact, CPU, "varlen-float16")
    assert choice.engine == FLOAT32_TORCH
    assert choice.trials[0].verdict.startswith("cannot run here")
