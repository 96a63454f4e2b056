"""Exponential backoff for one failing item."""

import time


class Pause:
    """A pause that doubles while the same item fails. It applies only to the item that failed last."""

    def __init__(self) -> None:
        self._of: int | None = None
        self._seconds = 0.0
        self._until = 0.0  # by `time.monotonic`

    def begin(self, of: int | None, first: float, longest: float) -> float:
        """Start a pause because `of` failed. Returns its length in seconds."""
        again = of == self._of and self._seconds > 0
        self._of, self._seconds = of, min(longest, 2 * self._seconds if again else first)
        self._until = time.monotonic() + self._seconds
        return self._seconds

    def over(self, of: int | None) -> bool:
        """Whether `of` may be tried."""
        return of != self._of or time.monotonic() >= self._until
