"""Supervise workers as child processes: start, watch, restart and stop them."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from worker.exit_codes import describe_exit
from worker.settings import Settings, environment_name

# The process that supervises a worker; the worker ends when that process has ended.
PARENT_VARIABLE = "TWEETSCORE_PARENT"
# A child that outlives its own grace period by this much is killed.
KILL_AFTER_SECONDS = 5.0
FIRST_PAUSE_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 60.0
# After this uptime an exit does not count as a failed start, and the pause starts over.
HEALTHY_SECONDS = 60.0


@dataclass
class ChildProcess:
    role: str
    log: Path
    process: subprocess.Popen[bytes]
    started_at: float
    pause: float = FIRST_PAUSE_SECONDS
    restart_at: float | None = None


@dataclass
class Supervisor:
    """The worker processes of one `up`, `demo` or `train --wait`. `notify` receives messages for the user."""

    settings: Settings
    notify: Callable[[str], None]
    children: list[ChildProcess] = field(default_factory=list)

    def start(self, role: str) -> None:
        same_role = sum(child.role == role for child in self.children)
        log = self.settings.logs / (f"{role}-{same_role + 1}.log" if same_role else f"{role}.log")
        self.children.append(ChildProcess(role, log, self._spawn(role, log), time.monotonic()))

    def watch(self) -> None:
        """Restart children that ended, after a pause that doubles while they end soon after the start.

        Does not block; call it about once a second.
        """
        now = time.monotonic()
        for child in self.children:
            code = child.process.poll()
            if code is None:
                continue
            if child.restart_at is None:
                if now - child.started_at >= HEALTHY_SECONDS:
                    child.pause = FIRST_PAUSE_SECONDS
                child.restart_at = now + child.pause
                self.notify(
                    f"the {child.role} worker ended ({describe_exit(code)}), starting it again in {child.pause:.0f} s; "
                    f"log: {child.log}"
                )
                child.pause = min(LONGEST_PAUSE_SECONDS, 2 * child.pause)
            elif now >= child.restart_at:
                child.process, child.started_at = self._spawn(child.role, child.log), now
                child.restart_at = None

    def stop(self) -> None:
        """Terminate every child and wait: it commits its window or checkpoints its job.

        Kill it after the grace period.
        """
        for child in self.children:
            if child.process.poll() is None:
                child.process.send_signal(signal.SIGTERM)
        patience = self.settings.grace_seconds + KILL_AFTER_SECONDS
        deadline = time.monotonic() + patience
        for child in self.children:
            try:
                child.process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                self.notify(f"the {child.role} worker did not end within {patience:.0f} s and was killed")
                child.process.kill()
                child.process.wait()

    def kill(self) -> None:
        """Kill every child. Records and jobs they held are taken over by other workers later."""
        for child in self.children:
            if child.process.poll() is None:
                child.process.kill()

    def _spawn(self, role: str, log: Path) -> subprocess.Popen[bytes]:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            return subprocess.Popen(
                # -P: do not import from a folder named `worker` in the current directory.
                [sys.executable, "-P", "-m", "worker.cli", "worker", role],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **child_environment(self.settings), PARENT_VARIABLE: str(os.getpid())},
                start_new_session=True,  # Ctrl-C reaches only this process, which stops the children in order
            )


def child_environment(settings: Settings) -> dict[str, str]:
    """Environment variables for a child process, so that settings given in code apply there too."""
    given = settings.model_dump(exclude_none=True, exclude_defaults=True)
    return {environment_name(name): _as_variable(value) for name, value in given.items()}


def _as_variable(value: Any) -> str:
    if isinstance(value, tuple):
        return (":" if all(isinstance(part, Path) for part in value) else " ").join(map(str, value))
    if isinstance(value, dict):
        return ",".join(f"{name}={part}" for name, part in value.items())
    return str(value)


def limit_spin_waiting() -> None:
    """Limit how long OpenMP threads spin. Call this in a worker process before torch is loaded.

    OpenMP threads spin for milliseconds while they wait for each other. Next to another busy process, such as a scoring
    worker, this halves the speed of training. Without one, the lower limit costs about a tenth.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def keep_compiled_code(folder: Path) -> None:
    """Let `torch.compile` keep its code in `folder`. Call this in a worker process before torch is loaded.

    By default the code is in a folder of temporary files, and a process per core is started to compile: for what a
    worker compiles this takes longer than to compile, and eight workers would use all cores for half a minute.
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")


@contextmanager
def supervise(settings: Settings, roles: Sequence[str], notify: Callable[[str], None]) -> Iterator[Supervisor]:
    """Start a worker for each role, and stop them all at the end."""
    supervisor = Supervisor(settings, notify)
    try:
        for role in roles:
            supervisor.start(role)
        yield supervisor
    finally:
        supervisor.stop()
