"""Which tweets were accepted, and which of them have a row. Each row is looked up before retention deletes it."""

import time
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from sqlalchemy import func, select

from db.models import Prediction, ScoringWindow, Tweet
from db.session import Database
from tests.soak.producer import made_at

IDS_A_QUERY = 5_000


class Ledger:
    """Minutes count from `began` (Unix seconds)."""

    def __init__(self, database: Database, files: Sequence[Path]) -> None:
        self._database, self._files = database, dict.fromkeys(files, 0)
        self.began = 0.0
        self.waiting: set[int] = set()  # accepted, and no row was seen yet
        self._accepted: list[np.ndarray] = []
        self.pushed: Counter[int] = Counter()  # by the minute in which a tweet was made
        self.repeats: Counter[int] = Counter()  # by the minute in which the first one was made
        self.rows: Counter[int] = Counter()  # by the minute of `scored_at`
        self.versions: Counter[int] = Counter()
        self.latency_ms: dict[int, array[float]] = defaultdict(lambda: array("d"))  # by the minute of `received_at`

    def add(self, ids: Iterable[int]) -> None:
        """Count tweets that the server has accepted."""
        found = np.fromiter(ids, np.int64)
        new, again = found[found > 0], -found[found < 0]
        self.waiting.update(new.tolist())
        self._accepted.append(new)
        for counter, counted in ((self.pushed, new), (self.repeats, again)):
            counter.update(((made_at(counted) - self.began) // 60).astype(int).tolist())

    def read_files(self) -> None:
        """Read what the producers have appended since the last call."""
        for path, offset in self._files.items():
            if path.exists():
                with path.open("rb") as file:
                    file.seek(offset)
                    data = file.read()
                data = data[: len(data) // 8 * 8]
                self._files[path] += len(data)
                self.add(np.frombuffer(data, np.int64).tolist())

    def tick_off(self, older_than_seconds: float) -> None:
        """Look for the rows of tweets that wait for longer than this."""
        self.read_files()
        until = time.time() - older_than_seconds
        ids = sorted(id_ for id_ in self.waiting if made_at(id_) <= until)
        for start in range(0, len(ids), IDS_A_QUERY):
            self._look_up(ids[start : start + IDS_A_QUERY])

    def _look_up(self, ids: Sequence[int]) -> None:
        query = (
            select(Prediction.tweet_id, Prediction.model_version_id, Tweet.received_at, Prediction.scored_at)
            .join(Tweet, Tweet.tweet_id == Prediction.tweet_id)
            .where(Prediction.tweet_id.in_([str(id_) for id_ in ids]))
            .order_by(Prediction.scored_at)
        )
        with self._database.read() as session:
            rows = session.execute(query).all()
        for id_, version, received_at, scored_at in rows:
            self.rows[self._minute(scored_at.timestamp())] += 1
            self.versions[version] += 1
            if int(id_) in self.waiting:  # else the row of another version, which a repeat got after a promotion
                self.waiting.discard(int(id_))
                waited = (scored_at - received_at).total_seconds()
                self.latency_ms[self._minute(received_at.timestamp())].append(1000 * waited)

    def _minute(self, at: float) -> int:
        return int((at - self.began) // 60)

    @property
    def accepted(self) -> int:
        return sum(len(ids) for ids in self._accepted)

    def stored(self) -> int:
        with self._database.read() as session:
            return session.scalar(select(func.count()).select_from(Tweet)) or 0

    def scored(self) -> int:
        """Tweets of all windows: more than there are rows when some were scored again."""
        with self._database.read() as session:
            return session.scalar(select(func.coalesce(func.sum(ScoringWindow.tweets), 0))) or 0

    def stray_rows(self) -> int:
        """Stored tweets that nobody has published."""
        with self._database.read() as session:
            stored = np.fromiter((int(id_) for id_ in session.scalars(select(Tweet.tweet_id))), np.int64)
        return int((~np.isin(stored, np.concatenate(self._accepted))).sum())

    def doubled_rows(self) -> int:
        """Pairs of tweet and model version with more than one row."""
        pair = (Prediction.tweet_id, Prediction.model_version_id)
        doubled = select(*pair).group_by(*pair).having(func.count() > 1).subquery()
        with self._database.read() as session:
            return session.scalar(select(func.count()).select_from(doubled)) or 0
