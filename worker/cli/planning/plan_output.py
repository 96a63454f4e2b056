"""The plan on a terminal."""

from worker.cli import output
from worker.plan.capacity import Wall
from worker.plan.peaks import Burst, Hour
from worker.plan.plan import Plan

MINUTES_SHOWN = 6
UNITS = ("bytes", "kB", "MB", "GB", "TB", "PB")
UNKNOWN = "no figure"


def show(made: Plan) -> None:
    peak = made.peak_tweets_per_second
    output.table(f"Needs ({made.model}, busiest hour)", ["", ""], _needs(made))
    output.table(
        "Limits, the first on top",
        ["part", "tweets/s", "of the busiest hour", ""],
        [_wall(w, peak) for w in made.walls],
    )
    output.compact_table(["hour", "tweets/s", "load", "left over", "p50", "p99"], [_hour(hour) for hour in made.hours])
    output.line(f"\n{_burst(made.burst)}")
    minutes = [(minute.minute, _time(minute.p50_seconds), _time(minute.p99_seconds)) for minute in made.burst.minutes]
    output.compact_table(["minute", "p50", "p99"], minutes[:MINUTES_SHOWN])
    output.line("\n" + "\n".join(made.notes))


def _needs(made: Plan) -> list[tuple[str, str]]:
    found, cores, storage, stream = made.fleet, made.cores, made.storage, made.stream
    one = found.scorer.tweets_per_second
    server = f", PostgreSQL {cores.database:.1f}" if cores.database is not None else ""
    rows = "without retention it grows for ever" if storage.rows is None else f"{storage.rows:,.0f} tweets"
    written = "bytes: " + UNKNOWN if storage.bytes_per_second is None else f"{_size(storage.bytes_per_second)} a second"
    iops = "" if storage.writes_per_second is None else f", at most {storage.writes_per_second:,.0f} IOPS"
    return [
        ("tweets", f"{made.tweets_per_second:,.0f} a second, {made.peak_tweets_per_second:,.0f} in the busiest hour"),
        ("scorers", f"{found.scorers:,} of {one:,.0f} tweets/s on {found.devices:,} {found.device}"),
        ("busy cores", f"scorers {cores.scorers:.1f}, Valkey {cores.valkey:.1f}{server}"),
        ("cost", f"{cores.core_hours_per_million:.2f} core-hours per million tweets"),
        ("database", f"{made.database}, {UNKNOWN if storage.bytes is None else _size(storage.bytes)}; {rows}"),
        ("written", f"{written}, {storage.syncs_per_second:,.0f} syncs a second{iops}"),
        (
            "stream",
            f"{_size(stream.bytes)} after {stream.outage_hours:g} h without scorers, {stream.tweets:,.0f} tweets",
        ),
    ]


def _wall(wall: Wall, peak: float) -> tuple[str, str, str, str]:
    if wall.tweets_per_second is None:
        return wall.part, UNKNOWN, "", wall.note
    return wall.part, f"{wall.tweets_per_second:,.0f}", f"{wall.tweets_per_second / peak:.1f} times", wall.note


def _hour(hour: Hour) -> tuple[str, ...]:
    whole, minutes = divmod(round(60 * hour.hour), 60)
    load, times = f"{hour.utilisation:.0%}", (_time(hour.p50_seconds), _time(hour.p99_seconds))
    return f"{whole:02}:{minutes:02}", f"{hour.tweets_per_second:,.0f}", load, f"{hour.backlog:,.0f}", *times


def _burst(burst: Burst) -> str:
    ended = "not drained in an hour" if burst.drain_seconds is None else f"drained in {_time(burst.drain_seconds)}"
    return f"A burst of {burst.tweets:,} tweets in a second: at most {burst.backlog_peak:,} wait, {ended}."


def _size(count: float) -> str:
    power = 0
    while count >= 1000 and power + 1 < len(UNITS):
        count, power = count / 1000, power + 1
    return f"{count:,.1f} {UNITS[power]}"


def _time(seconds: float) -> str:
    return f"{1000 * seconds:,.0f} ms" if seconds < 10 else f"{seconds:,.0f} s"
