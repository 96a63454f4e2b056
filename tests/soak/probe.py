"""Single tweets, one a second: how long from its XADD until another connection sees its row."""

import queue
import threading
import time
from collections import defaultdict

from sqlalchemy import select

from db.models import Prediction
from db.session import Database
from tests.soak.producer import Snowflakes, made_at
from tests.support.bench import wire
from worker.errors import StreamError
from worker.stream.stream import Stream

EVERY_SECONDS, POLL_SECONDS = 1.0, 0.005
MACHINE = 1_000


class Probe(threading.Thread):
    """`visible_ms` are (Unix seconds of the XADD, milliseconds)."""

    def __init__(self, stream: Stream, database: Database) -> None:
        super().__init__(name="probe", daemon=True)
        self._stream, self._database = stream, database
        self._ids, self._ending = Snowflakes(MACHINE), threading.Event()
        self._outstanding: dict[str, float] = {}
        self._accepted: queue.SimpleQueue[int] = queue.SimpleQueue()
        self.visible_ms: list[tuple[float, float]] = []
        self.errors: dict[str, int] = defaultdict(int)

    def run(self) -> None:
        due = time.monotonic()
        while not self._ending.is_set():
            if time.monotonic() >= due:
                due = max(due + EVERY_SECONDS, time.monotonic())
                self._push()
            if self._outstanding:
                self._look()
                self._ending.wait(POLL_SECONDS)
            else:
                self._ending.wait(max(0.0, due - time.monotonic()))

    def _push(self) -> None:
        id_ = self._ids.next()
        payload = wire(str(id_), "今日はいい天気です。")
        while not self._ending.is_set():
            try:
                self._stream.publish([payload])
            except StreamError as error:  # the server is away: the wait counts
                self.errors[type(error).__name__] += 1
                self._ending.wait(POLL_SECONDS)
            else:
                self._accepted.put(id_)
                self._outstanding[str(id_)] = made_at(id_)
                return

    def _look(self) -> None:
        with self._database.read() as session:
            seen = set(
                session.scalars(select(Prediction.tweet_id).where(Prediction.tweet_id.in_(list(self._outstanding))))
            )
        now = time.time()
        for id_ in seen:
            at = self._outstanding.pop(id_)
            self.visible_ms.append((at, 1000 * (now - at)))

    def take_accepted(self) -> list[int]:
        """The ids of the tweets that were accepted since the last call."""
        return [self._accepted.get() for _ in range(self._accepted.qsize())]

    def end(self) -> None:
        self._ending.set()
        self.join()
