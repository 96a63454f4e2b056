"""The records that a worker has read and not yet acknowledged, renewed so that no other worker claims them."""

import logging
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from worker.errors import StreamError
from worker.stream.sharded_stream import TweetStream

log = logging.getLogger(__name__)


class HeldRecords:
    """Ids of pending records, in the order in which they were read."""

    def __init__(self, stream: TweetStream, renew_seconds: float) -> None:
        self._stream = stream
        self._renew_seconds = renew_seconds
        self._ids: dict[str, None] = {}  # ordered

    def __len__(self) -> int:
        return len(self._ids)

    def add(self, ids: Iterable[str]) -> None:
        self._ids.update(dict.fromkeys(ids))

    def release(self, ids: Iterable[str]) -> None:
        for id_ in ids:
            self._ids.pop(id_, None)

    def clear(self) -> None:
        self._ids.clear()

    @contextmanager
    def renewed(self) -> Iterator[None]:
        """Renew the records from a background thread until the block ends."""
        done = threading.Event()

        def renew() -> None:
            while not done.wait(self._renew_seconds):
                try:
                    self._stream.renew(list(self._ids))
                except StreamError as error:
                    log.warning("records could not be renewed, trying again: %s", error)

        thread = threading.Thread(target=renew, name="renew", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
