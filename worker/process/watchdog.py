"""End a worker process that hangs, dies in part or does not stop in time, and detect a pipeline that has stalled."""

import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

from worker.exit_codes import GRACE_EXIT
from worker.stream.stream import Depth

log = logging.getLogger(__name__)

# Loading a model may take this many times `stall_seconds`, and so may a window while no more tweets arrive.
SLOW_STALL_FACTOR = 10


def end_at_once(code: int, reason: str) -> NoReturn:
    """End this process without cleanup: records it read stay pending, and its job's lease expires."""
    log.critical("ending at once: %s", reason)
    for handler in logging.getLogger().handlers:
        handler.flush()
    os._exit(code)


def end_after(stopping: threading.Event, grace_seconds: float) -> None:
    """Wait for `stopping`, then end the process if it still runs after the grace period. Runs in a thread."""
    stopping.wait()
    time.sleep(grace_seconds)
    end_at_once(GRACE_EXIT, f"the current work took longer than {grace_seconds:g} s to end")


def end_at_signal(number: int, _frame: FrameType | None) -> NoReturn:
    # Not through logging: the interrupted thread may hold the lock of a log handler.
    os.write(2, f"{signal.Signals(number).name}: ending at once\n".encode())
    os._exit(128 + number)


class StallDetector:
    """Detects a pipeline that holds records and commits nothing for `seconds` while the backlog grows."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._alive_at: float | None = None
        self._depth_before: Depth | None = None

    def check(self, holding: bool, alive_at: float, depth: Callable[[], Depth | None]) -> str | None:
        """Return why the pipeline counts as stalled, or None.

        `alive_at` is the time of its last commit or other progress (`time.monotonic`). `depth` returns None while the
        broker is unavailable.
        """
        if not holding:
            self._alive_at = None
            return None
        if alive_at != self._alive_at:
            self._alive_at, self._depth_before = alive_at, None
        if self._depth_before is None:
            self._depth_before = depth()
        silent = time.monotonic() - alive_at
        if silent < self._seconds:
            return None
        reason = f"nothing was committed for {silent:.0f} s"
        now = depth()
        if now is not None and self._depth_before is not None and (more := _growth(self._depth_before, now)) > 0:
            return f"{reason} while {more:,} more tweets arrived; another worker scores the records this one held"
        # The worker renews its records, so no other worker can claim them. Without new tweets allow more time.
        if silent > SLOW_STALL_FACTOR * self._seconds:
            return f"{reason} of the records that this worker holds"
        return None


def _growth(before: Depth, now: Depth) -> int:
    """How many more records are unread; by the stream's length when the server does not report the lag."""
    if before.lag is None or now.lag is None:
        return now.length - before.length
    return now.lag - before.lag
