"""One of the processes that train a model together: `accelerate launch -m training.member SOCKET`, see `launch`."""

import logging
import os
import select
import sys
import threading
from logging.handlers import QueueHandler
from multiprocessing.connection import Client, Connection
from typing import Any

import torch
from safetensors.torch import load_file

from training import failpoint
from training.checkpoint import Checkpoints
from training.errors import StopRequested
from training.fit import Hooks, fit
from training.launch import Asked, Done, Failed, Work
from training.model import empty_model
from training.together import Together


def main(address: str) -> None:
    connection = Client(address, "AF_UNIX")
    assert isinstance(connection, Connection)  # noqa: S101
    threading.Thread(target=_end_with, args=(connection,), name="parent", daemon=True).start()
    try:
        connection.send(_run(connection))
    except Exception as error:
        try:
            connection.send(Failed(error))
        except Exception:  # what holds more than words may not be sendable
            connection.send(Failed(RuntimeError(f"{type(error).__name__}: {error}")))
        # Until it is heard: were this process gone, the others would fail too, and say so first.
        threading.Event().wait()


def _run(connection: Connection) -> Done:
    work: Work = connection.recv()
    team = Together(work.cpu, work.weights.with_name("meeting"))
    if team.leads:
        failpoint.arm(work.failpoints)
        logging.getLogger().addHandler(QueueHandler(_Wire(connection)))  # type: ignore[arg-type]
    model = empty_model(work.encoder_config, len(work.inputs.labels), work.inputs.config)
    model.network.load_state_dict(load_file(str(work.weights)))
    team.sum(torch.zeros(()))  # all have read them
    if team.leads:
        work.weights.unlink()  # a parent that is killed cleans nothing up, and these are large
    try:
        fitted = fit(
            model,
            work.inputs,
            device=team.device,
            checkpoints=Checkpoints(work.checkpoints, work.writer),
            board_folder=work.board_folder,
            hooks=_hooks(connection),
            team=team,
        )
    except StopRequested:
        return Done()
    return Done(fitted if team.leads else None)


def _hooks(connection: Connection) -> Hooks:
    """The parent's hooks, from here: they are called where the job is held."""

    def ask(hook: str, *arguments: Any) -> None:
        connection.send(Asked(hook, arguments))
        if not connection.recv():
            raise StopRequested

    return Hooks(
        lambda progress: ask("on_resume", progress),
        lambda *arguments: ask("on_step", *arguments),
        lambda epoch: ask("on_epoch", epoch),
    )


class _Wire:
    """What a `QueueHandler` takes for a queue."""

    def __init__(self, connection: Connection) -> None:
        self.put_nowait = connection.send


def _end_with(connection: Connection) -> None:
    """End at once when the parent is gone, whatever this process is waiting for."""
    gone = select.poll()
    gone.register(connection.fileno(), select.POLLRDHUP)
    gone.poll()
    os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1])
