"""Blocking reads on several connections, of which the first to return ends the wait."""

import threading
from typing import Any

from worker.errors import StreamError
from worker.stream.shard_server import Shard, ShardServer


class FirstWait:
    """Runs blocking reads in threads. Those that are not the first go on, and are heard by a later call."""

    def __init__(self) -> None:
        self._running: set[Shard] = set()  # the first shard of each read
        self._heard = threading.Condition()
        self._results: list[tuple[ShardServer, list[Shard] | StreamError]] = []

    def wait(
        self, positions: dict[ShardServer, dict[Shard, Any]], block_ms: int
    ) -> list[tuple[ShardServer, list[Shard] | StreamError]]:
        """Wait for records after the ids given. Returns for each read that ended the shards with news, or its error."""
        with self._heard:
            for server, wanted in positions.items():
                for part in server.parts(wanted):
                    name = next(iter(part))
                    if name not in self._running:
                        self._running.add(name)
                        arguments = (name, server, part, block_ms)
                        threading.Thread(target=self._run, args=arguments, name="waits", daemon=True).start()
            self._heard.wait_for(lambda: self._results, block_ms / 1000)
            results, self._results = self._results, []
            return results

    def _run(self, name: Shard, server: ShardServer, part: dict[Shard, Any], block_ms: int) -> None:
        found: list[Shard] | StreamError = []
        try:
            found = server.wait(part, block_ms)
        except StreamError as error:
            found = error
        finally:
            with self._heard:
                self._running.discard(name)
                self._results.append((server, found))
                self._heard.notify()
