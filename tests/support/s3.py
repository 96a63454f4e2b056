"""An S3 server (moto) in a process of its own. A test may kill and restart it, which deletes its objects."""

import contextlib
import http.client
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import fsspec
import s3fs

from tests.conftest import wait_until

BUCKET = "tweetscore"


class S3:
    """`environment` holds the address and the credentials for clients."""

    def __init__(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port: int = free.getsockname()[1]
        self.environment = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_ACCESS_KEY_ID": "tester",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_MAX_ATTEMPTS": "1",  # so that clients give up a killed server sooner
        }
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        wait_until(self._answers, every=0.1)
        self.files.mkdir(f"/{BUCKET}")

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    @property
    def files(self) -> "s3fs.S3FileSystem":
        url = f"http://127.0.0.1:{self.port}"
        found = fsspec.filesystem("s3", endpoint_url=url, key="tester", secret="secret")
        found.invalidate_cache()
        return found

    def url(self, name: str) -> str:
        return f"s3://{BUCKET}/{name}"

    def names(self, name: str = "") -> list[str]:
        return sorted(path.removeprefix(f"{BUCKET}/") for path in self.files.find(f"{BUCKET}/{name}"))

    @contextmanager
    def killed_after(self, sent: int) -> Iterator[None]:
        """Kill the server once it has sent so many bytes to clients that were made in the block."""
        with socket.create_server(("127.0.0.1", 0)) as door:
            os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{door.getsockname()[1]}"
            s3fs.S3FileSystem.clear_instance_cache()  # so that new clients connect to this address
            threading.Thread(target=self._let_in, args=(door, [sent]), daemon=True).start()
            try:
                yield
            finally:
                os.environ["AWS_ENDPOINT_URL"] = self.environment["AWS_ENDPOINT_URL"]
                s3fs.S3FileSystem.clear_instance_cache()
                door.shutdown(socket.SHUT_RDWR)

    def _let_in(self, door: socket.socket, left: list[int]) -> None:
        with contextlib.suppress(OSError):  # the door is closed
            while True:
                client = door.accept()[0]
                try:
                    server = socket.create_connection(("127.0.0.1", self.port))
                except OSError:
                    client.close()
                    continue
                for source, target, counted in ((client, server, None), (server, client, left)):
                    threading.Thread(target=self._pass_on, args=(source, target, counted), daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket, left: list[int] | None) -> None:
        with contextlib.suppress(OSError), source, target:
            while data := source.recv(65536):
                target.sendall(data)
                if left is not None:
                    left[0] -= len(data)
                    if left[0] < 0:
                        self.kill()
                        return

    def _answers(self) -> bool:
        try:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=1)
            connection.request("GET", "/moto-api/")
            return connection.getresponse().status < 500
        except OSError:
            return False


@contextmanager
def s3_server() -> Iterator[S3]:
    server = S3()
    given = {name: os.environ.get(name) for name in server.environment}
    try:
        server.start()
        os.environ.update(server.environment)
        s3fs.S3FileSystem.clear_instance_cache()  # clients of another server
        yield server
    finally:
        server.kill()
        for name, value in given.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        s3fs.S3FileSystem.clear_instance_cache()
