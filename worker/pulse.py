"""Heartbeat files for health checks, and a watchdog that ends a worker process that hangs.

A healthy worker writes HOME/run/KIND-HOST-PID.json every few seconds. The file lies on local disk and not on the broker
or in SQL, so an outage of either does not make workers look dead. The name contains the host because containers may
share a home.
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

from worker.exit_codes import GRACE_EXIT, POLLER_DIED_EXIT
from worker.stream import Depth

log = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 2.0
# A heartbeat is stale after this; a loaded machine may miss a few beats.
STALE_SECONDS = 20.0
# Heartbeats of other hosts, such as removed containers, are deleted after this.
REMOVE_AFTER_SECONDS = 86_400.0
# Loading a model may take this many times `stall_seconds`, and so may a window while no more tweets arrive.
SLOW_STALL_FACTOR = 10


class Heartbeat:
    """Writes the heartbeat file from its own thread and ends the process when `find_failure` reports a failure.

    `find_failure` returns an exit code and a reason, or None. `waiting_for` returns what a healthy worker waits for.
    The callbacks must not block: a heartbeat that waits for a server looks like a dead worker.
    """

    def __init__(
        self, folder: Path, kind: str, state: Callable[[], str], find_failure: Callable[[], tuple[int, str] | None],
        waiting_for: Callable[[], str | None],
    ) -> None:  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        _remove_dead(folder)
        self._path = folder / f"{kind}-{socket.gethostname()}-{os.getpid()}.json"
        self._kind = kind
        self._state = state
        self._find_failure = find_failure
        self._waiting_for = waiting_for
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._done.set()
        self._path.unlink(missing_ok=True)

    def _run(self) -> None:
        try:
            while True:
                if failure := self._find_failure():
                    end_at_once(*failure)
                self._write()
                if self._done.wait(HEARTBEAT_SECONDS):
                    self._path.unlink(missing_ok=True)  # `stop` may have run while the file was written
                    return
        except Exception:
            log.exception("the heartbeat failed")
            end_at_once(POLLER_DIED_EXIT, "the heartbeat thread died; its error is logged above")

    def _write(self) -> None:
        beat = {"kind": self._kind, "pid": os.getpid(), "at": time.time(), "state": self._state()}
        beat |= {"waits_for": self._waiting_for()}
        try:
            self._path.write_text(json.dumps(beat))
        except OSError as error:
            log.warning("the heartbeat could not be written: %s", error)


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


def find_heartbeat(folder: Path, kind: str) -> tuple[str, float] | None:
    """Return the process id and age in seconds of this host's newest heartbeat of a kind.

    Deletes the heartbeats of dead processes.
    """
    _remove_dead(folder)
    found = []
    for path in folder.glob(f"{kind}-*.json"):
        host, pid = _host_and_pid(path)
        with contextlib.suppress(FileNotFoundError):
            if host == socket.gethostname():
                found.append((max(0.0, time.time() - path.stat().st_mtime), pid))
    if not found:
        return None
    age, pid = min(found)
    return pid, age


def find_waiting_reason(folder: Path, kind: str, pid: str) -> str | None:
    """Return what a worker of this host waits for before it can work, according to its heartbeat; None if nothing."""
    try:
        reason = json.loads((folder / f"{kind}-{socket.gethostname()}-{pid}.json").read_text()).get("waits_for")
    except (OSError, ValueError, AttributeError):  # the worker ended, or is writing the file
        return None
    return None if reason is None else str(reason)


def _remove_dead(folder: Path) -> None:
    """Delete the heartbeats of this host's dead processes and of hosts that have been silent for a day."""
    for path in folder.glob("*-*.json"):
        host, pid = _host_and_pid(path)
        with contextlib.suppress(FileNotFoundError):
            if host == socket.gethostname():
                dead = not Path(f"/proc/{pid}").exists()
            else:
                dead = time.time() - path.stat().st_mtime > REMOVE_AFTER_SECONDS
            if dead:
                path.unlink()


def _host_and_pid(path: Path) -> tuple[str, str]:
    """Split KIND-HOST-PID.json.

    HOST may contain `-`, so the kind ends at the first dash and the pid starts at the last.
    """
    name, _, pid = path.stem.rpartition("-")
    return name.partition("-")[2], pid


class StallDetector:
    """Detects a pipeline that holds records and commits nothing for `seconds` while the backlog grows."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._alive_at: float | None = None
        self._depth_before: Depth | None = None

    def check(self, holding: bool, alive_at: float, depth: Callable[[], Depth | None]) -> str | None:
        """Return why the pipeline counts as stalled, or None.

        `alive_at` is the time of its last commit or other progress (`time.monotonic`). `depth` returns None while the
        broker is away.
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
