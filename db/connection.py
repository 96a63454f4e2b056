"""PostgreSQL connections that detect a server which keeps them open but does not answer.

The kernel of a stopped server still acknowledges packets, so keepalives do not detect it, and Unix sockets have none. A
second connection distinguishes a stopped server from one that runs a long statement: only the latter answers it.
Keepalives and `tcp_user_timeout` cover the other case, in which the server is healthy but a router between has dropped
this one connection.
"""

import os
import select
import socket
import time
from collections.abc import Collection, Generator
from typing import Any

import psycopg
from psycopg.conninfo import conninfo_to_dict

# After this time without an answer to a statement, the server is probed on a new connection.
SILENT_SECONDS = 10.0
# The server must accept a new connection and send its first byte within this time.
ANSWER_SECONDS = 5.0
# The message with which a client requests TLS: length and code. Every server answers it with one byte, before
# authentication and even when its connection limit is reached.
SSL_REQUEST = bytes.fromhex("0000000804d2162f")
# Parameters of libpq, in seconds; `tcp_user_timeout` in milliseconds.
LIMITS = {
    "connect_timeout": 5,
    "keepalives_idle": 5,
    "keepalives_interval": 5,
    "keepalives_count": 2,
    "tcp_user_timeout": 15_000,
}
# Settings of the server's side of the connection. Without its keepalives the server would hold the row locks of a
# vanished worker for hours. A commit must be on disk when it returns, so `off` becomes `on`; stricter values such as
# remote_apply stay.
SESSION = """
SELECT set_config(name, wanted, false) FROM pg_settings JOIN (VALUES
    ('synchronous_commit', 'on'), ('tcp_keepalives_idle', '10'), ('tcp_keepalives_interval', '5'),
    ('tcp_keepalives_count', '4'), ('tcp_user_timeout', '30000')
) AS ours(its_name, wanted) ON name = its_name WHERE name <> 'synchronous_commit' OR setting = 'off'
"""


class Connection(psycopg.Connection[Any]):
    """Raises `OperationalError` and closes itself when the server answers neither a statement nor a new connection."""

    def wait(self, gen: Generator[Any, Any, Any], interval: float = 0.1, timeout: float | None = None) -> Any:
        return super().wait(self._watched(gen), interval, timeout)

    def _watched(self, steps: Generator[Any, Any, Any]) -> Generator[Any, Any, Any]:
        """The same steps, watched: each yield returns the readiness of the socket, or 0 after 0.1 s without any."""
        ready, heard_at = None, time.monotonic()
        try:
            while True:
                ready = yield steps.send(ready)
                now = time.monotonic()
                if ready or (now - heard_at > SILENT_SECONDS and self._server_answers()):
                    heard_at = time.monotonic()
                elif now - heard_at > SILENT_SECONDS:
                    self.pgconn.finish()
                    raise psycopg.OperationalError(
                        f"the server gave no answer for {now - heard_at:.0f} s and takes no new connection; "
                        "check that it runs"
                    )
        except StopIteration as end:
            return end.value

    def _server_answers(self) -> bool:
        with socket.socket(fileno=os.dup(self.fileno())) as own:
            family, address = own.family, own.getpeername()
        with socket.socket(family) as fresh:
            fresh.settimeout(ANSWER_SECONDS)
            try:
                fresh.connect(address)
                fresh.sendall(SSL_REQUEST)
                fresh.recv(1)
            except (ConnectionResetError, BrokenPipeError):
                return True  # the server is alive and rejects the request
            except OSError:
                # The answer to the statement may have arrived in the meantime.
                return bool(select.select([self.fileno()], [], [], 0)[0])
        return True


def limits(given: Collection[str]) -> dict[str, Any]:
    """The entries of `LIMITS` that a URL with the parameters `given` does not set."""
    return {name: value for name, value in LIMITS.items() if name not in given}


def connect(url: str, **more: Any) -> Connection:
    """Connect to a libpq URL."""
    return Connection.connect(url, **limits(conninfo_to_dict(url)), **more)


def prepare(connection: psycopg.Connection[Any]) -> None:
    """Apply `SESSION` to a new connection that will write."""
    connection.autocommit = True
    connection.execute(SESSION)
    connection.autocommit = False
