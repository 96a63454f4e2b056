"""Engines on a GPU: `pytest -m gpu`."""

import gc
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.artifacts import random_rows
from tests.worker.engines.conftest import artifact_in
from training.model.artifact import Artifact
from training.model.packing import ROW_TOKENS
from worker.engines.engine_choice import Choice
from worker.engines.engine_selection import GPU_BUDGETS, GPU_WINDOWS, select_engine
from worker.engines.engines import Engine, EngineBuilder, TorchEngine
from worker.engines.packed_engine import PackedEngine
from worker.scoring.scoring_model import ScoringModel

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU"),
]

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")
ROWS = [*random_rows(400, seed=5), [2, 3], [2, *range(5, 195), 3]]
BUDGET = 32 * ROW_TOKENS
# The tiny models are of some MB: more than what the allocator rounds up to, less than the activations of a window.
ROUNDING_BYTES = 2 * 1024 * 1024
LEFT_BYTES = 256 * 1024 * 1024
UNKNOWN_TOKEN = """
import torch
from training.model.devices import answers
gpu = torch.device("cuda:0")
assert answers(gpu)
try:
    torch.nn.functional.embedding(torch.full((4,), 10**6, device=gpu), torch.ones(8, 8, device=gpu)).sum().item()
except RuntimeError as error:
    print("lost" if not answers(gpu) else "still there", type(error).__name__)
"""


def model_on(artifact: Artifact, engine: Engine, budget: int = BUDGET) -> ScoringModel:
    return ScoringModel(1, artifact, engine, Choice(engine.name, budget, "", []))


def expected_of(artifact: Artifact) -> np.ndarray:
    return model_on(artifact, TorchEngine(artifact.model, CPU, torch.float32)).forward(ROWS).probabilities


def test_packed_rows_in_float32_have_the_probabilities_of_the_cpu(artifact: Artifact) -> None:
    engine = PackedEngine("packed", artifact.model, GPU, torch.float32)
    found = model_on(artifact, engine).forward(ROWS).probabilities
    np.testing.assert_allclose(found, expected_of(artifact), atol=1e-3)


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
@pytest.mark.parametrize("kind", ["torch", "packed", "varlen", "compiled"])
def test_half_precision_agrees_with_float32(artifact: Artifact, kind: str, precision: str) -> None:
    engine = EngineBuilder(artifact.model, GPU).build(f"{kind}-{precision}")
    expected, found = expected_of(artifact), model_on(artifact, engine).forward(ROWS).probabilities
    assert np.abs(found - expected).mean() < 0.02
    assert (found.argmax(1) == expected.argmax(1)).mean() > 0.98


def test_graphs_of_two_models_do_not_disturb_each_other(artifact: Artifact, tiny_encoder: Path, tmp_path: Path) -> None:
    """As after a swap, while windows of the model before are still under way."""
    other = artifact_in(tmp_path / "other", tiny_encoder, 2)
    models = [model_on(a, PackedEngine("packed", a.model, GPU, torch.float16)) for a in (artifact, other)]
    first = [model.forward(ROWS).probabilities for model in models]
    assert np.abs(first[0] - first[1]).max() > 0.1
    for _ in range(3):
        for model, expected in zip(models, first, strict=True):
            np.testing.assert_array_equal(model.forward(ROWS).probabilities, expected)


def test_an_engine_that_is_replaced_gives_its_memory_back(artifact: Artifact) -> None:
    def allocated_after_one() -> int:
        engine = PackedEngine("packed", artifact.model, GPU, torch.float16)
        model_on(artifact, engine).forward(ROWS)
        used = torch.cuda.memory_allocated(GPU)
        del engine
        gc.collect()
        torch.cuda.empty_cache()
        assert torch.cuda.memory_allocated(GPU) < used
        return torch.cuda.memory_allocated(GPU)

    first = allocated_after_one()  # cuBLAS keeps some memory for as long as the process lives
    assert allocated_after_one() <= first + ROUNDING_BYTES


def test_on_a_full_card_the_budget_is_halved_and_the_window_is_scored(artifact: Artifact) -> None:
    engine = PackedEngine("packed", artifact.model, GPU, torch.float32)
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(GPU)
    filled = torch.empty(free - LEFT_BYTES, dtype=torch.uint8, device=GPU)
    rows = random_rows(60_000, seed=9)
    model = model_on(artifact, engine, budget=max(GPU_BUDGETS) * 16)
    try:
        found = model.forward(rows).probabilities
    finally:
        del filled
        torch.cuda.empty_cache()
    assert np.isfinite(found).all()
    assert model.token_budget < max(GPU_BUDGETS) * 16


def test_a_choice_has_the_budget_and_the_window_of_the_card(artifact: Artifact) -> None:
    engine, choice = select_engine(EngineBuilder(artifact.model, GPU), artifact, GPU, "auto")
    assert engine.name == choice.engine
    assert choice.token_budget in GPU_BUDGETS
    assert choice.window_tweets in GPU_WINDOWS
    assert sum(trial.serves for trial in choice.trials) == 1


def test_a_card_that_is_lost_is_noticed() -> None:
    ended = subprocess.run([sys.executable, "-c", UNKNOWN_TOKEN], capture_output=True, text=True, check=True)
    assert ended.stdout.startswith("lost")
