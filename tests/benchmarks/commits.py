"""What it costs that SQLite has a commit on disk when it returns: `python -m tests.benchmarks.commits`.

Windows as the pipeline commits them, with `synchronous=FULL`, which is tweetscore's, and with `NORMAL`, which a
power cut may take back; in turns, the median of several rounds.
"""

import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from sqlalchemy import event

from db import migrate, predictions
from db.session import Database, open_database
from tests.support.rows import assign, make_version, prediction_row, tweet_row

WAYS = ("NORMAL", "FULL")
# Tweets a window -> windows a round.
WINDOWS = {512: 10, 1: 200}
ROUNDS = 7


def opened(folder: str, way: str) -> tuple[Database, int]:
    database = open_database(f"sqlite:///{Path(folder) / way}.db")
    event.listen(database.engine, "connect", lambda raw, _: raw.execute(f"PRAGMA synchronous={way}"))
    migrate.upgrade(database)
    database.engine.dispose()  # what was opened before the pragma
    version = make_version(database)
    assign(database, version)
    return database, version


def store_ms(database: Database, version: int, tweets: int, first: int) -> float:
    """Milliseconds a window, of one round."""
    began = time.perf_counter()
    for window in range(WINDOWS[tweets]):
        ids = [str(first + window * tweets + i) for i in range(tweets)]
        with database.begin() as session:
            predictions.add_tweets(session, [tweet_row(id_) for id_ in ids])
            predictions.add_predictions(session, [prediction_row(id_, version) for id_ in ids])
    return (time.perf_counter() - began) * 1000 / WINDOWS[tweets]


def main() -> int:
    place = sys.argv[1] if len(sys.argv) > 1 else None
    with tempfile.TemporaryDirectory(dir=place) as folder:
        databases = {way: opened(folder, way) for way in WAYS}
        first = 10**15
        for tweets in WINDOWS:
            found: dict[str, list[float]] = {way: [] for way in WAYS}
            for _ in range(ROUNDS):
                for way, (database, version) in databases.items():
                    found[way].append(store_ms(database, version, tweets, first))
                    first += 10**6
            told = ", ".join(f"{way} {median(ms):.2f} ms ({min(ms):.2f} to {max(ms):.2f})" for way, ms in found.items())
            print(f"{tweets} tweets a window: {told}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
