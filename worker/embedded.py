"""The embedded Valkey server: started for a home, found by its socket, stopped by whoever owns it.

It listens on a Unix socket alone, for its owner alone, and keeps an append-only file. Two locks guard a home. One is
held by the process that owns the server, and falls when that process dies. The other is held by the server itself,
through a descriptor it inherits: while it lives nobody can start a second one on the same files, even when its owner
was killed. Such an orphan is adopted by the next one who asks for a server. The owner starts its server again when it
ends, see `keeper`; others wait for that as long as the owner lives.
"""

import fcntl
import hashlib
import logging
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import redis

from worker import keeper
from worker.answers import LOOK_SECONDS, Loading, ask, client_of, serves
from worker.errors import ServerFailed, ServerRunning
from worker.keeper import Keeper, Place, locked, opened

log = logging.getLogger(__name__)

MEMORY_MB = 1024
SYNC = "everysec"
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


@dataclass(frozen=True)
class Owner:
    """The process that owns a home's server, and what it says while the server is away."""

    process: str
    says: str


def socket_path(home: Path) -> Path:
    """Where the home's server listens: in the home, or in a folder of this user's own when the home's path is too long
    for a socket or holds characters that URLs would quote."""
    path = home / "valkey" / "valkey.sock"
    if len(os.fsencode(path)) <= LONGEST_SOCKET_PATH and PLAIN_PATH.fullmatch(str(path)):
        return path
    digest = hashlib.sha256(os.fsencode(home.resolve())).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"tweetscore-{os.getuid()}" / f"{digest}.sock"


# --- looking


def find(home: Path) -> Server | None:
    """The server that serves this home, None when there is none."""
    return Server(socket_path(home)) if _look(home) is True else None


def trouble(home: Path) -> str | None:
    """Why a server that should serve this home does not; None when nobody runs one, or when it serves."""
    found = _look(home)
    if isinstance(found, Loading):
        return f"the embedded server is {found}"
    kept = owner(home)
    if found is True or kept is None:
        return None
    return kept.says or _silent(home, kept)


def owner(home: Path) -> Owner | None:
    """The living process that owns the home's server, whether or not the server answers; None when there is none."""
    path = _owner_lock(home)
    if not path.exists():
        return None
    with opened(path) as lock:
        # Shared and for this moment alone: whoever wants to own the home tries again.
        if locked(lock, fcntl.LOCK_SH):
            return None
        process, _, says = os.pread(lock, 4096, 0).decode(errors="replace").partition("\n")
    return Owner(process, says)


def _look(home: Path) -> Loading | bool:
    """How far the server has loaded, True when it serves, False when it does not answer."""
    path = socket_path(home)
    if not path.exists():
        return False
    with client_of(path) as client:
        try:
            return ask(client) or True
        except redis.RedisError:
            return False


def _silent(home: Path, kept: Owner) -> str:
    return (
        f"process {kept.process} owns the embedded server of {home}, which gives no answer; end that process and start "
        f"`tweetscore up` (log: {_place(home).log})"
    )


def _place(home: Path) -> Place:
    return Place(home / "valkey", socket_path(home))


def _owner_lock(home: Path) -> Path:
    return home / "valkey" / "owner.lock"


# --- waiting, owning


def served(home: Path, say: Callable[[str], None] = log.warning) -> Server | None:
    """The server that another process owns, waited for while it loads or its owner starts it again.

    None as soon as nobody owns it. Raises `ServerFailed` when it stays away for longer than a start again takes.
    """
    said = ""

    def abandoned() -> bool:
        nonlocal said
        kept = owner(home)
        if kept is not None and kept.says != said:
            said = kept.says
            if said:
                say(f"waiting: {said}")
        return kept is None

    with client_of(socket_path(home)) as client:
        patience = keeper.LONGEST_PAUSE_SECONDS + keeper.START_SECONDS
        if serves(client, patience, abandoned, lambda loading: say(f"waiting: the embedded server is {loading}")):
            return Server(socket_path(home))
    kept = owner(home)
    if kept is None:
        return None
    raise ServerFailed(kept.says or _silent(home, kept))


@contextmanager
def running(
    home: Path, memory_mb: int = MEMORY_MB, sync: str = SYNC, say: Callable[[str], None] = log.warning
) -> Iterator[Server]:
    """A server on this home: the one somebody owns, or else one owned here and stopped at the end."""
    with ExitStack() as stack:
        server: Server | None = None
        while server is None:
            try:
                server = stack.enter_context(owned(home, memory_mb, sync, say))
            except ServerRunning:
                server = served(home, say)
        yield server


@contextmanager
def owned(
    home: Path,
    memory_mb: int = MEMORY_MB,
    sync: str = SYNC,
    say: Callable[[str], None] = log.warning,
    give_up: Callable[[], bool] = lambda: False,
) -> Iterator[Server]:
    """Start the home's server, or adopt an orphan, start it again when it ends, and stop it at the end.

    Past `memory_mb` it refuses records. `sync` says when they are on the disk: `everysec`, or `always` before they are
    acknowledged. `say` hears how far it has loaded, and of its ends. It is waited for until `give_up()`, then the block
    begins without it. Raises `ServerRunning` when a living process owns one, `ServerFailed` with the server's own words
    when it will not start.
    """
    place = _place(home)
    place.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    _make_private(place.socket.parent)
    with opened(_owner_lock(home)) as lock:
        if not _own(lock):
            number = os.pread(lock, 4096, 0).decode(errors="replace").partition("\n")[0]
            raise ServerRunning(
                f"a server already runs on {home} (owner: process {number}); use it, stop it, or set TWEETSCORE_HOME "
                "to another folder"
            )

        def note(says: str) -> None:
            with suppress(OSError):  # a full disk, and the server may come back all the same
                os.ftruncate(lock, os.pwrite(lock, f"{os.getpid()}\n{says}".encode()[:4096], 0))

        note(f"process {os.getpid()} starts the embedded server")
        kept = Keeper(place, memory_mb, sync, say, note)
        kept.start(give_up)
        note("")
        try:
            yield Server(place.socket)
        finally:
            kept.stop()


def _own(lock: int) -> bool:
    """Take the lock, unless it is an owner who has it and not somebody who looks for one."""
    while not locked(lock):
        if not locked(lock, fcntl.LOCK_SH):
            return False
        fcntl.flock(lock, fcntl.LOCK_UN)
        time.sleep(LOOK_SECONDS)
    return True


def _make_private(folder: Path) -> None:
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid() or folder.is_symlink():
        raise ServerFailed(f"{folder} belongs to somebody else; set TWEETSCORE_HOME to a shorter path without spaces")
    folder.chmod(0o700)
