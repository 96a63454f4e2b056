"""`tweetscore top`: the whole at a glance in a terminal, redrawn every few seconds."""

import os
import select
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from worker.cli import output
from worker.cli.output import Json

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table
    from rich.text import Text

    from db.models import TrainingJob
    from worker.process.overview import DatabaseState, Overview, StreamState

BLOCKS = "▁▂▃▄▅▆▇█"
BAR_WIDTH = 6
ROWS = 8
# Of a column that is not cut off in a narrow terminal.
WIDEST = 26
QUIT = ("q", "Q")
STYLES = {
    "working": "green", "loading a model": "yellow", "waiting": "yellow", "ending": "yellow", "running": "cyan",
}  # fmt: skip


def top(
    interval: Annotated[float, typer.Option(min=0.2, max=3600, help="Seconds between two looks.")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Print the state once and exit.")] = False,
    json: Json = False,
) -> None:
    """Show rate, lag, stages, workers, jobs and labels, until q or Ctrl-C."""
    from worker.process.overview import OverviewReader
    from worker.settings import load_settings

    reader = OverviewReader(load_settings())
    try:
        if json:
            output.as_json(as_fields(reader.read()))
        elif once or not output.console.is_terminal:
            output.console.print(frame(reader.read()))
        else:
            _follow(reader.read, interval)
    finally:
        reader.close()


def _follow(read: Any, interval: float) -> None:
    from rich.live import Live

    with _keys() as wait, Live(console=output.console, screen=True, auto_refresh=False) as live:
        try:
            while True:
                live.update(frame(read(), hint="q quits"), refresh=True)
                if wait(interval) in QUIT:
                    return
        except KeyboardInterrupt:
            return


@contextmanager
def _keys() -> Iterator[Any]:
    """Yield a function that waits up to some seconds for a key and returns it; empty for none. Needs no Enter."""
    if not sys.stdin.isatty():

        def pause(seconds: float) -> str:
            time.sleep(seconds)
            return ""

        yield pause
        return
    import termios
    import tty

    number = sys.stdin.fileno()
    before = termios.tcgetattr(number)

    def wait(seconds: float) -> str:
        ready, _, _ = select.select([number], [], [], seconds)
        return os.read(number, 1).decode(errors="replace") if ready else ""

    try:
        tty.setcbreak(number)
        yield wait
    finally:
        termios.tcsetattr(number, termios.TCSADRAIN, before)


# --- the frame


def frame(found: "Overview", hint: str = "") -> "RenderableType":
    """Everything that is shown of an overview, in lines that fit 80 columns."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    head = Table.grid(expand=True)
    head.add_column()
    head.add_column(justify="right")
    head.add_row(Text("tweetscore", style="bold"), Text(f"{found.at:%Y-%m-%d %H:%M:%S} UTC  {hint}".rstrip()))
    body = Table.grid(padding=(0, 2, 1, 0))
    body.add_column(width=8, style="bold")
    body.add_column()
    for name, part in _parts(found):
        body.add_row(name, part)
    return Group(head, Text(), body)


def _parts(found: "Overview") -> "Iterator[tuple[str, RenderableType]]":
    database, stream = found.database, found.stream
    if not isinstance(database, str):
        yield "tweets", _rate(database)
    yield "stream", _problem(stream) if isinstance(stream, str) else _stream(stream)
    if isinstance(database, str):
        yield "database", _problem(database)
    else:
        yield "stages", _stages(database)
        yield "models", _models(database)
    yield "workers", _workers(found)
    if not isinstance(database, str):
        yield "jobs", _jobs(database.jobs)
        yield "labels", _labels(database)
        yield "dead", _dead(database.dead_letters)


def _problem(reason: str) -> "Text":
    from rich.text import Text

    return Text(reason, style="red")


def _line(text: str, style: str = "") -> "Text":
    from rich.text import Text

    return Text(text, style, no_wrap=True, overflow="ellipsis")


def sparkline(values: Sequence[float]) -> str:
    """One character per value: a space for 0, else a block whose height is the share of the largest value."""
    largest = max(values, default=0.0)
    if largest <= 0:
        return " " * len(values)
    return "".join(" " if not value else BLOCKS[min(7, int(8 * value / largest))] for value in values)


def _rate(database: "DatabaseState") -> "RenderableType":
    from rich.text import Text

    minutes = _minutes()
    line = Text.assemble((f"{database.tweets_per_second:,.0f} a second", "bold green"), no_wrap=True)
    if any(database.rates):
        line.append("   ").append(sparkline(database.rates), "cyan")
        line.append(f" {minutes} min, max {max(database.rates):,.0f}")
    else:
        line.append(f"   none in the last {minutes} minutes")
    return line


def _minutes() -> int:
    from worker.process.overview import RATE_PERIODS, RATE_SECONDS

    return RATE_PERIODS * RATE_SECONDS // 60


def _stream(stream: "StreamState") -> "RenderableType":
    lag = "unknown" if stream.depth.lag is None else f"{stream.depth.lag:,}"
    return _line(f"{lag} not read, {stream.depth.pending:,} being scored")


def _stages(database: "DatabaseState") -> "RenderableType":
    recent = database.recent
    if not recent.windows:
        return _line("no window in the last half minute")
    stages = ("read", "tokenise", "forward", "store")
    times = ", ".join(f"{stage} {getattr(recent, f'{stage}_ms') / recent.windows:.1f}" for stage in stages)
    return _line(f"{times} ms for {recent.tweets / recent.windows:,.0f} tweets")


def _models(database: "DatabaseState") -> "RenderableType":
    champion, challenger = database.models.get("champion"), database.models.get("challenger")
    if champion is None:
        return _line("no champion; train a model, then `tweetscore models promote ID`", "yellow")
    from rich.console import Group

    lines = [_line(f"champion {champion.version_id}, {champion.base_model}, since {champion.since:%Y-%m-%d %H:%M}")]
    if challenger is not None and challenger.version_id != champion.version_id:
        scored = f"{challenger.tweets:,} tweets in {_minutes()} min"
        lines.append(_line(f"challenger {challenger.version_id}, {challenger.base_model}, {scored}"))
    return Group(*lines)


def _workers(found: "Overview") -> "RenderableType":
    from rich.console import Group

    parts: list[Any] = []
    if found.workers:
        beats = sorted(found.workers, key=lambda beat: (beat.kind, beat.host, beat.pid))
        rows = [
            (beat.kind, f"{beat.host} {beat.pid}",
             _line("no heartbeat" if beat.stale else beat.state, "red" if beat.stale else STYLES.get(beat.state, "")),
             _line(beat.waits_for or f"seen {beat.age_seconds:.0f} s ago"))
            for beat in beats[:ROWS]
        ]  # fmt: skip
        parts += [_grid(rows), *_more(len(beats))]
    else:
        parts.append(_line("none runs on this home; start `tweetscore up`", "yellow"))
    if not isinstance(found.stream, str) and found.stream.consumers:
        members = found.stream.consumers
        rows = [
            ("reads", member.name, _line(f"holds {member.pending:,}"), _line(f"idle {member.idle_seconds:.0f} s"))
            for member in members[:ROWS]
        ]
        parts += [_grid(rows), *_more(len(members))]
    return Group(*parts)


def _jobs(jobs: "Sequence[TrainingJob]") -> "RenderableType":
    if not jobs:
        return _line("none runs or waits")
    from worker.intake.job_progress import pace

    rows = []
    for job in jobs:
        done = job.step / job.total_steps if job.total_steps else 0.0
        filled = round(BAR_WIDTH * min(1.0, done))
        shown = f"{'█' * filled}{'░' * (BAR_WIDTH - filled)} {done:4.0%}" if job.state == "running" else ""
        text = pace(job) if job.state == "running" else job.error or ""
        rows.append((f"{job.id} {job.kind}", _line(job.state, STYLES.get(job.state, "")), _line(shown), _line(text)))
    return _grid(rows)


def _labels(database: "DatabaseState") -> "RenderableType":
    total = sum(database.labels)
    if not total:
        return _line(f"none in the last {len(database.labels)} minutes")
    line = _line(f"{total:,} in {len(database.labels)} min, {database.labels[-1]:,} in the last   ")
    return line.append(sparkline(database.labels), "cyan")


def _dead(letters: int) -> "RenderableType":
    return _line(f"{letters:,} letters; `tweetscore dead list` shows why", "red") if letters else _line("no letters")


def _grid(rows: "Sequence[tuple[Any, ...]]") -> "Table":
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2, 0, 0))
    cells = [[Text(cell) if isinstance(cell, str) else cell for cell in row] for row in rows]
    for column in list(zip(*cells, strict=True))[:-1]:
        table.add_column(no_wrap=True, overflow="ellipsis", min_width=min(WIDEST, max(map(len, column))))
    table.add_column(no_wrap=True, overflow="ellipsis")  # cut first
    for row in cells:
        table.add_row(*row)
    return table


def _more(count: int) -> list[Any]:
    return [_line(f"and {count - ROWS:,} more")] if count > ROWS else []


# --- JSON


def as_fields(found: "Overview") -> dict[str, Any]:
    from dataclasses import asdict

    stream, database = found.stream, found.database
    return {
        "at": found.at,
        "workers": [asdict(beat) for beat in found.workers],
        "stream": {"error": stream} if isinstance(stream, str) else asdict(stream),
        "database": {"error": database}
        if isinstance(database, str)
        else {
            "kind": database.kind,
            "tweets_per_second": database.tweets_per_second,
            "rates": database.rates,
            "recent_windows": database.recent._asdict(),
            "models": {alias: asdict(served) for alias, served in database.models.items()},
            "jobs": [
                {name: getattr(job, name) for name in ("id", "kind", "state", "step", "total_steps", "loss", "error")}
                for job in database.jobs
            ],
            "labels": database.labels,
            "dead_letters": database.dead_letters,
        },
    }
