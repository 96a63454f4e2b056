"""Workers as child processes: started, watched, restarted, stopped. Knows processes, not what they do."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from worker.pulse import ENDINGS
from worker.settings import Settings, environment_name

# Names the process a worker belongs to: it ends when that process is gone.
PARENT_VARIABLE = "TWEETSCORE_PARENT"
# What a child may take beyond its own grace period before it is killed from outside.
KILL_AFTER_SECONDS = 5.0
FIRST_PAUSE_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 60.0
# A worker that lived this long was not killed by its own start.
HEALTHY_SECONDS = 60.0


@dataclass
class Child:
    role: str
    log: Path
    process: subprocess.Popen[bytes]
    started_at: float
    pause: float = FIRST_PAUSE_SECONDS
    restart_at: float | None = None


@dataclass
class Workers:
    """The children of one `up` or `demo`."""

    settings: Settings
    say: Callable[[str], None]
    children: list[Child] = field(default_factory=list)

    def start(self, role: str) -> None:
        of_role = sum(child.role == role for child in self.children)
        log = self.settings.logs / (f"{role}-{of_role + 1}.log" if of_role else f"{role}.log")
        self.children.append(Child(role, log, self._spawn(role, log), time.monotonic()))

    def watch(self) -> None:
        """Restart what has died, after a pause that doubles while it keeps dying young. Call it every second or so."""
        now = time.monotonic()
        for child in self.children:
            code = child.process.poll()
            if code is None:
                continue
            if child.restart_at is None:
                if now - child.started_at >= HEALTHY_SECONDS:
                    child.pause = FIRST_PAUSE_SECONDS
                child.restart_at = now + child.pause
                self.say(
                    f"the {child.role} worker ended ({ending(code)}), starting it again in {child.pause:.0f} s; "
                    f"log: {child.log}"
                )
                child.pause = min(LONGEST_PAUSE_SECONDS, 2 * child.pause)
            elif now >= child.restart_at:
                child.process, child.started_at = self._spawn(child.role, child.log), now
                child.restart_at = None

    def stop(self) -> None:
        """End every child: it finishes its window or checkpoints its job; after the grace period it is killed."""
        for child in self.children:
            if child.process.poll() is None:
                child.process.send_signal(signal.SIGTERM)
        patience = self.settings.grace_seconds + KILL_AFTER_SECONDS
        deadline = time.monotonic() + patience
        for child in self.children:
            try:
                child.process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                self.say(f"the {child.role} worker did not end within {patience:.0f} s and was killed")
                child.process.kill()
                child.process.wait()

    def kill(self) -> None:
        """End every child at once: nothing is lost, and what they held waits for others."""
        for child in self.children:
            if child.process.poll() is None:
                child.process.kill()

    def _spawn(self, role: str, log: Path) -> subprocess.Popen[bytes]:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            return subprocess.Popen(
                # -P: a folder named `worker` where the user happens to stand is none of ours.
                [sys.executable, "-P", "-m", "worker.cli", "worker", role],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **child_environment(self.settings), PARENT_VARIABLE: str(os.getpid())},
                start_new_session=True,  # a Ctrl-C reaches us alone, and we stop the children in order
            )


def child_environment(settings: Settings) -> dict[str, str]:
    """The settings as a child reads them, so that values given in code hold there too."""
    given = settings.model_dump(exclude_none=True, exclude_defaults=True)
    values = {
        name: ":".join(map(str, value)) if isinstance(value, tuple) else str(value) for name, value in given.items()
    }
    return {environment_name(name): value for name, value in values.items()}


def let_waiting_threads_sleep() -> None:
    """For a worker's process, before torch is loaded, which reads it then.

    Threads that compute together wait for each other awake, by default for milliseconds. Beside another busy process, a
    scorer above all, that halves the speed of training; waiting this briefly costs a tenth when there is none.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")


@contextmanager
def workers(settings: Settings, roles: Sequence[str], say: Callable[[str], None]) -> Iterator[Workers]:
    running = Workers(settings, say)
    try:
        for role in roles:
            running.start(role)
        yield running
    finally:
        running.stop()


def ending(code: int) -> str:
    """What a process's exit code says: `SIGKILL`, or `exit 75: it hung`."""
    if code >= 0:
        return f"exit {code}: {ENDINGS[code]}" if code in ENDINGS else f"exit {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"
