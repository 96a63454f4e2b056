"""Copies of what lies in a remote store: fetched once a machine, whole or not there, the least recently used go first.

HOME/cache/KEY            a copy; its time of change is when it was last used
HOME/cache/KEY.engines    the engines tried on it
HOME/cache/.KEY.draft     what a fetch that was cut off left; the next goes on from there
HOME/cache/locks/KEY      held shared by whoever uses a copy, alone by whoever fetches or removes it
"""

import fcntl
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from training.errors import BadArtifact
from training.paths import sync_folder

log = logging.getLogger(__name__)

OWN = ("locks", "outgoing")


class Cache:
    """At most `max_bytes` of copies in `folder`, unless more are in use at once or a single one is larger."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder = folder
        self._max_bytes = max_bytes

    @contextmanager
    def entry(
        self, key: str, size: Callable[[], int], fill: Callable[[Path], None], check: Callable[[Path], None]
    ) -> Iterator[Path]:
        """The copy under `key`, which stays for as long as the block runs.

        `check` raises `BadArtifact` of a copy that is not whole; such a one is fetched again. `fill` writes into a
        folder that may hold what an earlier try left.
        """
        place, draft = self.folder / key, self.folder / f".{key}.draft"
        proven = False  # by this call: hundreds of megabytes are not hashed twice
        while True:
            with self._locked(key, fcntl.LOCK_SH):
                if (proven and place.is_dir()) or _is_whole(place, check):
                    now = time.time_ns()  # the file system's own clock ticks in milliseconds
                    os.utime(place, ns=(now, now))
                    yield place
                    return
            # Between the two locks another process may have fetched it: then this finds it whole.
            with self._locked(key, fcntl.LOCK_EX):
                if not _is_whole(place, check):
                    shutil.rmtree(place, ignore_errors=True)
                    self._make_room(size(), key)
                    draft.mkdir(parents=True, exist_ok=True)
                    try:
                        fill(draft)
                        check(draft)
                    except BadArtifact:
                        shutil.rmtree(draft)
                        raise
                    sync_folder(draft)
                    os.rename(draft, place)
                proven = True

    @contextmanager
    def outgoing(self, name: str) -> Iterator[Path]:
        """A place to make what is to go into the store; it is gone afterwards."""
        folder = self.folder / "outgoing" / name
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def adopt(self, folder: Path, key: str) -> None:
        """Make what was just made here the copy: its maker's machine need not fetch it."""
        with self._locked(key, fcntl.LOCK_EX):
            self._make_room(_size(folder), key)
            shutil.rmtree(self.folder / key, ignore_errors=True)
            os.rename(folder, self.folder / key)

    def _make_room(self, needed: int, wanted: str) -> None:
        """Remove copies that nobody uses, the one that was used longest ago first, until so many bytes more fit."""
        keys = {_key(path) for path in self.folder.iterdir() if path.name not in OWN}
        sizes = {key: sum(map(_size, self._parts(key))) for key in keys}
        for key in sorted(keys - {wanted}, key=self._used_at):
            if sum(sizes.values()) + needed <= self._max_bytes:
                return
            with self._locked(key, fcntl.LOCK_EX | fcntl.LOCK_NB) as free:
                if free:
                    for part in self._parts(key):
                        shutil.rmtree(part, ignore_errors=True)
                    log.info("removed the copy %s to make room", key[:16])
                    del sizes[key]

    def _parts(self, key: str) -> list[Path]:
        parts = (self.folder / key, self.folder / f"{key}.engines", self.folder / f".{key}.draft")
        return [part for part in parts if part.is_dir()]

    def _used_at(self, key: str) -> float:
        return max((part.stat().st_mtime for part in self._parts(key)), default=0.0)

    @contextmanager
    def _locked(self, key: str, how: int) -> Iterator[bool]:
        """Whether the lock was had, which only `LOCK_NB` leaves open. Of files, so that they hold between processes,
        and between containers on one machine."""
        path = self.folder / "locks" / key
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as file:
            try:
                fcntl.flock(file, how)
            except BlockingIOError:
                yield False
            else:
                yield True


def _is_whole(place: Path, check: Callable[[Path], None]) -> bool:
    if not place.is_dir():
        return False
    try:
        check(place)
    except BadArtifact as error:
        log.warning("a copy in the cache is damaged, fetching it again: %s", error)
        return False
    return True


def _key(path: Path) -> str:
    return path.name.removeprefix(".").removesuffix(".draft").removesuffix(".engines")


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
