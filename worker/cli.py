"""The `tweetscore` command. Each command parses, calls, and shows; what it does lies elsewhere.

Exit codes: 0 done; 1 done in part, or the job failed; 2 refused, with one sentence on standard error. Heavy packages
are imported where they are needed, so that a look at the jobs does not wait for torch.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Annotated, Any

import typer

from db import jobs, registry
from db.errors import TweetscoreError
from db.models import TrainingJob
from worker import embedded, show
from worker.errors import ServerFailed
from worker.processes import workers
from worker.runtime import broker, open_sql
from worker.settings import Settings, load_settings

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Fine-tune a Japanese BERT, score tweets as they arrive, ask in SQL.",
)
jobs_app = typer.Typer(no_args_is_help=True, help="Training jobs.")
models_app = typer.Typer(no_args_is_help=True, help="Trained models.")
app.add_typer(jobs_app, name="jobs")
app.add_typer(models_app, name="models")

Json = Annotated[bool, typer.Option("--json", help="One JSON document instead of tables.")]
ROLES = ("train", "score")


def main() -> None:
    try:
        app(standalone_mode=True)
    except TweetscoreError as error:
        show.errors.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        sys.exit(2)


@app.command()
def demo() -> None:
    """Train on the sample tweets, score others, query: the whole route in about a minute."""
    from worker.demo import run_demo

    run_demo(load_settings())


@app.command()
def up() -> None:
    """Run the server (unless REDIS_URL names one), a training and a scoring worker, until Ctrl-C."""
    settings = load_settings()
    open_sql(settings).close()
    stopping = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopping.set())
    with _own_broker(settings) as url, workers(settings, ROLES, show.console.print) as running:
        show.console.print(f"stream    {url}", f"database  {_place(settings)}", f"models    {settings.store}", sep="\n")
        show.console.print(f"logs      {settings.logs}\nCtrl-C ends it.")
        while not stopping.wait(1):
            running.watch()
        show.console.print("ending: workers finish their window or checkpoint their job")


@app.command()
def worker(role: Annotated[str, typer.Argument(help="`train` or `score`.")]) -> None:
    """Run one worker in this process: real Celery, threads, its own queue."""
    if role not in ROLES:
        raise typer.BadParameter(f"{role!r} is no role; use train or score")
    settings = load_settings()
    if settings.embedded and embedded.find(settings.home) is None:
        raise ServerFailed(f"no server runs on {settings.home}; start `tweetscore up`, or set REDIS_URL")
    from worker.app import SCORING, TRAINING
    from worker.app import app as celery

    # A plain Celery client that names no queue sends to `celery`; without a reader there its job would wait forever.
    queues = f"{TRAINING},celery" if role == "train" else SCORING
    # Two threads: one for the route, one that takes nudges while it runs. Threads, since CUDA does not survive a fork.
    arguments = f"worker -Q {queues} --pool threads -c 2 -n {role}-%h-{os.getpid()} --without-mingle --without-gossip"
    celery.worker_main(arguments.split())


@app.command()
def train(
    dataset: Annotated[str, typer.Argument(help="CSV, TSV or JSONL with a label and a text in each row.")],
    preset: Annotated[str | None, typer.Option(help="guide or fast.")] = None,
    base_model: Annotated[str | None, typer.Option(help="Hub name, local folder, or starter.")] = None,
    base_revision: Annotated[str | None, typer.Option(help="Commit of the hub repository.")] = None,
    task: Annotated[str | None, typer.Option(help="single_label or multi_label (labels joined by |).")] = None,
    labels: Annotated[str | None, typer.Option(help="Labels allowed: `a,b` or `0=negative,1=positive`.")] = None,
    polarity: Annotated[str | None, typer.Option(help="Which label is good: `good=1,bad=-1`.")] = None,
    head: Annotated[str | None, typer.Option(help="guide or linear.")] = None,
    pooling: Annotated[str | None, typer.Option(help="pooler, mean or cls.")] = None,
    loss: Annotated[str | None, typer.Option(help="bce or cross_entropy.")] = None,
    epochs: Annotated[int | None, typer.Option()] = None,
    learning_rate: Annotated[float | None, typer.Option()] = None,
    train_batch_size: Annotated[int | None, typer.Option()] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens a tweet is cut to.")] = None,
    seed: Annotated[int | None, typer.Option()] = None,
    setting: Annotated[list[str] | None, typer.Option("--set", help="Any other field: `--set dropout=0.1`.")] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Show the job until it ends.")] = False,
    json: Json = False,
) -> None:
    """Queue a fine-tuning job. With --wait, and no worker running on this machine's server, run one for it."""
    from worker.app import TRAINING, make_app
    from worker.doors import nudge
    from worker.intake import submit_training
    from worker.options import label_map, numbers, pairs

    settings = load_settings()
    options: dict[str, Any] = {
        "base_model": base_model, "base_revision": base_revision, "task": task, "head": head, "pooling": pooling,
        "loss": loss, "epochs": epochs, "learning_rate": learning_rate, "train_batch_size": train_batch_size,
        "max_length": max_length, "seed": seed, "labels": label_map(labels), "polarity": numbers("polarity", polarity),
    }  # fmt: skip
    options = {name: value for name, value in options.items() if value is not None} | pairs("--set", setting or [])
    database = open_sql(settings)
    job = submit_training(settings, database, dataset, preset, **options)
    alone = settings.embedded and embedded.find(settings.home) is None
    if not wait:
        heard = not alone and nudge(make_app(settings), TRAINING)
        if json:
            show.as_json(show.fields(job))
        else:
            show.console.print(f"job {job.id} queued" + ("" if heard else "; it waits for a worker: `tweetscore up`"))
        return
    if alone:
        with _own_broker(settings), workers(settings, ["train"], show.errors.print) as running:
            job = _follow(database, job.id, json, running.watch)
    else:
        nudge(make_app(settings), TRAINING)
        job = _follow(database, job.id, json, lambda: None)
    _report_job(database, job, json)


@app.command()
def push(
    file: Annotated[str, typer.Argument(help="JSONL, CSV or TSV with an id and a text in each row; - is stdin.")],
    json: Json = False,
) -> None:
    """Publish tweets to the stream. Lines that are no tweets are counted and named; the others go through."""
    from worker.push import push_file

    settings = load_settings()
    with broker(settings) as url:
        pushed = push_file(settings, url, file, quiet=json)
    if json:
        show.as_json({"published": pushed.published, "bad": pushed.bad, "seconds": pushed.seconds})
    else:
        rate = pushed.published / max(pushed.seconds, 1e-9)
        show.console.print(f"published {pushed.published} tweets in {pushed.seconds:.1f} s ({rate:,.0f} a second)")
    for fault in pushed.bad:
        show.errors.print(fault, style="red", markup=False, soft_wrap=True)
    if pushed.bad_count:
        show.errors.print(f"{pushed.bad_count} lines are no tweets and were left out", style="red")
        raise typer.Exit(1)


@app.command()
def score(
    file: Annotated[str, typer.Argument(help="JSONL, CSV or TSV with a text in each row; - is stdin.")],
    model: Annotated[int | None, typer.Option(help="Model version; the champion if unnamed.")] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """Score tweets here and now: no queue, nothing stored."""
    from worker.push import score_file

    settings = load_settings()
    if score_file(settings, open_sql(settings), file, model, json):
        raise typer.Exit(1)


@app.command()
def query(
    sql: Annotated[str, typer.Argument(help="One SELECT.")],
    format: Annotated[str, typer.Option(help="table, csv or json.")] = "table",  # noqa: A002 - the option's name
    json: Json = False,
) -> None:
    """Ask the database. Nothing can be written this way."""
    import csv

    from db.readonly import ask

    settings = load_settings()
    open_sql(settings).close()
    with ask(settings.sql_url, sql) as (columns, rows):
        if json or format == "json":
            show.as_json([dict(zip(columns, row, strict=True)) for row in rows])
        elif format == "csv":
            writer = csv.writer(sys.stdout, lineterminator="\n")
            writer.writerow(columns)
            writer.writerows(rows)
        elif format == "table":
            show.table(None, columns, rows)
        else:
            raise typer.BadParameter(f"{format!r} is no format; use table, csv or json")


@app.command()
def doctor(json: Json = False) -> None:
    """Look at everything tweetscore needs: each line is ok, or says how to mend it."""
    from worker.doctor import examine

    checks = examine(load_settings())
    if json:
        show.as_json([{"name": c.name, "ok": c.ok, "says": c.says} for c in checks])
    else:
        show.table(None, ["", "what", "finding"], [("ok" if c.ok else "MEND", c.name, c.says) for c in checks])
    if not all(check.ok for check in checks):
        raise typer.Exit(1)


@jobs_app.command("list")
def jobs_list(limit: Annotated[int, typer.Option(min=1)] = 20, json: Json = False) -> None:
    """The newest jobs."""
    with open_sql(load_settings()).read() as session:
        found = jobs.recent(session, limit)
    if json:
        show.as_json([show.fields(job) for job in found])
    else:
        show.table(
            None,
            ["job", "state", "step", "of", "submitted", "error"],
            [(j.id, j.state, j.step, j.total_steps, j.submitted_at, j.error) for j in found],
        )


@jobs_app.command("show")
def jobs_show(job_id: int, follow: Annotated[bool, typer.Option("--follow")] = False, json: Json = False) -> None:
    """One job: its data, epochs and test figures."""
    database = open_sql(load_settings())
    if follow:
        job = _follow(database, job_id, json, lambda: None)
    else:
        with database.read() as session:
            job = jobs.get(session, job_id)
    _report_job(database, job, json)


@jobs_app.command("cancel")
def jobs_cancel(job_id: int, json: Json = False) -> None:
    """Stop a job: at once when it waits, within a few steps when it runs."""
    with open_sql(load_settings()).begin() as session:
        job = jobs.request_cancel(session, job_id)
    if json:
        show.as_json(show.fields(job))
    else:
        show.console.print(f"job {job.id} is {job.state}" + (", asked to stop" if job.state == "running" else ""))


@models_app.command("list")
def models_list(json: Json = False) -> None:
    """Every trained model with its test figures, newest first."""
    with open_sql(load_settings()).read() as session:
        rows = [(v, registry.metrics(session, v.id)) for v in registry.versions(session)]
        aliases = {alias: registry.assigned(session, alias) for alias in registry.ALIASES}
    named = {v.id: [alias for alias, version in aliases.items() if version == v.id] for v, _ in rows}
    if json:
        show.as_json([{**show.fields(v), "aliases": named[v.id], "f1_macro": m.get(("f1_macro", ""))} for v, m in rows])
        return
    show.table(
        None,
        ["model", "alias", "job", "base model", "labels", "accuracy", "F1 macro", "created"],
        [
            (v.id, ", ".join(named[v.id]), v.job_id, v.base_model, ", ".join(v.labels), m.get(("accuracy", "")),
             m.get(("f1_macro", "")), v.created_at)
            for v, m in rows
        ],
    )  # fmt: skip


@models_app.command("show")
def models_show(model: int, json: Json = False) -> None:
    """One model: where it lies, which engine scores with it and why, and its test figures."""
    from training.paths import folder_of
    from worker.choices import kept_choices

    with open_sql(load_settings()).read() as session:
        version, figures = registry.get(session, model), registry.metrics(session, model)
        cells = registry.confusion(session, model)
    engines = kept_choices(folder_of(version.artifact_url))
    if json:
        metrics = [{"metric": m, "label": label, "value": v} for (m, label), v in sorted(figures.items())]
        confusion = [{"actual": a, "predicted": p, "count": n} for (a, p), n in sorted(cells.items())]
        written = {"metrics": metrics, "confusion": confusion, "engines": [asdict(choice) for choice in engines]}
        show.as_json({**show.fields(version), **written})
        return
    show.console.print(
        f"model {version.id} of job {version.job_id}: {version.base_model} {version.base_revision or ''}"
    )
    show.console.print(f"{version.artifact_url}\nsha256 {version.sha256}", soft_wrap=True)
    for choice in engines:
        show.engine_table(choice)
    show.test_table(version, figures)
    if cells:
        show.table(
            "Confusion on the test rows",
            ["actual \\ predicted", *version.labels],
            [(actual, *(cells[actual, predicted] for predicted in version.labels)) for actual in version.labels],
        )


@models_app.command("promote")
def models_promote(
    model: int,
    alias: Annotated[str, typer.Option(help="champion or challenger.")] = registry.CHAMPION,
    json: Json = False,
) -> None:
    """Let a model score the stream from the next window on."""
    with open_sql(load_settings()).begin() as session:
        registry.assign(session, alias, model)
    if json:
        show.as_json({"alias": alias, "model_version_id": model})
    else:
        show.console.print(f"model {model} is the {alias} now")


@contextmanager
def _own_broker(settings: Settings) -> Iterator[str]:
    if settings.redis_url:
        yield settings.redis_url.rpartition("@")[2]  # no password on the screen
        return
    with embedded.owned(settings.home) as server:
        yield server.url


def _place(settings: Settings) -> str:
    return (settings.database_url or str(settings.home / "tweetscore.db")).rpartition("@")[2]


def _follow(database: Any, job_id: int, json: bool, watch: Any) -> TrainingJob:
    """With --json the bar goes to standard error's silence: only the document is printed."""
    if json:
        show.console.quiet = True
    try:
        return show.follow(database, job_id, watch)
    finally:
        show.console.quiet = False


def _report_job(database: Any, job: TrainingJob, json: bool) -> None:
    with database.read() as session:
        version = registry.of_job(session, job.id)
        done = jobs.epochs(session, job.id)
        figures = registry.metrics(session, version.id) if version else {}
    if json:
        metrics = [{"metric": m, "label": label, "value": v} for (m, label), v in sorted(figures.items())]
        show.as_json(
            {
                **show.fields(job),
                "epochs": [show.fields(epoch) for epoch in done],
                "model_version_id": version.id if version else None,
                "metrics": metrics,
            }
        )
    else:
        show.job_summary(database, job)
        if version:
            show.console.print(f"next: tweetscore models promote {version.id}")
    if job.state in ("failed", "cancelled"):
        raise typer.Exit(1)


if __name__ == "__main__":
    main()
