"""Local cache of model folders, shared by all processes of a machine, with LRU eviction.

They are copies from a remote store, and base models that have learned the sample.

HOME/cache/KEY            a complete copy; its mtime is the time of last use
HOME/cache/KEY.engines    engines built for that copy
HOME/cache/.KEY.draft     an unfinished download; the next attempt resumes it
HOME/cache/locks/KEY      lock file: shared while a copy is in use, exclusive while it is downloaded or removed
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
from training.store.paths import sync_folder

log = logging.getLogger(__name__)

OWN = ("locks", "outgoing")


class Cache:
    """Copies in `folder`, limited to `max_bytes` in total.

    The limit is exceeded when the copies in use, or a single copy, need more.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder = folder
        self._max_bytes = max_bytes

    @contextmanager
    def entry(
        self, key: str, size: Callable[[], int], fill: Callable[[Path], None], check: Callable[[Path], None]
    ) -> Iterator[Path]:
        """Provide the copy under `key` and keep it from being evicted until the block ends.

        `size` returns the bytes to download. `fill` downloads into a folder, which may contain files of an earlier
        attempt. `check` raises `BadArtifact` for an incomplete or damaged copy, which is then downloaded again.
        """
        place, draft = self.folder / key, self.folder / f".{key}.draft"
        verified = False  # set once this call has hashed the copy, so that large models are hashed only once
        while True:
            with self._locked(key, fcntl.LOCK_SH):
                if (verified and place.is_dir()) or _is_whole(place, check):
                    now = time.time_ns()  # the clock of the file system is coarser, and LRU order needs distinct times
                    os.utime(place, ns=(now, now))
                    yield place
                    return
            # Another process may have downloaded the copy between the two locks, so check again.
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
                verified = True

    @contextmanager
    def outgoing(self, name: str) -> Iterator[Path]:
        """Provide a path for a folder that will be uploaded; remove it when the block ends."""
        folder = self.folder / "outgoing" / name
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def adopt(self, folder: Path, key: str) -> None:
        """Move a folder that was just uploaded into the cache, so that this machine need not download it."""
        with self._locked(key, fcntl.LOCK_EX):
            self._make_room(_size(folder), key)
            shutil.rmtree(self.folder / key, ignore_errors=True)
            os.rename(folder, self.folder / key)

    def _make_room(self, needed: int, wanted: str) -> None:
        """Evict unused copies other than `wanted`, least recently used first, until `needed` bytes fit."""
        keys = {_key(path) for path in self.folder.iterdir() if path.name not in OWN}
        sizes = {key: sum(map(_size, self._parts(key))) for key in keys}
        for key in sorted(keys - {wanted}, key=self._used_at):
            if sum(sizes.values()) + needed <= self._max_bytes:
                return
            with self._locked(key, fcntl.LOCK_EX | fcntl.LOCK_NB) as free:
                if free:
                    for part in self._parts(key):
                        shutil.rmtree(part, ignore_errors=True)
                    log.info("evicted %s from the cache", key[:16])
                    del sizes[key]

    def _parts(self, key: str) -> list[Path]:
        parts = (self.folder / key, self.folder / f"{key}.engines", self.folder / f".{key}.draft")
        return [part for part in parts if part.is_dir()]

    def _used_at(self, key: str) -> float:
        return max((part.stat().st_mtime for part in self._parts(key)), default=0.0)

    @contextmanager
    def _locked(self, key: str, how: int) -> Iterator[bool]:
        """Hold a file lock; yield False only when `LOCK_NB` finds it taken.

        File locks work between processes, and between containers that share the folder.
        """
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
        log.warning("a cached copy is damaged, downloading it again: %s", error)
        return False
    return True


def _key(path: Path) -> str:
    return path.name.removeprefix(".").removesuffix(".draft").removesuffix(".engines")


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
