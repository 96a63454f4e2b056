"""A model trained on several devices: `fit` in a process each, started by `accelerate launch` and held from here.

This process keeps the job, its lease and the hooks; those it starts compute. What they are to do goes to them over a
socket of this machine, and what became of it comes back. They end when this end of the socket is gone.
"""

import logging
import os
import re
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from signal import SIGKILL, SIGTERM
from typing import IO, Any

import torch
from transformers import PretrainedConfig

from training import failpoint
from training.artifact import WEIGHTS, save_weights
from training.checkpoint import Checkpoints
from training.devices import pick_device
from training.errors import StopRequested, TeamBroken
from training.fit import FitInputs, Fitted, Hooks, fit
from training.model import Classifier

VISIBLE = "CUDA_VISIBLE_DEVICES"
LOOK_SECONDS = 0.5
# What processes may take to end by themselves before they are ended.
ENDING_SECONDS = 10.0


@dataclass(frozen=True)
class Work:
    """What every process of a team is sent. All begin with the weights that lie in `weights`."""

    encoder_config: PretrainedConfig
    weights: Path
    inputs: FitInputs
    checkpoints: Path
    writer: int
    board_folder: Path
    cpu: bool
    failpoints: str


@dataclass(frozen=True)
class Asked:
    """A hook that the leader calls, and waits for: True comes back to go on, False to stop at a checkpoint."""

    hook: str
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class Failed:
    error: Exception


@dataclass(frozen=True)
class Done:
    """A process has come to its end; the leader's says what was reached, None where it was told to stop."""

    fitted: Fitted | None = None


def fit_on(
    devices: Sequence[str],
    model: Classifier,
    inputs: FitInputs,
    *,
    checkpoints: Checkpoints,
    board_folder: Path,
    hooks: Hooks,
) -> Fitted:
    """`fit` on every one of `devices`, in this process if there is one. `model` ends up on the first.

    Raises what `fit` raises, and `TeamBroken` when one of several processes is gone.
    """
    device = pick_device(devices[0])
    if len(devices) == 1:
        return fit(model, inputs, device=device, checkpoints=checkpoints, board_folder=board_folder, hooks=hooks)
    checkpoints.fetch()
    with tempfile.TemporaryDirectory(prefix="tweetscore-") as scratch:
        weights = Path(scratch) / WEIGHTS
        save_weights(weights, model)
        work = Work(
            model.encoder_config,
            weights,
            replace(inputs, config=model.config),  # with its pooling settled
            checkpoints.folder,
            checkpoints.writer,
            board_folder,
            device.type == "cpu",
            failpoint.armed(),
        )
        try:
            with _launched(devices, work, Path(scratch)) as team:
                fitted = _attend(team, hooks, checkpoints)
        finally:
            checkpoints.follow()
    checkpoints.load_best(fitted.best, model)
    model.to(device).eval()
    return fitted


def _attend(team: list[Connection], hooks: Hooks, checkpoints: Checkpoints) -> Fitted:
    """Answer the leader until all have come to their end."""
    fitted: Fitted | None = None
    stop: StopRequested | None = None
    while team:
        for connection in wait(team):
            assert isinstance(connection, Connection)  # noqa: S101
            message = _receive(connection)
            if isinstance(message, logging.LogRecord):
                logging.getLogger(message.name).handle(message)
            elif isinstance(message, Failed):
                for other in wait([other for other in team if other is not connection], LOOK_SECONDS):
                    _receive(other)  # type: ignore[arg-type] # raises where the one's failure is the other's end
                raise message.error
            elif isinstance(message, Done):
                fitted = message.fitted or fitted
                team.remove(connection)
            elif isinstance(message, Asked):
                try:
                    getattr(hooks, message.hook)(*message.arguments)
                except StopRequested as error:
                    stop = error
                _send(connection, stop is None)
                if message.hook == "on_epoch":  # a checkpoint was written before it
                    checkpoints.follow()
    if stop is not None:
        raise stop
    assert fitted is not None  # noqa: S101 - the leader has one unless it was stopped
    return fitted


def _receive(connection: Connection) -> object:
    try:
        return connection.recv()
    except (EOFError, OSError) as error:
        # One that fails says so and waits: an end without a word is a signal's, or the kernel's for want of memory.
        raise TeamBroken("a process that trained with others was ended from outside") from error


def _send(connection: Connection, message: object) -> None:
    try:
        connection.send(message)
    except OSError as error:
        raise TeamBroken("a process that trained with others was ended from outside") from error


@contextmanager
def _launched(devices: Sequence[str], work: Work, scratch: Path) -> Iterator[list[Connection]]:
    """A connection to each of as many processes as there are devices, the work sent; none of them is left behind."""
    with ExitStack() as at_hand:
        said = at_hand.enter_context((scratch / "said").open("w+", encoding="utf-8", errors="replace"))
        server = at_hand.enter_context(socket.socket(socket.AF_UNIX))
        server.bind(str(scratch / "team"))
        server.listen(len(devices))
        launcher = subprocess.Popen(
            _command(len(devices), scratch / "team"),
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
            env=os.environ | _environment(devices) | {"TMPDIR": str(scratch)},  # what they leave goes with it
            start_new_session=True,  # a Ctrl-C reaches this process alone, which stops the others in order
        )
        at_hand.callback(_end, launcher)
        team = [at_hand.enter_context(connection) for connection in _accepted(server, launcher, said, len(devices))]
        for connection in team:
            _send(connection, work)
        yield list(team)


def _command(count: int, address: Path) -> list[str]:
    threads = max(1, torch.get_num_threads() // count)
    # `--multi_gpu` is the one way to several processes; on CPUs each says so itself.
    options = (
        f"--multi_gpu --num_processes {count} --num_machines 1 --gpu_ids all --mixed_precision no --dynamo_backend no "
        f"--main_process_port 0 --rdzv_backend c10d --rdzv_conf store_type=file --num_cpu_threads_per_process {threads}"
    )
    command = [sys.executable, "-m", "accelerate.commands.launch", *options.split()]
    return [*command, "-m", "training.member", str(address)]


def _environment(devices: Sequence[str]) -> dict[str, str]:
    """The GPUs to see, of those that this process sees; no module from where somebody happens to stand; no network."""
    numbers = [int(device.partition(":")[2]) for device in devices if ":" in device]
    seen = os.environ.get(VISIBLE, "").split(",")
    given = [seen[number] if number < len(seen) and seen[number] else str(number) for number in numbers]
    loopback = {name: os.environ.get(name, "lo") for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")}
    no_server = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    return {"PYTHONSAFEPATH": "1"} | loopback | no_server | ({VISIBLE: ",".join(given)} if given else {})


def _accepted(
    server: socket.socket, launcher: subprocess.Popen[bytes], said: IO[str], count: int
) -> Iterator[Connection]:
    server.settimeout(LOOK_SECONDS)
    while count:
        try:
            accepted, _ = server.accept()
        except TimeoutError:
            if launcher.poll() is not None:
                said.seek(0)
                errors = re.findall(r"^\s*(\w*Error: .*)", said.read(), re.MULTILINE)  # nobody's words are there yet
                why = errors[0] if errors else f"exit {launcher.returncode}"
                raise TeamBroken(f"the processes that train together did not start: {why}") from None
            continue
        accepted.setblocking(True)
        count -= 1
        yield Connection(accepted.detach())


def _end(launcher: subprocess.Popen[bytes]) -> None:
    """The sockets are closed by now, which ends the processes; the launcher follows them."""
    for signal in (None, SIGTERM, SIGKILL):
        if signal is not None:
            launcher.send_signal(signal)
        try:
            launcher.wait(ENDING_SECONDS)
            return
        except subprocess.TimeoutExpired:
            continue
