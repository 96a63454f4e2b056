"""PostgreSQL connections that notice a server which keeps them and gives no answer. Knows sockets, and no table.

The kernel of a stopped server still acknowledges what it is sent, so that keepalives see nothing wrong, and a Unix
socket has none. What tells such a server from one that is busy with a long statement is a second connection: a busy one
answers there. Keepalives and `tcp_user_timeout` are for the other case: the server is well, and this one connection was
forgotten by a router between.
"""

import os
import select
import socket
import time
from collections.abc import Collection, Generator
from typing import Any

import psycopg
from psycopg.conninfo import conninfo_to_dict

# A statement without an answer for so long has its server asked on a new connection.
SILENT_SECONDS = 10.0
# The server takes a new connection and says a first word within this.
ANSWER_SECONDS = 5.0
# The first word of any client that would like TLS: length and code. Every server answers with one byte, before it asks
# who is there, and however many connections it has.
SSL_REQUEST = bytes.fromhex("0000000804d2162f")
# For libpq, in seconds, and milliseconds where it ends with `_timeout` and begins with `tcp`.
LIMITS = {
    "connect_timeout": 5,
    "keepalives_idle": 5,
    "keepalives_interval": 5,
    "keepalives_count": 2,
    "tcp_user_timeout": 15_000,
}
# For the server's own side: a worker that vanished would hold its rows' locks for hours. And no commit is called done
# before it is on disk; what asks for more than `on`, as remote_apply does, stays.
SESSION = """
SELECT set_config(name, wanted, false) FROM pg_settings JOIN (VALUES
    ('synchronous_commit', 'on'), ('tcp_keepalives_idle', '10'), ('tcp_keepalives_interval', '5'),
    ('tcp_keepalives_count', '4'), ('tcp_user_timeout', '30000')
) AS ours(its_name, wanted) ON name = its_name WHERE name <> 'synchronous_commit' OR setting = 'off'
"""


class Connection(psycopg.Connection[Any]):
    """Raises `OperationalError`, and is closed, when neither a statement nor a new connection is answered."""

    def wait(self, gen: Generator[Any, Any, Any], interval: float = 0.1, timeout: float | None = None) -> Any:
        return super().wait(self._watched(gen), interval, timeout)

    def _watched(self, steps: Generator[Any, Any, Any]) -> Generator[Any, Any, Any]:
        """The same steps. Between them comes what the socket is ready for: 0, ten times a second, while for nothing."""
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
                        f"the server gave no answer for {time.monotonic() - heard_at:.0f} s and takes no new connection"
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
                return True  # somebody is there who does not like the question
            except OSError:
                # The answer to the statement may have come meanwhile.
                return bool(select.select([self.fileno()], [], [], 0)[0])
        return True


def limits(given: Collection[str]) -> dict[str, Any]:
    """Those of the limits that a URL with the parameters `given` does not set itself."""
    return {name: value for name, value in LIMITS.items() if name not in given}


def connect(url: str, **more: Any) -> Connection:
    """A connection for a libpq URL."""
    return Connection.connect(url, **limits(conninfo_to_dict(url)), **more)


def prepare(connection: psycopg.Connection[Any]) -> None:
    """What a session that writes asks of its server."""
    connection.autocommit = True
    connection.execute(SESSION)
    connection.autocommit = False
