"""Overlap the steps of consecutive windows: each step has its own threads."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from types import TracebackType
from typing import Any, Self

from worker.scoring.window import Window

# One window is stored, one leaves the device, one enters it, and one is ready. More would only take memory.
WINDOWS_IN_FLIGHT = 4
# On a CPU none is ready: its tokens are made on the same cores, so that its tweets only waited, in smaller windows. At
# three quarters of full speed that halved their latency.
UNSCORED_ON_CPU = 2

Step = Callable[[Window], Any]


class OverlappedSteps:
    """Runs windows through the steps tokenise, forward and store, in this order; `store` returns a count.

    A step with one thread takes the windows in the order they were started. Two threads for the forward let the last
    batches of one window and the first of the next keep the device busy. Leaving the block waits for all windows.
    """

    def __init__(self, tokenise: Step, forward: Step, store: Step, most_unscored: int = WINDOWS_IN_FLIGHT) -> None:
        """`most_unscored` is the number of windows that may be in flight before their forward has ended."""
        self._tokenise, self._forward, self._store = tokenise, forward, store
        self._tokenising = ThreadPoolExecutor(1, "tokenise")
        self._forwarding = ThreadPoolExecutor(2, "forward")
        self._storing = ThreadPoolExecutor(1, "store")
        self._most_unscored = most_unscored
        self._unscored: list[Future[Any]] = []
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
        for threads in (self._tokenising, self._forwarding, self._storing):
            threads.shutdown()

    @property
    def idle(self) -> bool:
        return not self._in_flight

    def start(self, window: Window) -> None:
        tokenised = self._tokenising.submit(self._tokenise, window)
        scored = self._forwarding.submit(_after, tokenised, self._forward, window)
        self._unscored.append(scored)
        self._in_flight.append((window, self._storing.submit(_after, scored, self._store, window)))

    def collect(self) -> None:
        """Collect the windows that have ended. Wait while as many are in flight, or not yet scored, as may be."""
        while self._in_flight and (len(self._in_flight) >= WINDOWS_IN_FLIGHT or self._in_flight[0][1].done()):
            self._collect_first()
        while len(unscored := [scored for scored in self._unscored if not scored.done()]) >= self._most_unscored:
            wait(unscored, return_when=FIRST_COMPLETED)
        self._unscored = unscored

    def _collect_first(self) -> None:
        window, future = self._in_flight.popleft()
        error = future.exception()
        if error is None:
            self.results.append(future.result())
        else:
            self.failed.append((window, error))


def _after(previous: Future[Any], step: Step, window: Window) -> Any:
    """Run a step when the one before has ended; raises its error."""
    previous.result()
    return step(window)
