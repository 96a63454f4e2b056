"""A plan for a rate of tweets: what it needs, which part is the first wall, and what tweets wait at peaks."""

from dataclasses import asdict, dataclass
from typing import Any

from worker.errors import BadRequest
from worker.plan.arrivals import RECORD_BURST, in_busiest, read_curve
from worker.plan.capacity import Fleet, Hardware, Wall, bounded, fleet, model_figures, walls
from worker.plan.figures import Figures, StoreFigures
from worker.plan.peaks import Burst, Hour, after_burst, day
from worker.settings import Settings

# The busiest hour takes at most this share of the scorers' speed, unless the number of scorers is given.
UTILISATION = 0.7
DAY_SECONDS = 86_400
HIGH_WATER: int = Settings.model_fields["high_water"].default


@dataclass(frozen=True)
class Request:
    tweets_per_second: float
    hardware: Hardware
    curve: str | None = None
    database: str | None = None
    database_cores: int = 4
    retention_days: float | None = None
    outage_hours: float = 1.0
    burst: int = RECORD_BURST
    utilisation: float = UTILISATION


@dataclass(frozen=True)
class Storage:
    """The database at the mean rate, writes at the busiest hour. None where there is no figure, or no retention.

    `bytes_per_second` counts a row twice: in the log and in its table. `writes_per_second` are those bytes in pages of
    `page_bytes`, if none is written twice or together with others, and one sync for each window.
    """

    rows: float | None
    bytes: float | None
    bytes_per_second: float | None
    syncs_per_second: float
    writes_per_second: float | None


@dataclass(frozen=True)
class Stream:
    """Memory that the stream takes when nothing is scored for the busiest `outage_hours` of a day."""

    outage_hours: float
    tweets: float
    bytes: float


@dataclass(frozen=True)
class Cores:
    """Cores that are busy in the busiest hour; and core-hours per million tweets while windows are large. None is a
    database without processes of its own. A GPU is not in them."""

    scorers: float
    valkey: float
    database: float | None
    core_hours_per_million: float


@dataclass(frozen=True)
class Plan:
    tweets_per_second: float
    peak_tweets_per_second: float
    model: str
    database: str
    fleet: Fleet
    cores: Cores
    storage: Storage
    stream: Stream
    walls: list[Wall]
    hours: list[Hour]
    burst: Burst
    notes: list[str]


def make_plan(figures: Figures, request: Request) -> Plan:
    """Raises `BadRequest` for a model or a GPU without figures."""
    curve, rate = read_curve(request.curve), request.tweets_per_second
    peak = rate * float(curve.max())
    if request.database not in (None, "sqlite", "postgresql"):
        raise BadRequest(f"{request.database!r} is not a database; use sqlite or postgresql")
    kind = request.database or "postgresql"
    found = fleet(figures, getattr(figures, kind), request.hardware, peak, request.utilisation)
    if request.database is None and found.scorers == 1:  # one scorer writes to a file as fast as it scores
        kind = "sqlite"
        found = fleet(figures, figures.sqlite, request.hardware, peak, request.utilisation)
    store: StoreFigures = getattr(figures, kind)
    per_tweet = _written_bytes(store)
    limits = walls(figures, kind, found, request.database_cores, per_tweet)
    # What the first limit lets through is all that the scorers can do.
    least = limits[0].tweets_per_second
    simulated = found if least is None else bounded(found, least)
    hours = day(simulated, curve, rate)
    storage = _storage(store, request, peak, max(hour.windows_per_second for hour in hours))
    outage = in_busiest(curve, rate, request.outage_hours)
    return Plan(
        rate, peak, request.hardware.model, kind, found,
        cores=_cores(figures, store, request, max(hours, key=lambda hour: hour.tweets_per_second)),
        storage=storage,
        stream=Stream(request.outage_hours, outage, outage * figures.stream.bytes_per_tweet),
        walls=limits,
        hours=hours,
        burst=after_burst(simulated, rate, request.burst),
        notes=_notes(figures, request, kind, found, max(outage, request.burst)),
    )  # fmt: skip


def _written_bytes(store: StoreFigures) -> float | None:
    """Bytes a tweet that the disk writes: the log, and the tables once."""
    if store.bytes_per_tweet is None or store.wal_bytes_per_tweet is None:
        return None
    return store.bytes_per_tweet + store.wal_bytes_per_tweet


def _storage(store: StoreFigures, request: Request, peak: float, windows_per_second: float) -> Storage:
    kept = request.retention_days
    rows = None if kept is None else request.tweets_per_second * DAY_SECONDS * kept
    size = None if rows is None or store.bytes_per_tweet is None else rows * store.bytes_per_tweet
    per_tweet, written, writes = _written_bytes(store), None, None
    if per_tweet is not None:
        written = peak * per_tweet
        writes = windows_per_second + written / store.page_bytes
    return Storage(rows, size, written, windows_per_second, writes)


def _cores(figures: Figures, store: StoreFigures, request: Request, busiest: Hour) -> Cores:
    """On CPUs the measured windows include the embedded server and SQLite; this database is put in their place."""
    peak, stream_ms = busiest.tweets_per_second, figures.stream.core_ms
    server_ms = 0.0 if store.server_core_ms is None else store.server_core_ms[0]
    if request.hardware.on_gpu:
        busy, best_ms = busiest.busy_cores, store.scorer_core_ms
    else:
        other_ms = figures.sqlite.store_core_ms + stream_ms - store.store_core_ms
        busy = max(0.0, busiest.busy_cores - peak * other_ms / 1e6)
        best_ms = 1000 * model_figures(figures, request.hardware.model).core_ms_per_tweet - other_ms
    return Cores(
        scorers=busy, valkey=peak * stream_ms / 1e6,
        database=peak * server_ms / 1e6 if store.server_core_ms else None,
        core_hours_per_million=(best_ms + stream_ms + server_ms) / 3600,
    )  # fmt: skip


def _notes(figures: Figures, request: Request, kind: str, found: Fleet, most_waiting: float) -> list[str]:
    notes = [f"Speed of a scorer: {found.source}."]
    if request.hardware.on_gpu:
        notes.append("No GPU was measured: neither the time that a window takes at least nor GPU memory is known.")
    if kind == "sqlite" and found.scorers > 1 and not request.hardware.on_gpu:
        notes.append("Scorers on several machines need PostgreSQL; an SQLite file is for one machine.")
    if request.curve is None:
        notes.append("The curve of the day is assumed; --curve takes your own.")
    if most_waiting > HIGH_WATER:
        notes.append(f"Publishers wait while more than TWEETSCORE_HIGH_WATER tweets do, by default {HIGH_WATER:,}.")
    notes.append(f"Everything else: measured on {figures.machine}.")
    return notes


def as_fields(made: Plan) -> dict[str, Any]:
    """The plan as plain values."""
    fields = asdict(made)
    fields["fleet"]["tweets_per_second_per_scorer"] = made.fleet.scorer.tweets_per_second
    return fields
