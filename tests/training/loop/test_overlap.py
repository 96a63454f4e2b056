"""What the host does while a GPU computes, on a CPU that is treated like a GPU: the results are the same."""

import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.training_loop import CPU, Bench, maker, stop_at
from training.errors import StopRequested
from training.evaluation.epoch import Epoch
from training.loop import overlap
from training.loop.fit import Hooks
from training.loop.overlap import ahead
from training.model.kernels import training_kernels

GPU = torch.device("cuda")


@pytest.fixture
def made(tiny_encoder: Path, labelled_csv: Path) -> Bench:
    return maker(tiny_encoder, labelled_csv)(learning_rate=1e-2, epochs=2)


@pytest.fixture
def like_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    return lambda: monkeypatch.setattr(overlap, "OVERLAPPING", {"cpu"})


def figures(epochs: list[Epoch]) -> list[tuple[float, float]]:
    return [(epoch.train_loss, epoch.valid_loss) for epoch in epochs]


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("batches")]


def test_a_run_has_the_same_losses_which_are_read_a_step_later(
    made: Bench, tmp_path: Path, like_a_gpu: Callable[[], None]
) -> None:
    def run(folder: Path, stop: int | None = None) -> tuple[list[Epoch], list[float | None]]:
        losses: list[float | None] = []

        def on_step(step: int, _total: int, loss: float | None, _rate: float | None) -> None:
            if loss is not None:
                losses.append(loss)
                if step == stop:
                    raise StopRequested

        return made.fit(made.model(), folder, hooks=Hooks(on_step=on_step)), losses

    plain, losses = run(tmp_path / "plain")
    like_a_gpu()
    overlapped, later = run(tmp_path / "overlapped")
    assert figures(overlapped) == figures(plain)
    # The first step has no step before it; at the end of an epoch all are read.
    assert later == [losses[0], *losses[:-1]]


def test_a_run_stopped_within_an_epoch_leaves_no_thread_and_is_resumed_to_the_same_end(
    made: Bench, tmp_path: Path, like_a_gpu: Callable[[], None]
) -> None:
    unbroken = made.fit(made.model(), tmp_path / "unbroken")
    like_a_gpu()
    working: list[str] = []

    def on_step(step: int, *given: Any) -> None:
        working.extend(threads())
        stop_at(9, validating=False).on_step(step, *given)

    with pytest.raises(StopRequested):
        made.fit(made.model(), tmp_path / "broken", hooks=Hooks(on_step=on_step))
    assert working
    assert not threads()
    assert figures(made.fit(made.model(), tmp_path / "broken")) == figures(unbroken)


def test_items_are_made_ahead_in_order_and_an_error_reaches_the_consumer(like_a_gpu: Callable[[], None]) -> None:
    like_a_gpu()
    begun: list[int] = []

    def make(item: int) -> float:
        begun.append(item)
        return 10 / (5 - item)

    with closing(ahead(range(20), make, CPU)) as made:
        assert [next(made) for _ in range(5)] == [2, 2.5, 10 / 3, 5, 10]
        with pytest.raises(ZeroDivisionError):
            next(made)
    assert begun == list(range(len(begun)))
    assert len(begun) <= 5 + overlap.ITEMS_AHEAD + 1
    assert not threads()


class Waits(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operations that would make the host wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, given: Any = (), options: Any = None) -> Any:
        if function.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero"):
            self.found.append(str(function))
        return function(*given, **(options or {}))


def test_in_a_forward_and_a_backward_pass_the_host_waits_for_nothing(made: Bench) -> None:
    model = made.model()
    ids = torch.tensor([[2, 10, 11, 3], [2, 12, 13, 3]])

    def waits() -> list[str]:
        counter = Waits()
        with counter:
            model(ids, torch.ones_like(ids)).sum().backward()
        return counter.found

    assert waits()  # transformers' own attention asks whether there is padding
    with training_kernels(model, GPU):
        assert waits() == []
