"""Mirror a run's checkpoint folder to a remote store, and fetch newer checkpoints from it."""

import logging
import re
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from training.errors import BadArtifact, StoreUnavailable
from training.store.store import RemoteStore, Store

log = logging.getLogger(__name__)

SEALED = re.compile(r"[a-z]+-\d+-\d+")  # the names of sealed folders; other folders have a mirror of their own


class CheckpointMirror:
    """Mirrors `folder` to STORE/NAME in a background thread, so that training does not wait for the network.

    When the store is unavailable, training continues, and other machines cannot resume from the latest checkpoint.
    """

    def __init__(self, folder: Path, name: str, writer: int, store: Store) -> None:
        self._folder = folder
        self._writer = writer
        self._remote = RemoteStore(store.url_of(name))
        self._thread = ThreadPoolExecutor(1, "checkpoint-mirror")
        self._last: Future[None] | None = None

    def schedule(self) -> None:
        """Schedule a synchronisation of the store with the folder. At most one waits behind the one in progress."""
        if self._last is not None:
            self._last.cancel()  # has no effect once it runs; the next one covers its work
        self._last = self._thread.submit(self._synchronise)

    def fetch(self) -> None:
        """Download the store's checkpoints when its newest, or a result, is not in the folder."""
        try:
            stored = self._remote.names()
            newest = max(self._local("step-"), default="")
            missing = sorted(set(stored) - set(self._local("")))
            if not any(name.startswith("result-") or (name.startswith("step-") and name > newest) for name in missing):
                return
            for name in missing:
                draft = self._folder / f".{name}.draft"
                try:
                    self._remote.download(name, draft)
                    draft.rename(self._folder / name)
                except BadArtifact as error:
                    log.warning("a checkpoint in the store cannot be used: %s", error)
        except StoreUnavailable as error:
            log.warning("cannot look for checkpoints of other machines: %s", error)

    def close(self, finish_uploads: bool) -> None:
        """Stop the thread. With `finish_uploads`, first wait for the scheduled upload to succeed or fail."""
        self._thread.shutdown(wait=True, cancel_futures=not finish_uploads)

    def clear(self) -> None:
        """Stop the thread and remove the run's checkpoints from the store."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        try:
            self._remote.remove("")
        except StoreUnavailable as error:
            log.warning("the checkpoints of a finished run remain in the store: %s", error)

    def _synchronise(self) -> None:
        try:
            stored = self._remote.names()
            for name in self._local(""):  # best-* sorts before step-*, so weights arrive before the step naming them
                if name not in stored:
                    self._remote.upload(self._folder / name, name)
            for name in set(stored) - set(self._local("")):
                # A stale process must not remove the checkpoints of its successor.
                if int(name.rpartition("-")[2]) <= self._writer:
                    self._remote.remove(name)
        except StoreUnavailable as error:
            log.warning("checkpoints could not be uploaded, trying again after the next one: %s", error)
        except FileNotFoundError:
            return  # pruned during the upload; another synchronisation is already scheduled

    def _local(self, prefix: str) -> list[str]:
        return sorted(path.name for path in self._folder.glob(f"{prefix}*") if SEALED.fullmatch(path.name))
