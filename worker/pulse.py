"""A worker's signs of life: a file for whoever watches it from outside, and a watchdog that ends it when it hangs.

HOME/run/KIND-HOST-PID.json is touched every few seconds while the process is well. It lies on disk, not on the broker
or in SQL: a worker is not ill because they are away. The host is part of the name, since containers share a home.
"""

import contextlib
import json
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import NoReturn

from worker.stream import Depth

log = logging.getLogger(__name__)

PULSE_SECONDS = 2.0
# A pulse this old is none any more: a busy machine may skip a few.
FRESH_SECONDS = 20.0
# Pulses of hosts that are gone, as containers are, are kept this long.
FORGOTTEN_SECONDS = 86_400.0
# What may well take long, such as loading a model, may take this many times the time of a stall.
PATIENCE = 10
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
    """Beats from a thread of its own.

    `ailing` says why the process should end, None while all is well; `waits_for` what keeps a healthy one from working.
    None of them may wait long for anybody: a pulse that waits for a server looks like a dead worker.
    """

    def __init__(
        self, folder: Path, kind: str, state: Callable[[], str], ailing: Callable[[], tuple[int, str] | None],
        waits_for: Callable[[], str | None],
    ) -> None:  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        _clear(folder)
        self._path = folder / f"{kind}-{socket.gethostname()}-{os.getpid()}.json"
        self._kind = kind
        self._state = state
        self._ailing = ailing
        self._waits_for = waits_for
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="pulse", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._done.set()
        self._path.unlink(missing_ok=True)

    def _beat(self) -> None:
        try:
            while True:
                if found := self._ailing():
                    end_at_once(*found)
                self._show()
                if self._done.wait(PULSE_SECONDS):
                    self._path.unlink(missing_ok=True)  # `stop` may have come while it was written
                    return
        except Exception:
            log.exception("the pulse failed")
            end_at_once(WATCHER_DIED_EXIT, "nothing watches this worker any more; its error stands above")

    def _show(self) -> None:
        said = {"kind": self._kind, "pid": os.getpid(), "at": time.time(), "state": self._state()}
        said |= {"waits_for": self._waits_for()}
        try:
            self._path.write_text(json.dumps(said))
        except OSError as error:
            log.warning("the pulse could not be written: %s", error)


def end_at_once(code: int, why: str) -> NoReturn:
    """End this process where it stands; what it held is pending, what it leased will lapse."""
    log.critical("ending at once: %s", why)
    for handler in logging.getLogger().handlers:
        handler.flush()
    os._exit(code)


def end_after(stopping: threading.Event, grace_seconds: float) -> None:
    """Wait until `stopping` is set, then end this process if it is there after the grace period. For a thread."""
    stopping.wait()
    time.sleep(grace_seconds)
    end_at_once(GRACE_EXIT, f"the work at hand took longer than {grace_seconds:g} s to end")


def end_at_signal(number: int, _frame: FrameType | None) -> NoReturn:
    # Not by the log: the thread that was interrupted may stand in the middle of it.
    os.write(2, f"{signal.Signals(number).name}: ending at once\n".encode())
    os._exit(128 + number)


def find_pulse(folder: Path, kind: str) -> tuple[str, float] | None:
    """Process number and age in seconds of this host's freshest pulse of a kind. Clears away those of the dead."""
    _clear(folder)
    found = []
    for path in folder.glob(f"{kind}-*.json"):
        host, pid = _owner(path)
        # A worker that ends takes its pulse along, now or in a moment.
        with contextlib.suppress(FileNotFoundError):
            if host == socket.gethostname():
                found.append((max(0.0, time.time() - path.stat().st_mtime), pid))
    if not found:
        return None
    age, pid = min(found)
    return pid, age


def waits_for(folder: Path, kind: str, pid: str) -> str | None:
    """What keeps a worker of this host from working, by its pulse."""
    try:
        why = json.loads((folder / f"{kind}-{socket.gethostname()}-{pid}.json").read_text()).get("waits_for")
    except (OSError, ValueError, AttributeError):  # it ended, or is writing
        return None
    return None if why is None else str(why)


def _clear(folder: Path) -> None:
    """Take away the pulses of this host's dead processes, and of hosts that have been silent for long."""
    for path in folder.glob("*-*.json"):
        host, pid = _owner(path)
        with contextlib.suppress(FileNotFoundError):
            here = host == socket.gethostname()
            gone = not Path(f"/proc/{pid}").exists() if here else time.time() - path.stat().st_mtime > FORGOTTEN_SECONDS
            if gone:
                path.unlink()


def _owner(path: Path) -> tuple[str, str]:
    """Host and process number. The host may hold a `-` itself, so that `scorer` and `scorer-2` are told apart here."""
    name, _, pid = path.stem.rpartition("-")
    return name.partition("-")[2], pid


class Stall:
    """Whether a route that holds records has committed nothing for `seconds` while more and more wait."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._alive_at: float | None = None
        self._then: Depth | None = None

    def found(self, holding: bool, alive_at: float, depth: Callable[[], Depth | None]) -> str | None:
        """`alive_at` is the route's last sign of life (`time.monotonic`); `depth` is None while the broker is away."""
        if not holding:
            self._alive_at = None
            return None
        if alive_at != self._alive_at:
            self._alive_at, self._then = alive_at, None
        if self._then is None:
            self._then = depth()
        silent = time.monotonic() - alive_at
        if silent < self._seconds:
            return None
        says = f"nothing was committed for {silent:.0f} s"
        now = depth()
        if now is not None and self._then is not None and (more := _growth(self._then, now)) > 0:
            return f"{says} while {more:,} more tweets came to wait; what this worker held is scored by another"
        # It renews what it holds, so nobody else can have it: for good is too long, whether or not more comes.
        return f"{says} of what this worker keeps from others" if silent > PATIENCE * self._seconds else None


def _growth(then: Depth, now: Depth) -> int:
    """How many more wait to be read; by the stream's length when the server cannot tell."""
    if then.lag is None or now.lag is None:
        return now.length - then.length
    return now.lag - then.lag
