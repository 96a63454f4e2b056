"""A device without room for a batch: it is computed in smaller pieces, to the same result."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.training_loop import CPU, Bench, maker, stop_at
from tests.training.loop.test_masked_fit import fit as fit_masked
from training.errors import OutOfMemory, StopRequested
from training.loop import masked_fit, memory, overlap
from training.loop.logits import logits_of
from training.model.language_model import LanguageModel

# Of 8 rows of 10 to 11 tokens: three pieces and, halved, more.
TOKENS = 40


@pytest.fixture
def make(tiny_encoder: Path, labelled_csv: Path) -> Callable[..., Bench]:
    return maker(tiny_encoder, labelled_csv)


def full(*_: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


def full_at(model: torch.nn.Module, forward: int) -> None:
    """Run out of memory once, after this forward has drawn its random numbers."""
    forwards = 0

    def hook(*_: object) -> None:
        nonlocal forwards
        forwards += 1
        if forwards == forward:
            full()

    model.register_forward_hook(hook)


def room_for(model: torch.nn.Module, tokens: int) -> None:
    """Run out of memory with every batch of more tokens."""
    model.register_forward_hook(lambda _module, given, _output: full() if given[0].numel() > tokens else None)


@pytest.mark.parametrize("device_computes_by_itself", [False, True])
def test_a_run_out_of_memory_ends_as_one_with_small_pieces_from_the_start(
    make: Callable[..., Bench],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    device_computes_by_itself: bool,
) -> None:
    """The first step is out of memory in its second piece. A checkpoint keeps what fits."""
    if device_computes_by_itself:
        monkeypatch.setattr(overlap, "OVERLAPPING", {"cpu"})
    made = make(learning_rate=1e-2, epochs=1)
    monkeypatch.setitem(memory.TOKENS_AT_ONCE, "cpu", TOKENS)
    model = made.model()
    full_at(model, 2)
    with pytest.raises(StopRequested), caplog.at_level(logging.WARNING):
        made.fit(model, tmp_path / "full", hooks=stop_at(3, validating=False))
    [line] = caplog.messages
    lowered = int(line.split()[-4])
    assert lowered < TOKENS
    assert "out of memory on cpu with" in line
    model = made.model()
    made.fit(model, tmp_path / "full")

    monkeypatch.setitem(memory.TOKENS_AT_ONCE, "cpu", lowered)
    small = made.model()
    made.fit(small, tmp_path / "small")
    for name, weight in small.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], weight, atol=1e-6, rtol=0, msg=name)
    monkeypatch.setitem(memory.TOKENS_AT_ONCE, "cpu", TOKENS)
    large = made.model()
    made.fit(large, tmp_path / "large")
    of_head = "hugging_face.classifier.weight"
    assert not torch.allclose(large.get_parameter(of_head), small.get_parameter(of_head))


def test_a_masked_language_model_out_of_memory_ends_as_one_with_small_pieces_from_the_start(
    tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    built = masked_fit.masked_fit

    def cramped(model: LanguageModel, *given: Any, **options: Any) -> masked_fit.Losses:
        room_for(model, 60)
        return built(model, *given, **options)

    with monkeypatch.context() as patched, caplog.at_level(logging.WARNING):
        patched.setattr("tests.training.loop.test_masked_fit.masked_fit", cramped)
        losses, _ = fit_masked(tiny_encoder, tmp_path / "full")
    lowered = int(caplog.messages[-1].split()[-4])
    monkeypatch.setitem(memory.TOKENS_AT_ONCE, "cpu", lowered)
    small, _ = fit_masked(tiny_encoder, tmp_path / "small")
    assert losses.after == pytest.approx(small.after, abs=1e-4)
    assert losses.after < losses.before


def test_predictions_out_of_memory_are_those_of_whole_batches(make: Callable[..., Bench]) -> None:
    made = make()
    whole, cramped = made.model(), made.model()
    expected = made.predict(whole, "train", batch_size=16)
    room_for(cramped, 30)
    found = made.predict(cramped, "train", batch_size=16)
    assert found.logits == pytest.approx(expected.logits, abs=1e-5)
    assert found.loss == pytest.approx(expected.loss, abs=1e-5)
    rows, pad_id = made.rows["train"], made.tokenizer.pad_token_id
    assert logits_of(cramped, rows, pad_id, CPU) == pytest.approx(expected.logits, abs=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head": "guide", "loss": "bce"}, r"8 rows of \d+ tokens .* cpu.* set a smaller train_batch_size or max_len"),
        ({}, r"a single row of \d+ tokens does not fit into the memory of cpu; set a smaller max_length"),
    ],
    ids=["the guide's head needs the batch", "a row alone is too large"],
)
def test_what_cannot_be_divided_is_an_error_that_names_what_to_set(
    make: Callable[..., Bench], tmp_path: Path, options: dict[str, str], message: str
) -> None:
    made = make(**options)
    model = made.model()
    room_for(model, 5)
    with pytest.raises(OutOfMemory, match=message):
        made.fit(model, tmp_path)


def test_other_errors_are_not_tried_again(make: Callable[..., Bench], tmp_path: Path) -> None:
    made, forwards = make(), []

    def broken(*_: object) -> None:
        forwards.append(1)
        raise RuntimeError("the device is lost")

    model = made.model()
    model.register_forward_hook(broken)
    with pytest.raises(RuntimeError, match="the device is lost"):
        made.fit(model, tmp_path)
    assert len(forwards) == 1
