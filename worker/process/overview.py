"""The state of the whole at one moment: stream, workers, models, jobs, labels. Reads, and changes nothing."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import TypeVar

from sqlalchemy import make_url
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from db import migrate, predictions
from db.admin import activity
from db.admin.activity import Windows
from db.errors import RightsMissing, TweetscoreError
from db.models import TrainingJob, utc_now
from db.session import Database, open_database
from worker.connections import no_stream, open_stream, stream_url
from worker.process.heartbeat import Beat, read_heartbeats
from worker.settings import Settings
from worker.stream.server_status import Consumer
from worker.stream.stream import Depth

# The last periods of the rate and of the labels, and their lengths.
RATE = RATE_PERIODS, RATE_SECONDS = 30, 20
LABELS = LABEL_PERIODS, LABEL_SECONDS = 30, 60
# The rate now, and the times of the stages, are means over this long.
NOW_SECONDS = 30
JOBS = 8

Part = TypeVar("Part")
Count = Callable[[Session, datetime, int], dict[int, int]]


@dataclass(frozen=True)
class Served:
    """The model version of an alias, and how many tweets it scored in the periods of the rate."""

    version_id: int
    base_model: str
    since: datetime
    tweets: int


@dataclass(frozen=True)
class StreamState:
    depth: Depth
    consumers: list[Consumer]


@dataclass(frozen=True)
class DatabaseState:
    """`rates` are tweets a second, and `labels` numbers of labels, in the last periods, oldest first."""

    kind: str
    recent: Windows
    rates: list[float]
    models: dict[str, Served]
    jobs: list[TrainingJob]
    labels: list[int]
    dead_letters: int

    @property
    def tweets_per_second(self) -> float:
        return self.recent.tweets / NOW_SECONDS


@dataclass(frozen=True)
class Overview:
    """`stream` and `database` are the reason, one sentence, when they cannot be read."""

    at: datetime
    workers: list[Beat]
    stream: StreamState | str
    database: DatabaseState | str


class OverviewReader:
    """Reads overviews one after the other on the same connections."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._database: Database | None = None
        self._stream = open_stream(settings, stream_url(settings), brief=True)

    def read(self) -> Overview:
        return Overview(
            utc_now(),
            read_heartbeats(self._settings.run),
            _or_reason(self._read_stream),
            _or_reason(self._read_database),
        )

    def close(self) -> None:
        self._stream.close()
        if self._database is not None:
            self._database.close()

    def _read_stream(self) -> StreamState:
        if reason := no_stream(self._settings):
            raise TweetscoreError(reason)
        return StreamState(self._stream.depth(), self._stream.consumers())

    def _read_database(self) -> DatabaseState:
        if self._database is None:
            self._database = _open(self._settings)
        now = utc_now()
        with self._database.read() as session:
            return DatabaseState(
                self._database.engine.dialect.name,
                activity.windows(session, now - timedelta(seconds=NOW_SECONDS)),
                [tweets / RATE_SECONDS for tweets in _periods(session, now, activity.tweets_by_period, *RATE)],
                _models(session, now - timedelta(seconds=RATE_PERIODS * RATE_SECONDS)),
                activity.open_jobs(session, JOBS),
                _periods(session, now, activity.labels_by_period, *LABELS),
                predictions.dead_count(session),
            )


def _open(settings: Settings) -> Database:
    """Open the database as queries do, and check its schema without changing it."""
    url = make_url(settings.query_url)
    if url.get_backend_name() == "sqlite" and not Path(url.database or "").is_file():
        raise TweetscoreError("there is no database yet; `tweetscore up` creates it")
    database = open_database(settings.query_url)
    try:
        migrate.check(database)
    except RightsMissing:  # a role that may read the tables need not read the schema's version
        pass
    except TweetscoreError:
        database.close()
        raise
    return database


def _models(session: Session, since: datetime) -> dict[str, Served]:
    return {
        alias: Served(
            version.id, version.base_model, assigned.assigned_at, activity.predictions_since(session, version.id, since)
        )
        for alias, (assigned, version) in activity.aliases(session).items()
    }


def _periods(session: Session, now: datetime, count: Count, periods: int, seconds: int) -> list[int]:
    """The counts of the last whole periods, oldest first."""
    current = int(now.timestamp()) // seconds
    since = now - timedelta(seconds=(periods + 1) * seconds)
    found = count(session, since, seconds)
    return [found.get(number, 0) for number in range(current - periods, current)]


def _or_reason(read: Callable[[], Part]) -> Part | str:
    try:
        return read()
    except SQLAlchemyError as error:
        return f"the database does not answer ({type(error).__name__})"
    except TweetscoreError as error:
        return str(error)
