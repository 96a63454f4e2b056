"""A worker's signs of life: a file for whoever watches it from outside, and a watchdog that ends it when it hangs.

HOME/run/KIND-HOST-PID.json is touched every few seconds while the process is well. It lies on disk, not on the broker
or in SQL: a worker is not ill because they are away. The host is part of the name, since containers share a home.
"""

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

log = logging.getLogger(__name__)

PULSE_SECONDS = 2.0
# A pulse this old is none any more: a busy machine may skip a few.
FRESH_SECONDS = 20.0
# What `up` and an orchestrator's log read: the sysexits of an internal error and of a failure that may pass.
WATCHER_DIED_EXIT = 70
STALLED_EXIT = 75
GRACE_EXIT = 76
ENDINGS = {
    WATCHER_DIED_EXIT: "it had lost its watcher",
    STALLED_EXIT: "it hung",
    GRACE_EXIT: "it did not end in time by itself",
}


class Pulse:
    """Beats from a thread of its own. `ailing` says why the process should end, None while all is well."""

    def __init__(self, folder: Path, kind: str, ailing: Callable[[], tuple[int, str] | None]) -> None:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._path = folder / f"{kind}-{socket.gethostname()}-{os.getpid()}.json"
        self._kind = kind
        self._ailing = ailing
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="pulse", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._done.set()
        self._path.unlink(missing_ok=True)

    def _beat(self) -> None:
        while True:
            if found := self._ailing():
                end_at_once(*found)
            try:
                self._path.write_text(json.dumps({"kind": self._kind, "pid": os.getpid(), "at": time.time()}))
            except OSError as error:
                log.warning("the pulse could not be written: %s", error)
            if self._done.wait(PULSE_SECONDS):
                self._path.unlink(missing_ok=True)  # `stop` may have come while it was written
                return


def end_at_once(code: int, why: str) -> None:
    """End this process where it stands; what it held is pending, what it leased will lapse."""
    log.critical("ending at once: %s", why)
    logging.shutdown()
    os._exit(code)


def find_pulse(folder: Path, kind: str) -> tuple[int, float] | None:
    """Process number and age in seconds of this host's freshest pulse of a kind. Clears away those of the dead."""
    found = []
    for path in folder.glob(f"{kind}-{socket.gethostname()}-*.json"):
        pid = int(path.stem.rpartition("-")[2])
        if not Path(f"/proc/{pid}").exists():
            path.unlink(missing_ok=True)
            continue
        found.append((max(0.0, time.time() - path.stat().st_mtime), pid))
    if not found:
        return None
    age, pid = min(found)
    return pid, age


class Stall:
    """Whether a route that holds records has committed nothing for `seconds` while more and more wait."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._alive_at = -1.0
        self._waiting_then = 0

    def found(self, holding: bool, alive_at: float, waiting: Callable[[], int | None]) -> str | None:
        """`alive_at` is the route's last sign of life (`time.monotonic`); `waiting` counts what is not read yet."""
        if not holding or alive_at != self._alive_at:
            self._alive_at = alive_at
            self._waiting_then = (waiting() or 0) if holding else 0
            return None
        silent = time.monotonic() - alive_at
        if silent < self._seconds:
            return None
        now = waiting()
        if now is None or now <= self._waiting_then:
            return None
        return (
            f"nothing was committed for {silent:.0f} s while {now:,} tweets wait, {now - self._waiting_then:,} more "
            "than then; what this worker held is scored by another"
        )
