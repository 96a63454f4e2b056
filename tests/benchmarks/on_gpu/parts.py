"""Parts of a benchmark that run one after another: each within its time, and none stops the others.

A part writes what it finds as it finds it, so that a part that fails or is cut leaves what it had.
"""

import json
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

# A part that does not stop by itself is interrupted this long after its time, unless it is the last to run.
SLACK_SECONDS = 10.0
# A part is not started with less than this left.
LEAST_SECONDS = 3.0
FRAMES = 4
LOG_LINES = 20


class TimeUp(Exception):
    """The part took longer than its time and `SLACK_SECONDS`."""


@dataclass
class Table:
    title: str
    columns: Sequence[str]
    rows: list[list[Any]] = field(default_factory=list)

    def add(self, *values: Any) -> None:
        self.rows.append(list(values))

    def __str__(self) -> str:
        lines = [f"**{self.title}**", "", f"| {' | '.join(self.columns)} |", "|---" * len(self.columns) + "|"]
        lines += [f"| {' | '.join(map(shown, row))} |" for row in self.rows]
        return "\n".join(lines)


@dataclass
class Record:
    """What a part found: `tables` for people, `data` for programs, `notes` for both."""

    name: str
    until: float
    tables: list[Table] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    error: str | None = None
    trace: list[str] = field(default_factory=list)

    def table(self, title: str, *columns: str) -> Table:
        self.tables.append(Table(title, columns))
        return self.tables[-1]

    def note(self, text: str) -> None:
        self.notes.append(text)
        say(f"  {text}")

    @property
    def left(self) -> float:
        """Seconds left to this part."""
        return self.until - time.monotonic()

    def failed(self, what: str, error: BaseException) -> None:
        """Note that one thing in the part could not be measured."""
        self.note(f"{what}: {first_lines(error)}")

    def markdown(self) -> str:
        lines = [f"## {self.name} ({self.seconds:.0f} s)", ""]
        for table in self.tables:
            lines += [str(table), ""]
        lines += [f"- {note}" for note in self.notes]
        if self.error:
            lines += [f"- failed: {self.error}"]
        return "\n".join([*lines, ""])


@dataclass(frozen=True)
class Part:
    """`work` gets the benchmark's state and the record to write to; it has `seconds`."""

    name: str
    seconds: float
    work: Callable[[Any, Record], None]


def run_parts(
    parts: Sequence[Part], state: Any, limit: float, done: Callable[[Mapping[str, Record]], None]
) -> dict[str, Record]:
    """Run the parts within `limit` seconds in all; `done` gets the records after every part."""
    records: dict[str, Record] = {}
    end = time.monotonic() + limit
    for part in parts:
        began = time.monotonic()
        record = records[part.name] = Record(part.name, min(began + part.seconds, end))
        say(f"{part.name} ({end - began:.0f} s left) ...")
        try:
            if record.left < LEAST_SECONDS:
                raise TimeUp("no time was left for it")
            # Libraries print to the standard output, which is for the tables.
            with interrupted_after(record.left + SLACK_SECONDS), redirect_stdout(sys.stderr):
                part.work(state, record)
        except Exception as error:
            record.error = first_lines(error)
            record.trace = traceback.format_exception(error)[-FRAMES:]
            # An error of a worker ends with its log.
            say("\n    ".join([f"  failed: {record.error}", *str(error).splitlines()[2:][-LOG_LINES:]]))
        record.seconds = time.monotonic() - began
        say(f"{part.name}: {record.seconds:.1f} s")
        print(record.markdown(), flush=True)
        done(records)
    return records


@contextmanager
def interrupted_after(seconds: float) -> Iterator[None]:
    """Raise `TimeUp` in the block after so long. Only the main thread can be interrupted."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: Any) -> None:
        raise TimeUp("it took too long")

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def timed(work: Callable[[], object], rounds: int, left: Callable[[], float] | None = None) -> list[float]:
    """Seconds of each round: at least one, and none starts after the time is up."""
    found: list[float] = []
    while not found or (len(found) < rounds and (left is None or left() > 0)):
        began = time.perf_counter()
        work()
        found.append(time.perf_counter() - began)
    return found


def middle(values: Sequence[float]) -> float:
    return float(median(values))


def shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return "" if value is None else f"{value:,}" if type(value) is int else str(value)


def first_lines(error: BaseException) -> str:
    """Type and first lines of an error, on one line."""
    lines = [line.strip()[:200] for line in str(error).strip().splitlines() if line.strip()]
    return f"{type(error).__name__}: {' / '.join(lines[:2])}"


def say(text: str) -> None:
    """Progress, with the seconds since the process began to measure."""
    print(f"[{time.monotonic() - _BEGAN:6.1f} s] {text}", file=sys.stderr, flush=True)


def write_json(path: Path | None, head: Mapping[str, Any], records: Mapping[str, Record]) -> None:
    """Write everything found so far, atomically."""
    if path is None:
        return
    parts = {
        name: {
            "seconds": record.seconds, "error": record.error, "trace": record.trace, "notes": record.notes,
            "data": record.data,
            "tables": [{"title": t.title, "columns": t.columns, "rows": t.rows} for t in record.tables],
        }
        for name, record in records.items()
    }  # fmt: skip
    draft = path.with_name(f".{path.name}.draft")
    written = json.dumps({**head, "parts": parts}, indent=1, ensure_ascii=False, default=str)
    draft.write_text(written, encoding="utf-8")
    draft.replace(path)


_BEGAN = time.monotonic()
