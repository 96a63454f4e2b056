"""The embedded Valkey server of a home: start it, find it by its socket, and stop it with its owner.

The server listens only on a Unix socket that its user can open, and keeps an append-only file. Two locks protect a
home. The owner lock is held by the process that owns the server, and is released when that process ends. The server
lock is held by the server itself through an inherited descriptor: while it runs, no second server can start on the same
files, even when the owner was killed. The next process that needs a server adopts such an orphan. The owner restarts a
server that ends, see `server_supervisor`; other processes wait for the restart while the owner lives.
"""

import fcntl
import hashlib
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import redis

from worker.errors import ServerFailed, ServerRunning
from worker.stream import server_supervisor
from worker.stream.server_status import POLL_SECONDS, Loading, connect_socket, loading_status, wait_until_ready
from worker.stream.server_supervisor import ServerPaths, ServerSupervisor, open_lock, try_lock

log = logging.getLogger(__name__)

MEMORY_MB = 1024
SYNC = "everysec"
# sun_path holds 108 bytes including the final zero; the server appends a few characters while it binds.
LONGEST_SOCKET_PATH = 90
# Not `tempfile.gettempdir()`: processes of one home must agree on the path, whatever TMPDIR each of them has.
SHORT_FOLDER = Path("/tmp")  # noqa: S108 - the folder below it is private, see `_make_private`
PLAIN_PATH = re.compile(r"[A-Za-z0-9/._-]+")


@dataclass(frozen=True)
class Server:
    socket: Path

    @property
    def url(self) -> str:
        """The URL for redis-py."""
        return f"unix://{self.socket}"


@dataclass(frozen=True)
class Owner:
    """The process that owns a home's server, and the status it published; empty while the server is ready."""

    pid: str
    status: str


def socket_path(home: Path) -> Path:
    """Where the home's server listens: in the home, or in a private temporary folder when the home's path is too long
    for a socket or contains characters that a URL would quote."""
    path = home / "valkey" / "valkey.sock"
    if len(os.fsencode(path)) <= LONGEST_SOCKET_PATH and PLAIN_PATH.fullmatch(str(path)):
        return path
    digest = hashlib.sha256(os.fsencode(home.resolve())).hexdigest()[:16]
    return SHORT_FOLDER / f"tweetscore-{os.getuid()}" / f"{digest}.sock"


# --- status


def find(home: Path) -> Server | None:
    """Return the home's server when it is ready, else None."""
    return Server(socket_path(home)) if _ready_or_loading(home) is True else None


def failure_reason(home: Path) -> str | None:
    """Return why the home's server is not ready; None when it is ready or when no process owns one."""
    status = _ready_or_loading(home)
    if isinstance(status, Loading):
        return f"the embedded server is {status}"
    current = owner(home)
    if status is True or current is None:
        return None
    return current.status or _silent_message(home, current)


def owner(home: Path) -> Owner | None:
    """Return the live process that owns the home's server, whether or not the server answers; None when there is
    none."""
    path = _owner_lock(home)
    if not path.exists():
        return None
    with open_lock(path) as lock:
        # A shared lock, held only for this check: a process that wants to own the home tries again.
        if try_lock(lock, fcntl.LOCK_SH):
            return None
        pid, _, status = os.pread(lock, 4096, 0).decode(errors="replace").partition("\n")
    return Owner(pid, status)


def _ready_or_loading(home: Path) -> Loading | bool:
    """Return True when the server is ready, its progress while it loads, False when it does not answer."""
    path = socket_path(home)
    if not path.exists():
        return False
    with connect_socket(path) as client:
        try:
            return loading_status(client) or True
        except redis.RedisError:
            return False


def _silent_message(home: Path, current: Owner) -> str:
    return (
        f"process {current.pid} owns the embedded server of {home}, which does not answer; end that process and start "
        f"`tweetscore up` (log: {_paths(home).log})"
    )


def _paths(home: Path) -> ServerPaths:
    return ServerPaths(home / "valkey", socket_path(home))


def _owner_lock(home: Path) -> Path:
    return home / "valkey" / "owner.lock"


# --- waiting and owning


def wait_for_server(home: Path, notify: Callable[[str], None] = log.warning) -> Server | None:
    """Wait for the server that another process owns, while it loads or is restarted.

    Returns None as soon as no process owns it. Raises `ServerFailed` when it does not answer for longer than a restart
    takes.
    """
    notified = ""

    def has_no_owner() -> bool:
        nonlocal notified
        current = owner(home)
        if current is not None and current.status != notified:
            notified = current.status
            if notified:
                notify(f"waiting: {notified}")
        return current is None

    def on_loading(loading: Loading) -> None:
        notify(f"waiting: the embedded server is {loading}")

    with connect_socket(socket_path(home)) as client:
        if wait_until_ready(
            client, server_supervisor.LONGEST_PAUSE_SECONDS + server_supervisor.START_SECONDS, has_no_owner, on_loading
        ):
            return Server(socket_path(home))
    current = owner(home)
    if current is None:
        return None
    raise ServerFailed(current.status or _silent_message(home, current))


@contextmanager
def running(
    home: Path, memory_mb: int = MEMORY_MB, sync: str = SYNC, notify: Callable[[str], None] = log.warning
) -> Iterator[Server]:
    """Yield the home's server: the one another process owns, or one that is started here and stopped at the end."""
    with ExitStack() as stack:
        server: Server | None = None
        while server is None:
            try:
                server = stack.enter_context(owned(home, memory_mb, sync, notify))
            except ServerRunning:
                server = wait_for_server(home, notify)
        yield server


@contextmanager
def owned(
    home: Path,
    memory_mb: int = MEMORY_MB,
    sync: str = SYNC,
    notify: Callable[[str], None] = log.warning,
    give_up: Callable[[], bool] = lambda: False,
) -> Iterator[Server]:
    """Start the home's server or adopt an orphan, restart it when it ends, and stop it at the end of the block.

    Above `memory_mb` the server refuses records. With `sync` set to `everysec` records are on disk within about a
    second, with `always` before they are acknowledged. `notify` receives loading progress and restarts. When
    `give_up()` becomes true while the server starts, the block begins without it.

    Raises `ServerRunning` when a live process owns the server, and `ServerFailed` with the server's last log line when
    it does not start.
    """
    paths = _paths(home)
    paths.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    _make_private(paths.socket.parent)
    with open_lock(_owner_lock(home)) as lock:
        if not _acquire(lock):
            pid = os.pread(lock, 4096, 0).decode(errors="replace").partition("\n")[0]
            raise ServerRunning(
                f"a server already runs on {home} (owner: process {pid}); use it, stop it, or set TWEETSCORE_HOME "
                "to another folder"
            )

        def set_status(status: str) -> None:
            with suppress(OSError):  # on a full disk: the server may become ready all the same
                os.ftruncate(lock, os.pwrite(lock, f"{os.getpid()}\n{status}".encode()[:4096], 0))

        set_status(f"process {os.getpid()} starts the embedded server")
        supervisor = ServerSupervisor(paths, memory_mb, sync, notify, set_status)
        supervisor.start(give_up)
        set_status("")
        try:
            yield Server(paths.socket)
        finally:
            supervisor.stop()


def _acquire(lock: int) -> bool:
    """Acquire the owner lock; False when an owner holds it. Waits for a process that only checks for an owner."""
    while not try_lock(lock):
        if not try_lock(lock, fcntl.LOCK_SH):
            return False
        fcntl.flock(lock, fcntl.LOCK_UN)
        time.sleep(POLL_SECONDS)
    return True


def _make_private(folder: Path) -> None:
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid() or folder.is_symlink():
        raise ServerFailed(
            f"{folder} belongs to another user or is a link; set TWEETSCORE_HOME to a shorter path without spaces"
        )
    folder.chmod(0o700)
