"""What failed and is tried again: after a pause that doubles as long as the same thing fails."""

import time


class Pause:
    """Over at first, and for anything but what failed last."""

    def __init__(self) -> None:
        self._of: int | None = None
        self._seconds = 0.0
        self._until = 0.0  # by `time.monotonic`

    def begin(self, of: int | None, first: float, longest: float) -> float:
        """`of` has failed. Returns how many seconds it waits now."""
        again = of == self._of and self._seconds > 0
        self._of, self._seconds = of, min(longest, 2 * self._seconds if again else first)
        self._until = time.monotonic() + self._seconds
        return self._seconds

    def over(self, of: int | None) -> bool:
        return of != self._of or time.monotonic() >= self._until
