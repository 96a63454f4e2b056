"""The memory of every process over time, and whether it grows."""

import os
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

MIB = 1024 * 1024
# Growth that counts as noise: this many standard deviations of the samples around the fitted line, or this share of
# the mean, or these MiB, whichever is most. The server takes a step of 1 or 2 MiB when more waits than ever before.
NOISE_DEVIATIONS, NOISE_SHARE, NOISE_MIB = 3.0, 0.02, 2.0
FEWEST_SAMPLES = 10


@dataclass(frozen=True)
class Trend:
    """A line through the memory of one process: `slope` and `error` (one standard error) in MiB an hour, `mean`,
    `deviation` (of the samples around the line) and `growth` (of the line, from its begin to its end) in MiB."""

    name: str
    minutes: float
    mean: float
    slope: float
    error: float
    deviation: float
    growth: float

    @property
    def noise(self) -> float:
        return max(NOISE_DEVIATIONS * self.deviation, NOISE_SHARE * self.mean, NOISE_MIB)

    @property
    def flat(self) -> bool:
        return self.growth <= self.noise


class Memory:
    """Samples proportional set sizes, in which processes share the pages that they have in common."""

    def __init__(self, up: int, producers: dict[int, str], postgresql: int | None) -> None:
        self._up, self.producers, self._postgresql = up, producers, postgresql
        # (name, process id) -> (seconds, bytes) of each sample
        self.series: dict[tuple[str, int], list[tuple[float, int]]] = defaultdict(list)

    def scorers(self) -> dict[int, int]:
        """The number of each scoring worker that runs, from the log it writes -> its process id."""
        found = {}
        for process in _children(self._up):
            name = _name(process)
            if name.startswith("scorer "):
                found[int(name.removeprefix("scorer "))] = process.pid
        return found

    def sample(self, seconds: float) -> dict[str, float]:
        """Take a sample; returns MiB by name."""
        found: dict[str, float] = {}
        for process in [psutil.Process(self._up), *_children(self._up)]:
            name = "up" if process.pid == self._up else _name(process)
            if name:
                found[name] = self._add(name, process.pid, seconds, [process])
        for pid, name in self.producers.items():
            found[name] = self._add(name, pid, seconds, [psutil.Process(pid)])
        if self._postgresql is not None:
            server = [psutil.Process(self._postgresql), *_children(self._postgresql)]
            found["PostgreSQL"] = self._add("PostgreSQL", self._postgresql, seconds, server)
        return found

    def _add(self, name: str, pid: int, seconds: float, processes: list[psutil.Process]) -> float:
        total = sum(_pss(process) for process in processes)
        if total:  # else it has just ended
            self.series[name, pid].append((seconds, total))
        return total / MIB

    def trends(self, warm_up: float) -> list[Trend]:
        """The longest life of each process, without its first `warm_up` seconds."""
        longest: dict[str, list[tuple[float, int]]] = {}
        for (name, _), samples in self.series.items():
            settled = [sample for sample in samples if sample[0] - samples[0][0] >= warm_up]
            if len(settled) >= FEWEST_SAMPLES and len(settled) > len(longest.get(name, [])):
                longest[name] = settled
        return [_trend(name, samples) for name, samples in sorted(longest.items())]


def _trend(name: str, samples: list[tuple[float, int]]) -> Trend:
    hours, mib = np.array([at / 3600 for at, _ in samples]), np.array([size / MIB for _, size in samples])
    (slope, start), covariance = np.polyfit(hours, mib, 1, cov=True)
    span = float(hours[-1] - hours[0])
    around = mib - (slope * hours + start)
    return Trend(
        name, 60 * span, float(mib.mean()), float(slope), float(covariance[0, 0] ** 0.5), float(around.std(ddof=2)),
        float(slope * span),
    )  # fmt: skip


def _children(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children()
    except psutil.NoSuchProcess:
        return []


def _name(process: psutil.Process) -> str:
    """What a child of `tweetscore up` is; empty for one that has ended or is none of ours."""
    try:
        command = process.cmdline()
        if command[-2:] == ["worker", "train"]:
            return "trainer"
        if command[-2:] == ["worker", "score"]:
            log = Path(os.readlink(f"/proc/{process.pid}/fd/1")).stem  # score, score-2, ...
            return f"scorer {log.partition('-')[2] or 1}"
        return "server" if command and "valkey" in command[0] else ""
    except (psutil.Error, OSError):
        return ""


def _pss(process: psutil.Process) -> int:
    try:
        return int(process.memory_full_info().pss)
    except psutil.Error:
        return 0
