"""Overlap the steps of consecutive windows: each step has its own threads."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

from worker.scoring.window import Window

# One window is stored, one leaves the device, one enters it, and one is ready. More would only take memory.
WINDOWS_IN_FLIGHT = 4

Step = Callable[[Window], Any]


class OverlappedSteps:
    """Runs windows through steps, given as (name, threads, step), in order; the last step returns a count.

    A step with one thread takes the windows in the order they were started. Two threads for the forward let the last
    batches of one window and the first of the next keep the device busy. Leaving the block waits for all windows.
    """

    def __init__(self, *steps: tuple[str, int, Step]) -> None:
        self._steps = [(ThreadPoolExecutor(threads, name), step) for name, threads, step in steps]
        self._in_flight: deque[tuple[Window, Future[Any]]] = deque()
        self.results: list[int] = []
        self.failed: list[tuple[Window, BaseException]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        while self._in_flight:
            self._collect_first()
        for threads, _ in self._steps:
            threads.shutdown()

    @property
    def idle(self) -> bool:
        return not self._in_flight

    def start(self, window: Window) -> None:
        future: Future[Any] | None = None
        for threads, step in self._steps:
            future = threads.submit(_after, future, step, window)
        assert future is not None  # noqa: S101 - there is at least one step
        self._in_flight.append((window, future))

    def collect(self) -> None:
        """Collect the windows that have ended; wait for the first while `WINDOWS_IN_FLIGHT` are in flight."""
        while self._in_flight and (len(self._in_flight) >= WINDOWS_IN_FLIGHT or self._in_flight[0][1].done()):
            self._collect_first()

    def _collect_first(self) -> None:
        window, future = self._in_flight.popleft()
        error = future.exception()
        if error is None:
            self.results.append(future.result())
        else:
            self.failed.append((window, error))


def _after(previous: Future[Any] | None, step: Step, window: Window) -> Any:
    """Run a step when the one before has ended; raises its error."""
    if previous is not None:
        previous.result()
    return step(window)
