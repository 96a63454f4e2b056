"""Work of the host while a GPU computes: batches are prepared ahead, copies do not wait, losses are read later."""

from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

Item = TypeVar("Item")
Made = TypeVar("Made")

# On a CPU the host's work would take cores from the computation.
OVERLAPPING = {"cuda"}
ITEMS_AHEAD = 2


def ahead(items: Sequence[Item], make: Callable[[Item], Made], device: torch.device) -> Generator[Made]:
    """Yield `make(item)` for every item, in order. For a GPU one thread makes the next ones meanwhile.

    Close the generator when items may be left: this ends the thread.
    """
    if device.type not in OVERLAPPING:
        yield from map(make, items)
        return
    with ThreadPoolExecutor(1, "batches") as thread:
        waiting: deque[Future[Made]] = deque()
        try:
            for item in items:
                waiting.append(thread.submit(make, item))
                if len(waiting) > ITEMS_AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor from which `to(device, non_blocking=True)` does not wait for the work that a GPU has queued."""
    return tensor.pin_memory() if device.type == "cuda" else tensor


class StepLosses:
    """Reads the losses of steps, in order. On a GPU each is read one step late: reading waits for its computation, and
    the GPU would then wait for the next step."""

    def __init__(self, device: torch.device) -> None:
        self._late = int(device.type in OVERLAPPING)
        self._unread: deque[tuple[_Copy, Callable[[float], None]]] = deque()
        self._newest: float | None = None

    def add(self, parts: list[Tensor], note: Callable[[float], None]) -> float:
        """Add the loss of a step: the sum of `parts`, scalars. Returns the newest loss that is read.

        `note` is called with the step's loss when it is read.
        """
        self._unread.append((_Copy(torch.stack(parts)), note))
        self._read(self._late)
        if self._newest is None:
            self._read(0)
        assert self._newest is not None  # noqa: S101 - there is at least the step that was added
        return self._newest

    def read(self) -> None:
        """Read all losses that are left. Call it before anything that their notes change is used."""
        self._read(0)

    def _read(self, left: int) -> None:
        while len(self._unread) > left:
            copy, note = self._unread.popleft()
            self._newest = copy.total()
            note(self._newest)


class _Copy:
    """Losses (N,) on their way to the host."""

    def __init__(self, losses: Tensor) -> None:
        self._host = losses.to("cpu", non_blocking=True)
        self._arrived = torch.cuda.current_stream(losses.device).record_event() if losses.is_cuda else None

    def total(self) -> float:
        if self._arrived is not None:
            self._arrived.synchronize()
        return float(sum(self._host.tolist()))
