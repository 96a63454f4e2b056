"""`tweetscore plan`: size an installation for a rate of tweets."""

from typing import TYPE_CHECKING, Annotated

import typer

from worker.cli import output
from worker.cli.output import Json
from worker.errors import BadRequest

if TYPE_CHECKING:
    from worker.plan.figures import Figures

ON_CPUS = "Score on CPUs, each scorer on a machine with so many cores."
# The record of a second, which `worker/plan/arrivals.py` explains; a test compares them.
RECORD_BURST = 143_199


def plan(
    tweets_per_second: Annotated[float, typer.Option(min=0.001, help="Mean rate of a day.")],
    cores: Annotated[int | None, typer.Option(min=1, max=1024, help=ON_CPUS)] = None,
    gpu: Annotated[str | None, typer.Option(help="Score on GPUs of this kind, such as H100.")] = None,
    tweets_per_second_per_gpu: Annotated[
        float | None, typer.Option(min=0.001, help="Measured speed of one GPU, in place of an estimate.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="base or starter. Default: base, or what --measure finds.")] = None,
    scorers: Annotated[int | None, typer.Option(min=1, help="Number of scorers. Default: as many as needed.")] = None,
    database: Annotated[
        str | None, typer.Option(help="sqlite or postgresql. Default: sqlite for one scorer, else postgresql.")
    ] = None,
    database_cores: Annotated[int, typer.Option(min=1, help="Cores of the PostgreSQL server.")] = 4,
    retention_days: Annotated[float | None, typer.Option(min=0.001, help="Days that tweets are kept.")] = None,
    outage_hours: Annotated[float, typer.Option(min=0, help="Hours in which nothing is scored.")] = 1.0,
    burst: Annotated[int, typer.Option(min=1, help="Tweets of a burst of one second.")] = RECORD_BURST,
    curve: Annotated[str | None, typer.Option(metavar="FILE", help="Rates of the hours of a day, as numbers.")] = None,
    disk_mb_per_second: Annotated[
        float | None, typer.Option(min=0.001, help="What the database's disk writes.")
    ] = None,
    measured: Annotated[
        list[str] | None, typer.Option(metavar="FILE", help="Figures of your machine; may be repeated.")
    ] = None,
    measure: Annotated[
        str | None, typer.Option(metavar="FILE", help="Measure the champion here first, and write the figures.")
    ] = None,
    json: Json = False,
) -> None:
    """Size an installation: scorers, cores, disk, memory, the first limit, and the latency at peaks.

    The output names the machine that the figures were measured on. Figures of GPUs are estimates.
    """
    from worker.cli.planning.plan_output import show
    from worker.plan.capacity import Hardware
    from worker.plan.plan import Request, as_fields, make_plan

    if cores is not None and (gpu is not None or tweets_per_second_per_gpu is not None):
        raise BadRequest("--cores is for scoring on CPUs and --gpu for GPUs; give one of them")
    figures = _figures(list(measured or []), measure, disk_mb_per_second)
    name = model or ("base" if measure is None else "champion")
    hardware = Hardware(name, cores, gpu, tweets_per_second_per_gpu, scorers)
    kept = (retention_days, outage_hours, burst)
    made = make_plan(figures, Request(tweets_per_second, hardware, curve, database, database_cores, *kept))
    output.as_json(as_fields(made)) if json else show(made)


def _figures(files: list[str], measure: str | None, disk_mb_per_second: float | None) -> "Figures":
    from worker.plan.figures import load_figures

    if measure is not None:
        _measure(measure)
        files.append(measure)
    figures = load_figures(files)
    return figures.model_copy(update={"disk_mb_per_second": disk_mb_per_second or figures.disk_mb_per_second})


def _measure(file: str) -> None:
    import json
    from pathlib import Path

    from worker.process.supervisor import limit_spin_waiting
    from worker.settings import load_settings

    limit_spin_waiting()  # as in a worker, before torch is loaded
    from worker.plan.measure import measure

    found = json.dumps(measure(load_settings(), output.aside), indent=2)
    try:
        Path(file).write_text(f"{found}\n", encoding="utf-8")
    except OSError as error:
        raise BadRequest(f"{file} cannot be written: {error.strerror}") from error
