"""The training loop on a GPU: bfloat16, a host that does not wait, and a card without room for a batch."""

import gc
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.training_loop import Bench, maker
from training.evaluation.epoch import Epoch
from training.loop import memory
from training.loop.checkpoints import Checkpoints
from training.loop.fit import FitInputs, Hooks, fit
from training.model.classifier import Classifier

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU"),
]

GPU = torch.device("cuda")


@pytest.fixture
def make(tiny_encoder: Path, labelled_csv: Path) -> Callable[..., Bench]:
    return maker(tiny_encoder, labelled_csv)


def train(model: Classifier, inputs: FitInputs, folder: Path, hooks: Hooks | None = None) -> list[Epoch]:
    return fit(
        model, inputs, device=GPU, board_folder=None, checkpoints=Checkpoints(folder), hooks=hooks or Hooks()
    )  # fmt: skip


def test_the_loss_falls_in_bfloat16_with_weights_in_float32(make: Callable[..., Bench], tmp_path: Path) -> None:
    made = make(pooling="mean", learning_rate=1e-2, precision="bfloat16")
    model, computed = made.model(), set()

    def note(_module: torch.nn.Module, _given: Any, output: torch.Tensor) -> None:
        computed.add((output.device.type, output.dtype))

    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(note)
    epochs = train(model, made.inputs(), tmp_path)
    assert epochs[-1].train_loss < 0.5 * epochs[0].train_loss
    assert computed == {("cuda", torch.bfloat16)}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_the_host_waits_for_no_operation_of_a_step(make: Callable[..., Bench], tmp_path: Path) -> None:
    """Torch raises at every operation that waits, from the second step of the epoch to its last."""
    made = make(epochs=1, max_grad_norm=1.0)
    steps = made.inputs().steps_per_epoch

    def on_step(step: int, _total: int, loss: float | None, _rate: float | None) -> None:
        if loss is not None:
            torch.cuda.set_sync_debug_mode("default" if step == steps else "error")

    try:
        [epoch] = train(made.model(), made.inputs(), tmp_path, Hooks(on_step=on_step))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert steps > 2
    assert epoch.train_loss > 0


def test_a_step_without_room_on_the_card_is_computed_in_smaller_pieces(
    make: Callable[..., Bench], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = make(epochs=1, train_batch_size=512, dropout=0.0, encoder_dropout=0.0)
    few, copies = made.inputs(), 24
    split = few.train
    many = replace(
        split,
        texts=split.texts * copies,
        targets=split.targets.repeat(copies, axis=0),
        row_numbers=split.row_numbers * copies,
    )
    rows = [(row * 16)[:128] for row in few.train_rows for _ in range(copies)]
    inputs = replace(few, train=many, train_rows=rows)
    monkeypatch.setitem(memory.TOKENS_AT_ONCE, "cuda", 10**6)

    def run(folder: Path) -> tuple[float, list[int]]:
        """The loss, and the tokens of each pass."""
        model, tokens = made.model(), []

        def note(module: torch.nn.Module, given: Any) -> None:
            if module.training:
                tokens.append(given[0].numel())

        model.register_forward_pre_hook(note)
        [epoch] = train(model, inputs, folder)
        return epoch.train_loss, tokens

    def empty_card() -> None:
        gc.collect()
        torch.cuda.empty_cache()

    empty_card()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss, whole = run(tmp_path / "whole")
    needed = torch.cuda.max_memory_allocated() - before
    empty_card()
    free, _ = torch.cuda.mem_get_info()
    filler = torch.empty(free - needed // 2, dtype=torch.uint8, device=GPU)
    try:
        with caplog.at_level(logging.WARNING):
            again, pieces = run(tmp_path / "pieces")
    finally:
        del filler
        empty_card()
    assert "out of memory on cuda with" in caplog.text
    assert max(pieces) == max(whole)  # tried once, and not again
    assert max(pieces[pieces.index(max(pieces)) + 1 :]) <= max(whole) // 2
    assert again == pytest.approx(loss, abs=0.02)
