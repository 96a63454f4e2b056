"""The `tweetscore` command. Commands parse their arguments, call other modules and print the result.

Exit codes: 0 done; 1 done in part, or the job failed; 2 refused, with one sentence on standard error. In this package a
command imports what it needs when it runs, so that `--help` loads little more than Typer.
"""

import os
import signal
import sys
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from db.errors import NotFound, TweetscoreError, public_url
from worker.cli import data, db, dead_letters, jobs, models, output, quality, top, tweets, webhook
from worker.cli.labelling import labels, review
from worker.cli.output import Json
from worker.cli.planning import plan
from worker.cli.training import adapt, distil, train, tune
from worker.cli.training.submitted import owned_broker
from worker.errors import ServerFailed

if TYPE_CHECKING:
    from worker.process.supervisor import Supervisor
    from worker.settings import Settings

# The groups of `tweetscore --help`, and the order of the commands in them.
PANELS = {
    "Run": ("demo", "up", "worker"),
    "Train": ("train", "tune", "adapt", "distil", "jobs", "models", "data", "label", "review", "tensorboard"),
    "Score": ("push", "score", "rescore", "replay", "dead"),
    "Ask": ("query", "quality", "export", "console"),
    "Operate": ("plan", "top", "doctor", "health", "webhook", "db", "delete"),
}


class Panels(TyperGroup):
    """Lists the commands as `PANELS` does."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        for panel, names in PANELS.items():
            for name in names:
                vars(self.commands[name])["rich_help_panel"] = panel

    def list_commands(self, context: Any) -> list[str]:
        return [name for names in PANELS.values() for name in names]


app = typer.Typer(
    cls=Panels,
    no_args_is_help=True,
    add_completion=False,
    help="Fine-tune a Japanese BERT, score tweets as they arrive, query the results in SQL.",
)
app.add_typer(jobs.app, name="jobs")
app.add_typer(models.app, name="models")
app.add_typer(dead_letters.app, name="dead")
app.add_typer(db.app, name="db")
app.add_typer(data.app, name="data")
app.add_typer(labels.app, name="label")
app.add_typer(review.app, name="review")
app.add_typer(webhook.app, name="webhook")
TRAINING_COMMANDS = (train.train, adapt.adapt, distil.distil, tune.tune)
TWEET_COMMANDS = (tweets.push, tweets.score, tweets.rescore, db.replay, data.export, data.delete, quality.quality)
for command in (*TRAINING_COMMANDS, *TWEET_COMMANDS, plan.plan, top.top):
    app.command(command.__name__)(command)

ROLES = ("train", "score")


def _print_version(wanted: bool) -> None:
    if wanted:
        import importlib.metadata

        output.console.print(f"tweetscore {importlib.metadata.version('tweetscore')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def main() -> None:
    try:
        app(standalone_mode=True)
    except TweetscoreError as error:
        output.errors.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        sys.exit(2)


@app.command()
def demo() -> None:
    """Train on sample tweets, score others and query the results, in about a minute."""
    from worker.cli.demo import run_demo
    from worker.settings import load_settings

    run_demo(load_settings())


@app.command()
def up(
    scorers: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=64,
            help="Number of scoring workers, which share the GPUs. Default: TWEETSCORE_SCORERS, or 1.",
        ),
    ] = None,
) -> None:
    """Run the server, a training worker and scoring workers, until Ctrl-C.

    With REDIS_URL, that server is used and only the workers are started.
    """
    from worker.connections import model_store, open_sql
    from worker.process.supervisor import supervise
    from worker.settings import load_settings

    settings = load_settings()
    if scorers is not None:
        settings = settings.model_copy(update={"scorers": scorers})
    open_sql(settings).close()
    signals: list[int] = []  # not an Event: a signal handler that interrupts its wait cannot set it
    started: list[Supervisor] = []
    roles = ["train", *["score"] * (settings.scorers or 1)]

    def stop(number: int, _: object) -> None:
        signals.append(number)
        if len(signals) > 1:  # the second signal; the server still stops in order
            for children in started:
                children.kill()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    with (
        owned_broker(settings, output.line, lambda: bool(signals)) as url,
        supervise(settings, [] if signals else roles, output.line) as running,
    ):
        started.append(running)
        output.console.print(f"stream    {url}\ndatabase  {_database_name(settings)}")
        output.console.print(f"models    {model_store(settings)}\nlogs      {settings.logs}\nPress Ctrl-C to stop.")
        while not signals:
            running.watch()
            time.sleep(0.5)
        output.console.print(
            "stopping: workers finish their window or checkpoint their job; press Ctrl-C again to kill them"
        )


@app.command()
def worker(role: Annotated[str, typer.Argument(help="Role of the worker: train or score.")]) -> None:
    """Run one Celery worker in this process."""
    from worker.process.supervisor import keep_compiled_code, limit_spin_waiting
    from worker.settings import load_settings
    from worker.stream import embedded_valkey

    if role not in ROLES:
        raise typer.BadParameter(f"{role!r} is not a role; use train or score")
    settings = load_settings()
    # A server that loads or is being restarted counts as running: the worker waits for it.
    home = settings.home
    if settings.embedded and embedded_valkey.failure_reason(home) is None and embedded_valkey.find(home) is None:
        raise ServerFailed(f"no server runs on {home}; start `tweetscore up`, or set REDIS_URL")
    keep_compiled_code(settings.engines / "compiled")
    limit_spin_waiting()  # both must come before the next line, which loads torch
    from worker.app import SCORING, TRAINING
    from worker.app import app as celery

    queues = TRAINING if role == "train" else SCORING
    # Without a terminal the log consists of JSON lines, so Celery must not print its banner.
    quiet = [] if sys.stdout.isatty() else ["--quiet"]
    # Two threads: one runs the pipeline, the other receives nudges meanwhile. CUDA cannot be used after a fork.
    arguments = f"worker -Q {queues} --pool threads -c 2 -n {role}-%h-{os.getpid()} --without-mingle --without-gossip"
    celery.worker_main([*quiet, *arguments.split()])


@app.command()
def tensorboard(
    job: Annotated[int | None, typer.Option(help="Show only this job's run.")] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 6006,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
) -> None:
    """Show training runs in TensorBoard, until Ctrl-C."""
    from worker.connections import prepare_home
    from worker.settings import load_settings

    settings = load_settings()
    prepare_home(settings)
    boards = settings.boards
    boards.mkdir(parents=True, exist_ok=True)  # TensorBoard also shows runs that are written later
    folder = boards if job is None else boards / f"job-{job}"
    if not folder.is_dir():
        raise NotFound(f"there is no run in {folder}; a job writes its run on the machine of its worker")
    # Replaces this process, so that TensorBoard receives Ctrl-C and other signals.
    os.execv(  # noqa: S606 - the arguments are not user input to a shell
        sys.executable,
        [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder), "--host", host, "--port", str(port)],
    )


@app.command()
def console(
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 8001,
    host: Annotated[
        str, typer.Option(help="Address to listen on; other than the loopback only with a sign-in or a proxy.")
    ] = "127.0.0.1",
    behind_proxy: Annotated[
        str | None, typer.Option(help="Address of a proxy of your own that checks the visitors: https://example.org.")
    ] = None,
) -> None:
    """Open the console in a browser: charts, tweets, labelling, models, jobs, SQL and health, until Ctrl-C.

    Needs the packages of `pip install 'tweetscore[console]'`.
    """
    from worker.connections import open_sql
    from worker.console.serve import serve
    from worker.settings import load_settings

    settings = load_settings()
    open_sql(settings).close()
    serve(settings, host, port, behind_proxy, lambda url: output.line(f"{url}\nPress Ctrl-C to stop."))


@app.command()
def query(
    sql: Annotated[str, typer.Argument(help="One SELECT statement.")],
    format: Annotated[str, typer.Option(help="Output format: table, csv or json.")] = "table",  # noqa: A002 - the option's name
    json: Json = False,
) -> None:
    """Run one SQL query, read-only."""
    import csv

    from db.querying.readonly import run_query
    from worker.connections import open_for_queries
    from worker.settings import load_settings

    settings = load_settings()
    open_for_queries(settings).close()
    with run_query(settings.query_url, sql) as (columns, rows):
        if json or format == "json":
            output.as_json([dict(zip(columns, row, strict=True)) for row in rows])
        elif format == "csv":
            writer = csv.writer(sys.stdout, lineterminator="\n")
            writer.writerow(columns)
            writer.writerows(rows)
        elif format == "table":
            output.table(None, columns, rows)
        else:
            raise typer.BadParameter(f"{format!r} is not a format; use table, csv or json")


@app.command()
def health(
    of: Annotated[str, typer.Argument(help="scoring or training (a worker on this host), broker or db.")],
    json: Json = False,
) -> None:
    """Check one part, for orchestrators: exit code 0 if it is healthy, else 1."""
    from worker.process.health import KINDS, check_health
    from worker.settings import load_settings

    if of not in KINDS:
        raise typer.BadParameter(f"{of!r} cannot be checked; use one of {', '.join(KINDS)}")
    try:
        ok, finding = True, check_health(load_settings(), of)
    except TweetscoreError as error:
        ok, finding = False, str(error)
    if json:
        output.as_json({"of": of, "ok": ok, "finding": finding})
    else:
        (output.console if ok else output.errors).print(finding, markup=False, soft_wrap=True)
    if not ok:
        raise typer.Exit(1)


@app.command()
def doctor(json: Json = False) -> None:
    """Check everything that tweetscore needs. A failed check names the remedy."""
    from worker.cli.doctor import examine
    from worker.settings import load_settings

    checks = examine(load_settings())
    if json:
        output.as_json([{"name": c.name, "ok": c.ok, "finding": c.finding} for c in checks])
    else:
        output.table(None, ["", "check", "finding"], [("ok" if c.ok else "FAIL", c.name, c.finding) for c in checks])
    if not all(check.ok for check in checks):
        raise typer.Exit(1)


def _database_name(settings: "Settings") -> str:
    return public_url(settings.database_url) if settings.database_url else str(settings.home / "tweetscore.db")


if __name__ == "__main__":
    main()
