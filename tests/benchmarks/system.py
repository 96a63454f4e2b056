"""A whole tweetscore on real processes, with a stopwatch: broker, database, champion and scoring workers.

Times what a user would: from the first XADD to the committed row. Knows the processes, the stream and the SQL tables,
and nothing of how a worker scores.
"""

import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import cached_property
from pathlib import Path
from typing import Any, Self
from unittest import mock

import psutil
import redis
from sqlalchemy import func, select

from db import migrate, registry
from db.models import ModelVersion, Prediction
from db.session import Database, open_database
from worker.connections import open_stream
from worker.process.supervisor import Supervisor, supervise
from worker.settings import load_settings
from worker.stream import embedded_valkey
from worker.stream.stream import Stream

log = logging.getLogger(__name__)

# Every look costs the worker a little of its cores: far from the end there are few.
POLL_SECONDS = 0.003
FAR_POLL_SECONDS = 0.05
FAR = 0.3
# The row of one tweet is waited for more closely, though not so closely that the wait takes a core from the worker.
LATENCY_POLL_SECONDS = 0.0002
DEPTH_POLL_SECONDS = 0.05
# A wait in which nothing moves for this long is given up.
STALL_SECONDS = 180.0
LOG_LINES = 30
IDS_A_QUERY = 10_000

# As many digits as ids on X have, rising like theirs, and above those of an earlier run.
_next_id = time.time_ns()


class WorkerEnded(RuntimeError):
    """A scoring worker ended while its work was waited for. Holds the end of its log."""


class Stalled(RuntimeError):
    """Nothing moved for `STALL_SECONDS`. Holds what was missing and the end of the workers' log."""


def tweets(n: int, source: Path | Sequence[str], *, ids_from: int | None = None) -> list[bytes]:
    """`n` wire records with consecutive ids and the given texts, or those of a JSONL file, whose lines have a `text`.

    Unless `ids_from` says otherwise, ids go on where the last call ended, so that no call is a replay of another. An
    id always has the same text: the texts are cycled. Equal texts of a window are scored once: fewer texts than the
    window has tweets measure less work than it seems.
    """
    first = fresh_ids(n) if ids_from is None else ids_from
    if isinstance(source, Path):
        with source.open(encoding="utf-8") as lines:
            texts: Sequence[str] = [json.loads(line)["text"] for line in lines if line.strip()]
    else:
        texts = source
    return [wire(i, texts[i % len(texts)]) for i in range(first, first + n)]


def fresh_ids(n: int) -> int:
    """The first of `n` consecutive ids that no other call gives."""
    global _next_id
    first, _next_id = _next_id, _next_id + n
    return first


def wire(id_: int, text: str) -> bytes:
    return json.dumps({"v": 1, "id": str(id_), "text": text}, ensure_ascii=False).encode()


def tweet_ids(payloads: Iterable[bytes]) -> list[str]:
    return [json.loads(payload)["id"] for payload in payloads]


class Look:
    """A connection beside the workers', in autocommit: each question sees what is committed at that moment."""

    def __init__(self, database: Database) -> None:
        # A session would spend ten times as long on a question of this size, and the worker needs the core.
        self._connection: Any = database.engine.raw_connection()
        self._postgresql = database.engine.dialect.name == "postgresql"
        if self._postgresql:
            self._connection.driver_connection.autocommit = True
        self._connection.detach()  # autocommit must not come back to the pool

    def rows(self, sql: str, *values: Any) -> list[tuple[Any, ...]]:
        """Every row of a statement whose parameters are written `?`; none for one that answers nothing."""
        cursor = self._connection.cursor()
        try:
            cursor.execute(sql.replace("?", "%s") if self._postgresql else sql, values)
            return [] if cursor.description is None else list(cursor.fetchall())
        finally:
            cursor.close()

    def value(self, sql: str, *values: Any) -> Any:
        """The first column of the first row, None without a row."""
        found = self.rows(sql, *values)
        return found[0][0] if found else None

    def server_process(self) -> int | None:
        """The process of the server that answers, as it numbers it; None with SQLite, which has none."""
        return int(self.value("SELECT pg_backend_pid()")) if self._postgresql else None

    def close(self) -> None:
        self._connection.close()


class System:
    """Broker, migrated database, one champion and `scorers` scoring workers; ready to score at once when entered.

    `artifact` is the folder of a saved model, `sha256` and `labels` its digest and labels; `environment` is what the
    workers find in theirs. The user's own settings hold for none of it. Leaving ends what was started here.
    """

    def __init__(
        self,
        home: Path,
        artifact: Path,
        sha256: str,
        labels: Sequence[str],
        *,
        database_url: str | None = None,
        scorers: int = 1,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.home, self.artifact, self.sha256, self.labels = home, artifact, sha256, list(labels)
        self.database_url, self.scorers, self.environment = database_url, scorers, dict(environment or {})
        self._stack = ExitStack()
        self.server: embedded_valkey.Server
        self.database: Database
        self.stream: Stream
        self.look: Look
        self.version_id: int
        self.workers: Supervisor
        self.publish_cpu_seconds = 0.0
        self._nudge: Callable[[], bool]

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            with mock.patch.dict(os.environ):
                self._set_environment()
                self._start(stack)
            self._make_ready()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    # --- starting

    def _set_environment(self) -> None:
        for name in [name for name in os.environ if name.startswith("TWEETSCORE_")] + ["REDIS_URL", "DATABASE_URL"]:
            os.environ.pop(name, None)
        store = str(self.artifact.absolute().parent)  # models are loaded from the store alone
        places = {"TWEETSCORE_HOME": str(self.home), "TWEETSCORE_MODEL_STORE": store}
        os.environ.update({**self.environment, **places})

    def _start(self, stack: ExitStack) -> None:
        settings = load_settings(**({"database_url": self.database_url} if self.database_url else {}))
        # These read the environment when they are imported, and make the home they find there.
        from worker.app import SCORING, make_app, nudge

        self.server = stack.enter_context(embedded_valkey.owned(settings.home))
        self.database = open_database(settings.sql_url)
        migrate.upgrade(self.database)
        stack.callback(self.database.close)
        self.look = Look(self.database)
        stack.callback(self.look.close)
        self.stream = open_stream(settings, self.server.url)
        celery = make_app(settings)
        stack.callback(celery.close)
        self._nudge = lambda: nudge(celery, SCORING)
        self.version_id = self.promote()
        self.workers = stack.enter_context(supervise(settings, ["score"] * self.scorers, log.warning))

    def promote(self) -> int:
        """Register the artifact as one more version, and make it the champion. Returns its id."""
        with self.database.begin() as session:
            version = ModelVersion(
                base_model=self.artifact.name, artifact_url=self.artifact.absolute().as_uri(), sha256=self.sha256,
                labels=self.labels, cleaner_version="1",
            )  # fmt: skip
            registry.add_version(session, version, [], [], [])
            registry.assign(session, registry.CHAMPION, version.id)
        return version.id

    def _make_ready(self) -> None:
        """Send single tweets until every worker has scored one: then each has its model and reads the stream."""
        before = self.last_window()

        def missing() -> int:
            sql = "SELECT count(DISTINCT worker) FROM scoring_windows WHERE id > ?"
            left = self.scorers - int(self.look.value(sql, before))
            if left and self.stream.depth().idle:
                self.publish([wire(fresh_ids(1), "今日はいい天気です。")])
            return left

        self._wait(missing, "workers that have scored", DEPTH_POLL_SECONDS)
        self.drain()

    def shrink(self, scorers: int) -> None:
        """Stop workers until there are so few."""
        self.drain()
        leaving = Supervisor(self.workers.settings, self.workers.notify, self.workers.children[scorers:])
        del self.workers.children[scorers:]
        leaving.stop()
        self.scorers = scorers

    # --- measuring

    def publish(self, payloads: Sequence[bytes]) -> None:
        """Append the records to the stream and nudge, as every publisher does."""
        before = time.process_time()
        self.stream.publish(payloads)
        self._nudge()
        self.publish_cpu_seconds += time.process_time() - before

    def score(self, payloads: Sequence[bytes]) -> float:
        """Seconds from just before the first XADD until the last row is committed, to `POLL_SECONDS`.

        `payloads` are tweets nobody has published yet: every record counts, also one that is buried. Raises
        `WorkerEnded` or `Stalled`.
        """
        self.drain()
        before = self.last_window()
        began = time.perf_counter()
        self.publish(payloads)
        self._wait(lambda: len(payloads) - self.handled(before), "tweets not scored", POLL_SECONDS, len(payloads))
        return time.perf_counter() - began

    def latency(self, payload: bytes) -> float:
        """Seconds for one tweet from its XADD until another connection sees its row. Raises as `score` does."""
        self.drain()
        (tweet_id,) = tweet_ids([payload])
        sql = "SELECT 1 FROM predictions WHERE tweet_id = ? AND model_version_id = ?"
        began = time.perf_counter()
        self.publish([payload])
        self._wait(
            lambda: int(self.look.value(sql, tweet_id, self.version_id) is None), "tweets not scored",
            LATENCY_POLL_SECONDS,
        )  # fmt: skip
        return time.perf_counter() - began

    def drain(self) -> None:
        """Return when no record waits in the stream and none is pending. Raises as `score` does."""

        def left() -> int:
            depth = self.stream.depth()
            return max(1, depth.lag or 0) + depth.pending if not depth.idle else 0

        self._wait(left, "records in the stream", DEPTH_POLL_SECONDS)

    def peak_memory(self) -> tuple[int, int]:
        """The largest resident size so far, in bytes: of the broker's process, and of the largest worker's."""
        return peak_bytes(self.broker_pid), max(peak_bytes(child.process.pid) for child in self.workers.children)

    def cpu_seconds(self) -> float:
        """Seconds of cores that all of it has used so far, see `cpu_parts`."""
        return sum(self.cpu_parts().values())

    def cpu_parts(self) -> dict[str, float]:
        """Seconds of cores so far: of the broker, the workers with their children, publishing from this process, and
        a PostgreSQL server of this machine."""
        workers = [_family(child.process.pid) for child in self.workers.children]
        return {
            "broker": _cpu_of([psutil.Process(self.broker_pid)]), "workers": sum(map(_cpu_of, workers)),
            "publisher": self.publish_cpu_seconds, "database": _cpu_of(_family(self._postgresql_pid)),
        }  # fmt: skip

    @cached_property
    def _postgresql_pid(self) -> int | None:
        """The process that started the one behind a connection; None with SQLite, or where it runs elsewhere."""
        pid = self.look.server_process()
        with suppress(psutil.Error):
            process = psutil.Process(pid) if pid else None
            if process and process.name() == "postgres":
                return process.ppid()
        return None

    @cached_property
    def broker_pid(self) -> int:
        with redis.Redis.from_url(self.server.url) as client:
            return int(client.info("server")["process_id"])

    # --- looking at what was stored

    def last_window(self) -> int:
        """The id of the newest scoring window, 0 before the first."""
        return int(self.look.value("SELECT coalesce(max(id), 0) FROM scoring_windows"))

    def handled(self, after_window: int) -> int:
        """Records scored or buried in the windows after one: a look at a few rows, however many predictions there
        are."""
        sql = "SELECT coalesce(sum(tweets + buried), 0) FROM scoring_windows WHERE id > ?"
        return int(self.look.value(sql, after_window))

    def rows(self, ids: Sequence[str]) -> tuple[int, int]:
        """How many predictions there are for these ids, of any model version, and of how many distinct tweets."""
        predictions = distinct = 0
        ids = list(dict.fromkeys(ids))
        with self.database.read() as session:
            for start in range(0, len(ids), IDS_A_QUERY):
                counts = select(func.count(), func.count(Prediction.tweet_id.distinct()))
                chunk = Prediction.tweet_id.in_(ids[start : start + IDS_A_QUERY])
                found = session.execute(counts.where(chunk)).one()
                predictions, distinct = predictions + found[0], distinct + found[1]
        return predictions, distinct

    # --- waiting

    def _wait(self, left: Callable[[], int], what: str, pause: float, of: int | None = None) -> None:
        """Return when `left()` is 0 or less; raises when a worker has ended or nothing has moved for too long."""
        least, moved_at = None, time.monotonic()
        while (missing := left()) > 0:
            now = time.monotonic()
            for child in self.workers.children:
                if (code := child.process.poll()) is not None:
                    raise WorkerEnded(f"a worker ended (exit {code}) with {missing} {what}:\n{tail(child.log)}")
            if least is None or missing < least:
                least, moved_at = missing, now
            elif now - moved_at > STALL_SECONDS:
                ends = "\n".join(tail(path) for path in {child.log for child in self.workers.children})
                raise Stalled(f"{missing} {what} for {STALL_SECONDS:.0f} s:\n{ends}")
            time.sleep(FAR_POLL_SECONDS if of and missing > FAR * of > 100 else pause)


def tail(path: Path) -> str:
    return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:])


def _family(pid: int | None) -> list[psutil.Process]:
    """A process and all that it started."""
    return [(first := psutil.Process(pid)), *first.children(recursive=True)] if pid else []


def _cpu_of(processes: Iterable[psutil.Process]) -> float:
    total = 0.0
    for process in processes:
        with suppress(psutil.NoSuchProcess):  # a helper may end meanwhile
            times = process.cpu_times()
            total += times.user + times.system
    return total


def peak_bytes(pid: int) -> int:
    """The largest resident size a living process has had, in bytes, as Linux counts it (VmHWM)."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:"))
