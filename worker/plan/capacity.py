"""How many scorers, cores and GPUs a rate needs, and what each part of the system allows at most."""

from dataclasses import dataclass, replace
from math import ceil

from worker.errors import BadRequest
from worker.plan.figures import Figures, ModelFigures, StoreFigures, WindowCost
from worker.plan.windows import Scorer
from worker.scoring.overlap import WINDOWS_IN_FLIGHT
from worker.scoring.window import USUAL_WINDOW_TWEETS

# The most tweets in a window: what a CPU is given, and the default of TWEETSCORE_WINDOW_TWEETS, which a GPU may take.
CPU_MOST_TWEETS, GPU_MOST_TWEETS = 4096, 16_384


@dataclass(frozen=True)
class Hardware:
    """What scores: GPUs of a kind, or machines with so many cores each. `scorers` are given, or to be found."""

    model: str
    cores: int | None = None
    gpu: str | None = None
    tweets_per_second_per_gpu: float | None = None
    scorers: int | None = None

    @property
    def on_gpu(self) -> bool:
        return self.gpu is not None or self.tweets_per_second_per_gpu is not None


@dataclass(frozen=True)
class Fleet:
    """The scorers of a plan, on so many GPUs, or each on a machine. `source` says where their speed comes from."""

    scorer: Scorer
    scorers: int
    devices: int
    device: str
    tweets_per_second: float
    source: str


@dataclass(frozen=True)
class Wall:
    """The most tweets per second that a part allows; None when there is no figure for it."""

    part: str
    tweets_per_second: float | None
    note: str = ""


def model_figures(figures: Figures, name: str) -> ModelFigures:
    if name not in figures.models:
        raise BadRequest(f"there are no figures of a model {name!r}; use one of {', '.join(figures.models)}")
    return figures.models[name]


def fleet(figures: Figures, store: StoreFigures, hardware: Hardware, peak_rate: float, utilisation: float) -> Fleet:
    """The scorers that keep the busiest hour below `utilisation`, unless their number is given."""
    if hardware.on_gpu:
        return _gpus(figures, store, hardware, peak_rate, utilisation)
    model = model_figures(figures, hardware.model)
    cores = hardware.cores or model.cores
    faster = cores / model.cores
    windows = [
        WindowCost(
            tweets=cost.tweets, period_ms=cost.period_ms / faster, alone_ms=cost.alone_ms / faster, core_ms=cost.core_ms
        )
        for cost in model.windows
    ]
    # However many cores: a scorer is one Python process.
    windows = [_not_faster_than_python(cost, store) for cost in windows]
    scorer = Scorer(windows, CPU_MOST_TWEETS)
    count = hardware.scorers or max(1, ceil(peak_rate / (utilisation * scorer.tweets_per_second)))
    source = f"measured on {model.machine}"
    if cores != model.cores:
        source += f"; {cores} cores are assumed to be {faster:g} times as fast as {model.cores}"
    return Fleet(scorer, count, count, f"machines with {cores} cores", count * scorer.tweets_per_second, source)


def _not_faster_than_python(cost: WindowCost, store: StoreFigures) -> WindowCost:
    least = store.locked_core_ms * cost.tweets / 1000
    return cost.model_copy(update={"period_ms": max(cost.period_ms, least)})


def _gpus(figures: Figures, store: StoreFigures, hardware: Hardware, peak_rate: float, utilisation: float) -> Fleet:
    known = figures.gpus.get((hardware.gpu or "").upper())
    speed, source = hardware.tweets_per_second_per_gpu, "the given speed of a GPU"
    window_ms = known.assumed_window_ms if known else 5.0
    if speed is None:
        if known is None:
            names = ", ".join(figures.gpus)
            raise BadRequest(
                f"no figure of a GPU {hardware.gpu!r} ({names} is known); give --tweets-per-second-per-gpu"
            )
        gflop = model_figures(figures, hardware.model).gflop_per_tweet
        if gflop is None:
            raise BadRequest(f"the work of {hardware.model} is not known; give --tweets-per-second-per-gpu")
        speed = 1000 * known.tflops * known.share / gflop
        source = (
            f"by arithmetic: {gflop:g} GFLOP a tweet of 18 tokens, and the share of its fastest matrix product that an "
            f"H200 reached, {known.share:.0%} of {known.tflops:g} TFLOP/s"
        )
    one = 1e6 / store.locked_core_ms
    gpus = max(1, ceil(peak_rate / (utilisation * speed)))
    count = hardware.scorers or gpus * max(1, ceil(min(speed, peak_rate / gpus) / (utilisation * one)))
    ms_per_tweet = max(1000 * count / gpus / speed, store.locked_core_ms / 1000)
    windows = []
    for size in (1, USUAL_WINDOW_TWEETS, GPU_MOST_TWEETS):
        ms, core_ms = window_ms + size * ms_per_tweet, size * store.scorer_core_ms / 1000
        windows.append(WindowCost(tweets=size, period_ms=ms, alone_ms=ms, core_ms=core_ms))
    return Fleet(
        Scorer(windows, GPU_MOST_TWEETS, WINDOWS_IN_FLIGHT), count, gpus, "GPUs", min(gpus * speed, count * one), source
    )


def bounded(found: Fleet, tweets_per_second: float) -> Fleet:
    """The same scorers, which together are no faster than another part of the system lets them be."""
    if tweets_per_second >= found.tweets_per_second:
        return found
    ms_per_tweet = 1000 * found.scorers / tweets_per_second
    windows = [
        cost.model_copy(update={"period_ms": max(cost.period_ms, cost.tweets * ms_per_tweet)})
        for cost in found.scorer.windows
    ]
    return replace(found, scorer=replace(found.scorer, windows=windows), tweets_per_second=tweets_per_second)


def walls(figures: Figures, kind: str, found: Fleet, database_cores: int, bytes_per_tweet: float | None) -> list[Wall]:
    """What each part allows at most, the least first; parts without a figure are last.

    `bytes_per_tweet` are those written to the disk of the database.
    """
    store: StoreFigures = getattr(figures, kind)
    parts = [
        Wall(f"scoring device, {found.scorers} scorers", found.tweets_per_second, "more scorers raise it"),
        Wall("Valkey, one thread", 1e6 / figures.stream.core_ms, "publishing included"),
    ]
    if store.writer_ms is not None:
        parts.append(Wall("SQLite, one writer", 1e6 / store.writer_ms, "one machine; PostgreSQL has many writers"))
    if store.server_core_ms is not None:
        best, worst = (1e6 * database_cores / ms for ms in store.server_core_ms)
        note = f"{database_cores} cores for it; up to {best:,.0f}"
        parts.append(Wall("PostgreSQL server", worst, note))
    if figures.disk_mb_per_second is None or bytes_per_tweet is None:
        parts.append(Wall("disk of the database", None, "no figure; give --disk-mb-per-second"))
    else:
        allowed = 1e6 * figures.disk_mb_per_second / bytes_per_tweet
        parts.append(Wall("disk of the database", allowed, f"{figures.disk_mb_per_second:g} MB/s"))
    return sorted(parts, key=lambda wall: float("inf") if wall.tweets_per_second is None else wall.tweets_per_second)
