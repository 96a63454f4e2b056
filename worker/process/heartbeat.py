"""Heartbeat files for health checks, written by a thread that also ends a worker process that has failed.

A healthy worker writes HOME/run/KIND-HOST-PID.json every few seconds. The file lies on local disk and not on the broker
or in SQL, so an outage of either does not make workers look dead. The name contains the host because containers may
share a home.
"""

import contextlib
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from worker.exit_codes import POLLER_DIED_EXIT
from worker.process.watchdog import end_at_once

log = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 2.0
# A heartbeat is stale after this; a loaded machine may miss a few beats.
STALE_SECONDS = 20.0
# Heartbeats of other hosts, such as removed containers, are deleted after this.
REMOVE_AFTER_SECONDS = 86_400.0


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
            # Replaced as a whole: a reader in between would find an empty file, and no worker.
            fresh = self._path.with_suffix(".new")
            fresh.write_text(json.dumps(beat))
            fresh.replace(self._path)
        except OSError as error:
            log.warning("the heartbeat could not be written: %s", error)


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


@dataclass(frozen=True)
class Beat:
    """A worker's newest heartbeat. `state`: idle, working, waiting, ending or loading a model."""

    kind: str
    host: str
    pid: str
    state: str
    waits_for: str | None
    age_seconds: float

    @property
    def stale(self) -> bool:
        return self.age_seconds > STALE_SECONDS


def read_heartbeats(folder: Path) -> list[Beat]:
    """Return the last heartbeats, without those of this host's dead processes. Deletes nothing."""
    found = []
    for path in sorted(folder.glob("*-*.json")):
        host, pid = _host_and_pid(path)
        if host == socket.gethostname() and not Path(f"/proc/{pid}").exists():
            continue
        with contextlib.suppress(OSError, ValueError, AttributeError):  # the worker ended, or is writing the file
            beat, age = json.loads(path.read_text()), max(0.0, time.time() - path.stat().st_mtime)
            waits_for = beat.get("waits_for")
            kind = path.stem.partition("-")[0]
            found.append(Beat(kind, host, pid, str(beat.get("state")), waits_for and str(waits_for), age))
    return found


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
