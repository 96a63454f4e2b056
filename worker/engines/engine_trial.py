"""Try engines in the background while a model serves, in one process of a machine at a time.

Building and timing every engine takes minutes and much memory, and may crash. A child process does it and can be killed
at any moment. It saves its result as `engine_selection.py` describes, and every worker of the machine loads it there.

The child process is `python -c START REQUEST`, where REQUEST is a `TrialRequest` as JSON. It ends when its standard
input closes.
"""

import fcntl
import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NoReturn

import torch
from structlog.contextvars import bound_contextvars

from training.model.artifact import WEIGHTS, Artifact, load_artifact
from training.model.devices import bound_memory
from worker.engines.engine_choice import CHOICE, Choice, read_choice
from worker.engines.engine_selection import first_line, load_saved_engine, save_choice, select_engine, trial_memory
from worker.engines.engines import Engine, EngineBuilder
from worker.errors import TrialFailed

log = logging.getLogger(__name__)

LOCK = "lock"
# transformers imports both packages where they are installed, and a trial needs neither: a tenth of an import's time.
START = (
    "import gc, sys; gc.disable(); sys.modules['accelerate'] = sys.modules['scipy'] = None; "
    "from worker.engines.engine_trial import end_with_trial; end_with_trial()"
)
FAILED = 1  # exit code of a child whose last line of output is the reason
# Polling intervals: for a choice that another process saved, and for free memory.
POLL_SECONDS = 1.0
MEMORY_SECONDS = 60.0
CHILD_POLL_SECONDS = 0.2
# The largest models on the slowest CPUs take minutes; a child that runs this long hangs.
TRIAL_TIMEOUT_SECONDS = 3600.0


@dataclass(frozen=True)
class TrialRequest:
    """The work of a child: its choice goes to the first of `folders` that can be written."""

    artifact: str
    sha256: str
    device: str
    wanted: str
    folders: list[str]
    threads: int = field(default_factory=torch.get_num_threads)
    # A trial with more memory than the worker would choose a token budget that the worker cannot use.
    memory_share: float = 1.0


class EngineTrial:
    """Finds a faster engine for one model, in a background thread that starts after `after_seconds`.

    `hold` keeps the files of the artifact on this machine while they are read. `lock_folder` holds the lock that the
    workers of this machine share; None disables it. `free_bytes` returns the free memory of a device.
    """

    def __init__(
        self,
        version_id: int,
        artifact: Artifact,
        request: TrialRequest,
        hold: Callable[[], AbstractContextManager[Path]],
        free_bytes: Callable[[torch.device], int],
        lock_folder: Path | None,
        after_seconds: float = 0.0,
    ) -> None:
        self._version_id = version_id
        self._artifact: Artifact | None = artifact
        self._request = request
        self._hold, self._free_bytes, self._lock_folder = hold, free_bytes, lock_folder
        self._after_seconds = after_seconds
        self._device = torch.device(request.device)
        self._result: tuple[Engine, Choice] | None = None
        self._unusable: int | None = None
        self._memory_warned = False
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="engine-trial", daemon=True)
        self._thread.start()

    def result(self) -> tuple[Engine, Choice] | None:
        """The chosen engine, warmed up; None until there is one."""
        return None if self._thread.is_alive() else self._result

    def stop(self) -> None:
        """Start nothing more and kill a running child. Does not wait."""
        self._stopping.set()

    def close(self) -> None:
        """Stop and wait for the thread."""
        self.stop()
        self._thread.join()

    def _run(self) -> None:
        with bound_contextvars(model_version=self._version_id):
            try:
                if not self._stopping.wait(self._after_seconds):
                    self._result = self._find_engine()
            except Exception as error:
                log.warning(
                    "model %d keeps its engine until it is loaded again (%s: %s)",
                    self._version_id, type(error).__name__, first_line(error),
                )  # fmt: skip
            finally:
                self._artifact = None  # releases the weights, unless they serve

    def _find_engine(self) -> tuple[Engine, Choice] | None:
        tried = False
        with self._hold() as folder:
            needed = trial_memory((folder / WEIGHTS).stat().st_size)
            while not self._stopping.is_set():
                if self._new_choice() is not None:
                    if (found := self._load_choice()) is not None:
                        return found
                    continue
                if tried:
                    raise TrialFailed("the engine that the trial saved cannot be used")
                pause = POLL_SECONDS
                with self._machine_lock() as descriptor:
                    if descriptor is not None and self._new_choice() is None:
                        if tried := self._has_memory(needed):
                            self._run_child(descriptor)
                            continue
                        pause = MEMORY_SECONDS
                self._stopping.wait(pause)
        return None

    # --- the choice saved by this worker's child or another's

    def _new_choice(self) -> int | None:
        """The modification time of the newest saved choice; None when there is none or it was found unusable."""
        paths = [Path(folder) / CHOICE for folder in self._request.folders]
        newest = max((path.stat().st_mtime_ns for path in paths if path.is_file()), default=None)
        return None if newest == self._unusable else newest

    def _load_choice(self) -> tuple[Engine, Choice] | None:
        newest = self._new_choice()
        if newest is None or self._artifact is None:
            return None
        found = load_saved_engine(self._artifact, self._device, list(map(Path, self._request.folders)))
        if found is None:
            self._unusable = newest
        return found

    # --- the trial

    def _has_memory(self, needed: float) -> bool:
        """Whether there is enough free memory; a lack is logged once."""
        if (free := self._free_bytes(self._device)) >= needed:
            return True
        if not self._memory_warned:
            log.warning(
                "model %d keeps its engine while memory is short: a trial of the others may take %d MB, %d are free",
                self._version_id, needed / 1e6, free / 1e6,
            )  # fmt: skip
            self._memory_warned = True
        return False

    @contextmanager
    def _machine_lock(self) -> Iterator[int | None]:
        """Yield the descriptor of the machine's lock; None while another process holds it. The lock is released when
        the last process that inherited the descriptor ends."""
        if self._lock_folder is None:
            yield -1
            return
        self._lock_folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self._lock_folder / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = True
        except BlockingIOError:
            held = False
        except OSError as error:
            log.info("the file system has no locks (%s); other workers may run a trial at the same time", error)
            held = True
        try:
            yield descriptor if held else None
        finally:
            os.close(descriptor)

    def _run_child(self, descriptor: int) -> None:
        """Wait for a child that tries all engines and saves its choice; raises `TrialFailed`."""
        log.info("model %d: trying engines in the background", self._version_id)
        began = time.monotonic()
        with tempfile.TemporaryFile() as output, _child_process(self._request, descriptor, output.fileno()) as child:
            while child.poll() is None:
                if time.monotonic() - began > TRIAL_TIMEOUT_SECONDS:
                    raise TrialFailed(f"the trial of engines took longer than {TRIAL_TIMEOUT_SECONDS:.0f} s")
                if self._stopping.wait(CHILD_POLL_SECONDS):
                    return
            if child.returncode:
                output.seek(0)
                lines = output.read().decode(errors="replace").strip().splitlines()
                reason = lines[-1] if lines and child.returncode == FAILED else f"exit {child.returncode}"
                raise TrialFailed(f"the trial of engines failed: {reason}")
        for folder in map(Path, self._request.folders):
            if (choice := read_choice(folder)) is not None:
                for trial in choice.trials:
                    log.info("engine %s %s", trial.engine, trial.verdict or "was not needed")
                break


@contextmanager
def _child_process(request: TrialRequest, descriptor: int, output: int) -> Iterator[subprocess.Popen[bytes]]:
    """The child, killed when the block ends. It inherits the lock, so no other process runs a trial while it works."""
    child = subprocess.Popen(
        [sys.executable, "-P", "-c", START, json.dumps(asdict(request))],
        stdin=subprocess.PIPE,
        stdout=output,
        stderr=output,
        pass_fds=[descriptor] if descriptor >= 0 else [],
        start_new_session=True,  # Ctrl-C reaches only the worker, which ends the child
    )
    try:
        yield child
    finally:
        child.kill()
        child.communicate()


def _end_with_parent() -> None:
    def wait() -> None:
        os.read(0, 1)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _prefer_for_oom_kill() -> None:
    """When memory runs out, the kernel should kill the trial and not the worker."""
    try:
        Path("/proc/self/oom_score_adj").write_text("1000")
    except OSError as error:
        log.debug("oom_score_adj cannot be set: %s", error)


def run_trial(request: TrialRequest) -> None:
    """Try all engines and save the choice. Raises `TrialFailed` when it cannot be saved, or any error of the trial."""
    torch.set_num_threads(request.threads)
    device = torch.device(request.device)
    bound_memory(device, request.memory_share)
    artifact = load_artifact(Path(request.artifact), request.sha256)
    builder = EngineBuilder(artifact.model, device)
    _, choice = select_engine(builder, artifact, device, request.wanted)
    if not save_choice(list(map(Path, request.folders)), builder, choice):
        raise TrialFailed(f"no folder for the choice can be written: {', '.join(request.folders)}")


def main() -> int:
    _end_with_parent()
    _prefer_for_oom_kill()
    logging.basicConfig(level="INFO", format="%(message)s")
    try:
        run_trial(TrialRequest(**json.loads(sys.argv[1])))
    except Exception as error:
        print(f"{type(error).__name__}: {first_line(error)}", file=sys.stderr)
        return FAILED
    return 0


def end_with_trial() -> NoReturn:
    """Run the trial of the command line and end the process."""
    code = main()
    sys.stderr.flush()
    os._exit(code)  # skips the libraries' shutdown, which takes time and may crash
