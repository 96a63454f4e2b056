"""A run's checkpoints in a remote store: a folder of this machine, followed there and fetched from there."""

import logging
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from training.errors import BadArtifact, StoreAway
from training.storage import Remote, Store

log = logging.getLogger(__name__)


class Mirror:
    """What `folder` holds, at STORE/NAME-OF-FOLDER, in a thread of its own: training does not wait for a network.

    A store that is away costs what another machine could go on from, never the run.
    """

    def __init__(self, folder: Path, writer: int, store: Store) -> None:
        self._folder = folder
        self._writer = writer
        self._remote = Remote(store.url_of(folder.name))
        self._thread = ThreadPoolExecutor(1, "mirror")
        self._last: Future[None] | None = None

    def follow(self) -> None:
        """Bring the store to what the folder holds now, soon. At most one such wish waits behind the one at work."""
        if self._last is not None:
            self._last.cancel()  # it had not begun, and the next does what it would have done
        self._last = self._thread.submit(self._follow)

    def fetch(self) -> None:
        """Bring what another machine left into the folder, if it is newer than what lies here."""
        try:
            there = self._remote.names()
            newest = max(self._here("step-"), default="")
            if not any(name.startswith("step-") and name > newest for name in there):
                return
            for name in sorted(set(there) - set(self._here(""))):
                draft = self._folder / f".{name}.draft"
                try:
                    self._remote.download(name, draft)
                    draft.rename(self._folder / name)
                except BadArtifact as error:
                    log.warning("a checkpoint in the store cannot be used: %s", error)
        except StoreAway as error:
            log.warning("checkpoints of other machines cannot be looked for: %s", error)

    def close(self, needed: bool) -> None:
        """Returns when the store has what the folder has, if that is `needed`, or does not answer."""
        self._thread.shutdown(wait=True, cancel_futures=not needed)

    def clear(self) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)
        try:
            self._remote.remove("")
        except StoreAway as error:
            log.warning("the checkpoints of an ended run stay in the store: %s", error)

    def _follow(self) -> None:
        try:
            there = self._remote.names()
            for name in self._here(""):  # the best weights first, which a step names
                if name not in there:
                    self._remote.upload(self._folder / name, name)
            for name in set(there) - set(self._here("")):
                # A process that was given up for dead removes nothing of its successor's.
                if int(name.rpartition("-")[2]) <= self._writer:
                    self._remote.remove(name)
        except StoreAway as error:
            log.warning("checkpoints do not reach the store, trying again at the next: %s", error)
        except FileNotFoundError:
            return  # pruned while it went up: the next wish is on its way

    def _here(self, prefix: str) -> list[str]:
        return sorted(path.name for path in self._folder.glob(f"{prefix}[!.]*") if path.is_dir())
