"""For the tests of the embedded server: a home, the contents of a server, and owners in processes of their own."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import redis

from tests.conftest import PATIENCE_SECONDS
from worker.stream import embedded_valkey
from worker.stream.redis_client import connect
from worker.stream.stream import Depth, Stream

OWN_UNTIL_STDIN_ENDS = """
import sys
from pathlib import Path
from worker.stream import embedded_valkey
with embedded_valkey.owned(Path(sys.argv[1])):
    print("up", flush=True)
    sys.stdin.read()
"""


@contextmanager
def short_home() -> Iterator[Path]:
    """A home whose path is short enough for a socket; pytest's folders may be too deep."""
    with tempfile.TemporaryDirectory(prefix="ts", dir="/tmp") as folder:
        yield Path(folder) / "home"


def server_pid(server: embedded_valkey.Server) -> int:
    with redis.Redis.from_url(server.url) as client:
        return int(client.info("server")["process_id"])


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def fill(server: embedded_valkey.Server, count: int = 20) -> None:
    """Fill a stream; a reader holds some of its records and has acknowledged one."""
    with connect(server.url) as client:
        stream = Stream(client, "tweets", "scorers", "reader")
        stream.ensure_group()
        stream.publish([f"record {i}".encode() * 10 for i in range(count)])
        stream.ack([stream.read(5, None)[0].id])


def contents(server: embedded_valkey.Server) -> tuple[list[object], Depth, list[object]]:
    """Records, depth, and every pending record with its reader and count."""
    with connect(server.url) as client:
        stream = Stream(client, "tweets", "scorers")
        held = client.xpending_range("tweets", "scorers", "-", "+", 100)
        return (
            client.xrange("tweets"),
            stream.depth(),
            [(row["message_id"], row["consumer"], row["times_delivered"]) for row in held],
        )


def log_file(home: Path) -> Path:
    """The file that the append-only log is written to."""
    (found,) = (home / "valkey" / "appendonlydir").glob("*.incr.aof")
    return found


@contextmanager
def owner_process(home: Path, **environment: str) -> Iterator["subprocess.Popen[str]"]:
    """A process that owns the home's server, and stops it at its end unless it was killed."""
    with subprocess.Popen(
        [sys.executable, "-c", OWN_UNTIL_STDIN_ENDS, str(home)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, **environment},
    ) as process:  # fmt: skip
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "up\n"
            yield process
        finally:
            process.stdin.close()
            process.wait(PATIENCE_SECONDS)


@contextmanager
def orphan(home: Path, prepare: Callable[[embedded_valkey.Server], None] = fill) -> Iterator[int]:
    """A server whose owner was killed; yields the process id of the server."""
    with owner_process(home) as owner:
        server = embedded_valkey.find(home)
        assert server is not None
        pid = server_pid(server)
        prepare(server)
        owner.kill()
        owner.wait()
    try:
        assert is_running(pid)
        yield pid
    finally:
        if is_running(pid):
            os.kill(pid, signal.SIGKILL)
