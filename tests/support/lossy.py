"""A proxy in front of a PostgreSQL that can refuse connections and can lose one commit or the answer to it."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sqlalchemy import URL, make_url

COMMIT = b"COMMIT\x00"
PORT = 5432


class Door:
    """`url` leads through the proxy; the server's own URL does not."""

    def __init__(self, server_url: str, folder: Path) -> None:
        inside: URL = make_url(server_url)
        self._server = f"{inside.query['host']}/.s.PGSQL.{inside.query.get('port', PORT)}"
        self.url = inside.set(query={"host": str(folder)}).render_as_string(hide_password=False)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(folder / f".s.PGSQL.{PORT}"))
        self._listener.listen(20)
        self._shut = threading.Event()
        self._open: list[socket.socket] = []
        self._marker: bytes | None = None
        self._loses_answer = False
        self.then_shut = False
        self.lost = threading.Event()
        threading.Thread(target=self._let_in, daemon=True).start()

    def lose(self, marker: bytes, answer: bool, then_shut: bool = False) -> None:
        """Cut the next connection that commits a transaction in which `marker` was sent.

        With `answer` cut it after the server has committed, otherwise before the server receives the commit. With
        `then_shut` refuse every later connection.
        """
        self.lost.clear()
        self._marker, self._loses_answer, self.then_shut = marker, answer, then_shut

    @contextmanager
    def shut(self) -> Iterator[None]:
        self.close()
        yield
        self.open()

    def close(self) -> None:
        self._shut.set()
        for end in self._open:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        self._open.clear()

    def open(self) -> None:
        self._shut.clear()

    def end(self) -> None:
        self.close()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _let_in(self) -> None:
        with suppress(OSError):  # it has ended
            while True:
                client = self._listener.accept()[0]
                if self._shut.is_set():
                    client.close()
                    continue
                server = socket.socket(socket.AF_UNIX)
                server.connect(self._server)
                self._open += [client, server]
                committing = threading.Event()
                for pump in (self._to_server, self._to_client):
                    threading.Thread(target=pump, args=(client, server, committing), daemon=True).start()

    def _to_server(self, client: socket.socket, server: socket.socket, committing: threading.Event) -> None:
        sent = b""
        with suppress(OSError), client, server:
            while data := client.recv(65536):
                sent += data
                if COMMIT in data:
                    if self._marker is not None and self._marker in sent:
                        self._marker = None
                        if not self._loses_answer:
                            self._cut(client, server)
                            return
                        committing.set()
                    sent = b""
                server.sendall(data)

    def _to_client(self, client: socket.socket, server: socket.socket, committing: threading.Event) -> None:
        with suppress(OSError):
            while data := server.recv(65536):
                if committing.is_set():
                    self._cut(client, server)
                    return
                client.sendall(data)
        with suppress(OSError):
            client.shutdown(socket.SHUT_RDWR)

    def _cut(self, client: socket.socket, server: socket.socket) -> None:
        for end in (client, server):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        if self.then_shut:
            self.close()
        self.lost.set()
