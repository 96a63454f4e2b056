"""The measured figures that a plan is made from: those in `measured.json`, and those of the user's own machine.

A figure that was never measured is None, and the plan says so.
"""

import json
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError, model_validator

from worker.errors import BadRequest

PACKAGED = "measured.json"


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class WindowCost(Part):
    """What a window of so many tweets costs one scorer that has the machine's cores for itself.

    `period_ms` is the time from one window to the next while a backlog waits, `alone_ms` the time from reading to the
    commit of a window that meets an idle scorer, `core_ms` the time of all cores, the stream's server included.
    """

    tweets: PositiveInt
    period_ms: PositiveFloat
    alone_ms: PositiveFloat
    core_ms: PositiveFloat


class ModelFigures(Part):
    """A model, and the machine with so many cores that one scorer had for itself."""

    machine: str
    cores: PositiveInt
    engine: str = ""
    gflop_per_tweet: PositiveFloat | None = None
    windows: list[WindowCost] = Field(min_length=2)

    @model_validator(mode="after")
    def _larger_windows_last(self) -> Self:
        if not all(one.tweets < other.tweets for one, other in pairwise(self.windows)):
            raise ValueError("windows must be listed from the smallest to the largest")
        return self

    @property
    def tweets_per_second(self) -> float:
        """What one scorer reaches while a backlog waits."""
        return max(1000 * window.tweets / window.period_ms for window in self.windows)

    @property
    def core_ms_per_tweet(self) -> float:
        return min(window.core_ms / window.tweets for window in self.windows)


class StoreFigures(Part):
    """A kind of database. Core-milliseconds are per 1,000 tweets.

    `scorer_core_ms` is the time of a scoring worker outside the model, `locked_core_ms` the part of it that holds
    Python's global lock, `server_core_ms` that of the database's own processes (typical and highest), `writer_ms` the
    time in which no other process can write.
    """

    scorer_core_ms: PositiveFloat
    locked_core_ms: PositiveFloat
    store_core_ms: PositiveFloat
    server_core_ms: tuple[PositiveFloat, PositiveFloat] | None = None
    writer_ms: PositiveFloat | None = None
    page_bytes: PositiveInt
    bytes_per_tweet: PositiveFloat | None = None
    wal_bytes_per_tweet: PositiveFloat | None = None


class StreamFigures(Part):
    """`core_ms`: of the server's one thread, publishing included, per 1,000 tweets. `bytes_per_tweet`: of memory."""

    core_ms: PositiveFloat
    bytes_per_tweet: PositiveFloat


class GpuFigures(Part):
    """A GPU: its fastest matrix product, the share of it that a model of base size reaches, and an assumption: the time
    that a window takes however small it is."""

    tflops: PositiveFloat
    share: float = Field(gt=0, le=1)
    assumed_window_ms: PositiveFloat


class Figures(Part):
    """`machine` says where and when the figures other than those of models were measured."""

    machine: str
    models: dict[str, ModelFigures]
    sqlite: StoreFigures
    postgresql: StoreFigures
    stream: StreamFigures
    gpus: dict[str, GpuFigures]
    disk_mb_per_second: PositiveFloat | None = None


def load_figures(measured: list[str]) -> Figures:
    """The packaged figures, with those of the given files in their place; of two files the later one holds.

    A file has the form of `measured.json`, in whole or in part, or is the output of a benchmark: `stages`, `scoring`
    or `store`. Raises `BadRequest`.
    """
    found: dict[str, Any] = json.loads(files("worker.plan").joinpath(PACKAGED).read_text(encoding="utf-8"))
    for name in measured:
        found = _merged(found, _in_our_form(_read(name), found, name))
        try:
            Figures.model_validate(found)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise BadRequest(f"{name}: {place}: {first['msg']}; see worker/plan/{PACKAGED} for the form") from error
    return Figures.model_validate(found)


def _read(name: str) -> dict[str, Any]:
    try:
        written = json.loads(Path(name).read_text(encoding="utf-8"))
    except OSError as error:
        raise BadRequest(f"{name} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise BadRequest(f"{name} is not JSON ({error}); give the output of a benchmark's --json") from error
    if not isinstance(written, dict):
        raise BadRequest(f"{name} is no JSON object; give the output of a benchmark's --json")
    return written


def _in_our_form(written: dict[str, Any], before: dict[str, Any], name: str) -> dict[str, Any]:
    try:
        if any(isinstance(one, dict) and "stages" in one for one in written.values()):
            return _from_stages(written)
        if "tweets_per_second" in written and "details" in written:
            return _from_scoring(written, before)
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise BadRequest(f"{name} is not the complete output of a benchmark ({error!r}); run it again") from error
    return written


def _from_stages(written: dict[str, Any]) -> dict[str, Any]:
    """From `python -m tests.benchmarks.stages --json`: core-milliseconds of the stages, of one or both databases."""
    found: dict[str, Any] = {}
    for kind, one in written.items():
        stages = {stage: ms for stage, ms in one["stages"].items() if stage != "batch, padded"}
        locked = sum(ms * (1 - one["unlocked"][stage]) for stage, ms in stages.items())
        found[kind] = {
            "scorer_core_ms": sum(stages.values()), "locked_core_ms": locked, "store_core_ms": stages["store"],
        }  # fmt: skip
        if one["database"]:
            found[kind]["server_core_ms"] = [one["database"], one["database"]]
        if one["writer"]:
            found[kind]["writer_ms"] = one["writer"]
    found["stream"] = {"core_ms": max(one["broker"] for one in written.values())}
    return found


def _from_scoring(written: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """From `python -m tests.benchmarks.scoring --json`: windows take as much less time as the whole was faster."""
    models = {}
    for name in ("base", "starter"):
        old = ModelFigures.model_validate(before["models"][name])
        speed, hours = written["tweets_per_second"].get(name), written.get(f"core_hours_a_million_{name}")
        slower = old.tweets_per_second / speed if speed else 1.0
        dearer = 3.6 * hours / old.core_ms_per_tweet if hours else 1.0
        models[name] = {
            "windows": [
                {
                    "tweets": window.tweets, "period_ms": slower * window.period_ms,
                    "alone_ms": slower * window.alone_ms, "core_ms": dearer * window.core_ms,
                }
                for window in old.windows
            ]
        }  # fmt: skip
    return {"models": models}


def _merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """`new` over `old`, objects inside too; lists are replaced whole."""
    both = {**old, **new}
    for key in old.keys() & new.keys():
        if isinstance(old[key], dict) and isinstance(new[key], dict):
            both[key] = _merged(old[key], new[key])
    return both
