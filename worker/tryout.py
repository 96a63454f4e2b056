"""The better engine of a model that scores already: looked for beside it, by one process of a machine at a time.

Building and timing every engine takes long and much memory, and may end a process. A child does it, which can be ended
at any moment; what it finds lies where `lineup.py` keeps it, and every worker of the machine takes it from there.

    python -m worker.tryout ORDER    the child; ORDER is an `Order` as JSON, and it ends when its standard input does
"""

import fcntl
import gc
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
from typing import TYPE_CHECKING

import torch
from structlog.contextvars import bound_contextvars

from training.artifact import WEIGHTS, Artifact, load_artifact
from worker.choices import CHOICE, Choice, read_choice
from worker.engines import Engine, Workbench
from worker.errors import TrialFailed
from worker.lineup import first_line, keep, kept_engine, trial_memory, try_out

if TYPE_CHECKING:
    from worker.scorer import Model

log = logging.getLogger(__name__)

LOCK = "lock"
FAILED = 1  # and its last line says why
# How often somebody else's choice is looked for, and how often memory.
LOOK_SECONDS = 1.0
MEMORY_SECONDS = 60.0
CHILD_LOOK_SECONDS = 0.2
# The largest models on the slowest CPUs take minutes. A child that takes longer than this hangs.
LONGEST_SECONDS = 3600.0


@dataclass(frozen=True)
class Order:
    """What a child is to do: `kept` are the places its choice may go to, the first that can be written is taken."""

    artifact: str
    sha256: str
    device: str
    wanted: str
    kept: list[str]
    threads: int = field(default_factory=torch.get_num_threads)


class Tryout:
    """Looks for the better engine of one model in a thread of its own, until it is found or given up.

    `hold` keeps the artifact's files on this machine for as long as they are read; `folder` is where the machine's
    lock lies, None where nobody else is to be waited for. It begins after `after_seconds`.
    """

    def __init__(
        self,
        version_id: int,
        artifact: Artifact,
        order: Order,
        hold: Callable[[], AbstractContextManager[Path]],
        free: Callable[[torch.device], int],
        folder: Path | None,
        after_seconds: float = 0.0,
    ) -> None:
        self._version_id = version_id
        self._artifact: Artifact | None = artifact
        self._order = order
        self._hold, self._free, self._folder, self._after_seconds = hold, free, folder, after_seconds
        self._device = torch.device(order.device)
        self._found: tuple[Engine, Choice] | None = None
        self._unusable: int | None = None
        self._told_full = False
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="tryout", daemon=True)
        self._thread.start()

    def found(self) -> tuple[Engine, Choice] | None:
        """The engine that may take over, ready and warm; None as long as there is none."""
        return None if self._thread.is_alive() else self._found

    def stop(self) -> None:
        """Begin nothing any more, and end the child if there is one. Does not wait."""
        self._stopping.set()

    def end(self) -> None:
        """Stop, and return when the thread and what it held are gone."""
        self.stop()
        self._thread.join()

    def _run(self) -> None:
        with bound_contextvars(model_version=self._version_id):
            try:
                if not self._stopping.wait(self._after_seconds):
                    self._found = self._look()
            except Exception as error:
                log.warning(
                    "model %d stays on the engine it has until it is loaded again (%s: %s)",
                    self._version_id, type(error).__name__, first_line(error),
                )  # fmt: skip
            finally:
                self._artifact = None  # with its weights, unless they serve

    def _look(self) -> tuple[Engine, Choice] | None:
        tried = False
        with self._hold() as folder:
            weights = (folder / WEIGHTS).stat().st_size
            while not self._stopping.is_set():
                pause = LOOK_SECONDS
                if self._news() is not None:
                    if (found := self._kept()) is not None:
                        return found
                    continue
                if tried:
                    raise TrialFailed("what was kept of the trial cannot be used")
                with self._alone() as descriptor:
                    if descriptor is not None and self._news() is None:
                        if tried := self._has_room(trial_memory(weights)):
                            self._try_out(descriptor)
                            continue
                        pause = MEMORY_SECONDS
                self._stopping.wait(pause)
        return None

    # --- what was kept, by this worker's child or another's

    def _stamp(self) -> int | None:
        """When the newest choice was made."""
        paths = [Path(folder) / CHOICE for folder in self._order.kept]
        return max((path.stat().st_mtime_ns for path in paths if path.is_file()), default=None)

    def _news(self) -> int | None:
        """The stamp of a choice that was not found unusable."""
        stamp = self._stamp()
        return None if stamp == self._unusable else stamp

    def _kept(self) -> tuple[Engine, Choice] | None:
        stamp = self._news()
        if stamp is None or self._artifact is None:
            return None
        found = kept_engine(self._artifact, self._device, list(map(Path, self._order.kept)))
        if found is None:
            self._unusable = stamp
        return found

    # --- trying out

    def _has_room(self, needed: float) -> bool:
        """Whether there is memory for it; says it once when there is none."""
        if (free := self._free(self._device)) >= needed:
            return True
        if not self._told_full:
            log.warning(
                "model %d stays on its engine as long as memory is short: another may take %d MB and %d are free",
                self._version_id, needed / 1e6, free / 1e6,
            )  # fmt: skip
            self._told_full = True
        return False

    @contextmanager
    def _alone(self) -> Iterator[int | None]:
        """The lock that one process of this machine has at a time, None while another has it. It falls when the last
        process that holds the descriptor is gone."""
        if self._folder is None:
            yield -1
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self._folder / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = True
        except BlockingIOError:
            held = False
        except OSError as error:
            log.info("this file system has no locks (%s), so nobody else is waited for", error)
            held = True
        try:
            yield descriptor if held else None
        finally:
            os.close(descriptor)

    def _try_out(self, descriptor: int) -> None:
        """Let a child try all engines out and keep what it finds; raises `TrialFailed`."""
        log.info("model %d: trying engines out beside it", self._version_id)
        began = time.monotonic()
        with tempfile.TemporaryFile() as output, _started(self._order, descriptor, output.fileno()) as child:
            while child.poll() is None:
                if time.monotonic() - began > LONGEST_SECONDS:
                    raise TrialFailed(f"trying engines out took longer than {LONGEST_SECONDS:.0f} s")
                if self._stopping.wait(CHILD_LOOK_SECONDS):
                    return
            if child.returncode:
                output.seek(0)
                said = output.read().decode(errors="replace").strip().splitlines()
                why = said[-1] if said and child.returncode == FAILED else f"exit {child.returncode}"
                raise TrialFailed(f"trying engines out failed: {why}")
        for trial in next((choice.trials for choice in map(read_choice, map(Path, self._order.kept)) if choice), []):
            log.info("engine %s %s", trial.engine, trial.says or "was not needed")


class Served:
    """A model that changes to its better engine, between windows, once that is found beside it."""

    def __init__(self, model: "Model", token_budget: int | None, after_seconds: float = 0.0) -> None:
        """`token_budget` None takes what was found for the engine."""
        self.model = model
        self._token_budget = token_budget
        self._tryout = model.untried(after_seconds) if model.untried else None
        model.untried = None  # it holds the weights

    def current(self) -> "Model":
        """The model for the next window."""
        if self._tryout is not None and (found := self._tryout.found()) is not None:
            (engine, choice), before = found, self.model.engine
            if engine.name == before.name:
                engine = before
                log.info("model %d: %s stays; it %s", self.model.version_id, engine.name, choice.why)
            else:
                log.info(
                    "model %d: %s takes over from %s; it %s",
                    self.model.version_id, engine.name, before.name, choice.why,
                )  # fmt: skip
            self.model = self.model.on(engine, choice, self._token_budget or choice.token_budget)
            self._tryout = None
            settle_memory()
        return self.model

    def stop(self) -> None:
        """Look for no better engine any more. Does not wait."""
        if self._tryout is not None:
            self._tryout.stop()

    def end(self) -> None:
        """Look for no better engine any more, and return when nothing is left of the search."""
        if self._tryout is not None:
            self._tryout.end()


def settle_memory() -> None:
    """Take what is loaded out of the garbage collector's sight: a look through all of it stops scoring for 0.2 s."""
    gc.unfreeze()  # the model before this one among it
    gc.collect()
    gc.freeze()


@contextmanager
def _started(order: Order, descriptor: int, output: int) -> Iterator[subprocess.Popen[bytes]]:
    """The child, gone when the block ends. It shares the lock: as long as it computes, nobody else does."""
    child = subprocess.Popen(
        [sys.executable, "-P", "-m", "worker.tryout", json.dumps(asdict(order))],
        stdin=subprocess.PIPE,
        stdout=output,
        stderr=output,
        pass_fds=[descriptor] if descriptor >= 0 else [],
        start_new_session=True,  # a Ctrl-C reaches the worker alone, which ends the child
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


def _be_the_first_to_go() -> None:
    """When memory ends, the kernel is to end the process that tries before the one that scores."""
    try:
        Path("/proc/self/oom_score_adj").write_text("1000")
    except OSError as error:
        log.debug("the kernel takes no word on who is to go first: %s", error)


def run(order: Order) -> None:
    """Try all engines out and keep the choice. Raises what keeps it from being made or kept."""
    torch.set_num_threads(order.threads)
    device = torch.device(order.device)
    artifact = load_artifact(Path(order.artifact), order.sha256)
    bench = Workbench(artifact.model, device)
    _, choice = try_out(bench, artifact, device, order.wanted)
    if not keep(list(map(Path, order.kept)), bench, choice):
        raise TrialFailed("the choice of an engine can be kept nowhere")


def main() -> int:
    _end_with_parent()
    _be_the_first_to_go()
    logging.basicConfig(level="INFO", format="%(message)s")
    try:
        run(Order(**json.loads(sys.argv[1])))
    except Exception as error:
        print(f"{type(error).__name__}: {first_line(error)}", file=sys.stderr)
        return FAILED
    return 0


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    os._exit(code)  # what the libraries do when they are taken down is of no use to anybody
