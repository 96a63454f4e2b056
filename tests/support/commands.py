"""`tweetscore worker ROLE` and `tweetscore up` as processes of their own."""

import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from tests.conftest import PATIENCE_SECONDS, wait_until
from worker.process.supervisor import child_environment
from worker.settings import load_settings


class Command:
    """One process that writes its output to a file. With `under`, that program starts it and watches it."""

    def __init__(self, output: Path, given: dict[str, Any], *arguments: str, under: Sequence[str] = ()) -> None:
        self.output, self.watching = output, bool(under)
        output.parent.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, **child_environment(load_settings(**given))}
        with output.open("ab") as file:
            self.process = subprocess.Popen(
                [*under, sys.executable, "-P", "-m", "worker.cli", *arguments],
                stdin=subprocess.DEVNULL, stdout=file, stderr=file, env={**environment, "COLUMNS": "200"},
            )  # fmt: skip

    def said(self) -> str:
        return self.output.read_text(encoding="utf-8", errors="replace")

    def says(self, text: str) -> None:
        wait_until(lambda: text in self.said() or self.process.poll() is not None)
        assert text in self.said(), self.said()[-2000:]

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def ended(self) -> int:
        return self.process.wait(PATIENCE_SECONDS)

    def family(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def end(self) -> None:
        if self.process.poll() is None:
            # Kill the children first: without its parent a child would go on.
            for process in [*self.family(), self.process] if self.watching else [self.process]:
                process.kill()
        self.process.wait()


@contextmanager
def command(output: Path, given: dict[str, Any], *arguments: str) -> Iterator[Command]:
    running = Command(output, given, *arguments)
    try:
        yield running
    finally:
        running.end()


@contextmanager
def worker(given: dict[str, Any], role: str, failpoints: str = "", **more: Any) -> Iterator[Command]:
    """`tweetscore worker ROLE`, once it is ready."""
    output = Path(given["home"]) / "logs" / f"{role}-{uuid.uuid4().hex}.log"
    with command(output, {**given, "failpoints": failpoints, **more}, "worker", role) as running:
        wait_until(lambda: " ready." in running.said() or running.process.poll() is not None)
        yield running
