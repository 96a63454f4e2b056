"""`tweetscore jobs`: list, show, retry and cancel training jobs."""

from datetime import timedelta
from typing import TYPE_CHECKING, Annotated, Any

import typer

from worker.cli import output
from worker.cli.output import Json
from worker.cli.training import job_output

if TYPE_CHECKING:
    from db.models import TrainingJob

app = typer.Typer(no_args_is_help=True, help="List, show, retry and cancel training jobs.")

JobId = Annotated[int, typer.Argument(help="Number of the job.")]


@app.command("list")
def jobs_list(
    limit: Annotated[int, typer.Option(min=1, help="Number of rows to print.")] = 20, json: Json = False
) -> None:
    """List the newest jobs."""
    from db import jobs
    from worker.connections import open_sql
    from worker.settings import load_settings

    with open_sql(load_settings()).read() as session:
        found = jobs.recent(session, limit)
    if json:
        output.as_json([output.fields(job) for job in found])
    else:
        output.table(
            None,
            ["job", "kind", "state", "step", "of", "submitted", "error"],
            [(j.id, j.kind, j.state, j.step, j.total_steps, j.submitted_at, j.error) for j in found],
        )


@app.command("show")
def jobs_show(
    job_id: JobId,
    follow: Annotated[bool, typer.Option("--follow", help="Show its progress until it ends.")] = False,
    json: Json = False,
) -> None:
    """Show one job: its data, epochs and metrics."""
    from db import jobs
    from worker.connections import open_sql
    from worker.settings import load_settings

    database = open_sql(load_settings())
    if follow:
        job = follow_job(database, job_id, json, lambda: None)
    else:
        with database.read() as session:
            job = jobs.get(session, job_id)
    report_job(database, job, json)


@app.command("retry")
def jobs_retry(job_id: JobId, json: Json = False) -> None:
    """Queue a failed job again; it resumes from its newest checkpoint, if there is one."""
    from db import jobs
    from db.models import utc_now
    from worker.connections import open_sql
    from worker.settings import load_settings

    settings = load_settings()
    with open_sql(settings).begin() as session:
        failed_at = jobs.get(session, job_id).finished_at
        job = jobs.retry(session, job_id)
    days = settings.checkpoint_days
    from_scratch = failed_at is not None and failed_at < utc_now() - timedelta(days=days)
    if json:
        output.as_json({**output.fields(job), "from_scratch": from_scratch})
    else:
        restart = f"; it failed more than {days:g} days ago, so it has no checkpoints and starts from the beginning"
        output.console.print(f"job {job.id} is queued again{restart if from_scratch else ''}", soft_wrap=True)


@app.command("cancel")
def jobs_cancel(job_id: JobId, json: Json = False) -> None:
    """Cancel a job: at once if it is queued, within a few steps if it runs."""
    from db import jobs
    from worker.connections import open_sql
    from worker.settings import load_settings

    with open_sql(load_settings()).begin() as session:
        job = jobs.request_cancel(session, job_id)
    if json:
        output.as_json(output.fields(job))
    else:
        output.console.print(f"job {job.id} is {job.state}" + (", stopping" if job.state == "running" else ""))


def follow_job(database: Any, job_id: int, json: bool, watch: Any) -> "TrainingJob":
    """Show a job until it ends. With `json` print no progress: standard output holds only the document."""
    if json:
        output.console.quiet = True
    try:
        return job_output.follow(database, job_id, watch)
    finally:
        output.console.quiet = False


def report_job(database: Any, job: "TrainingJob", json: bool) -> None:
    from db import jobs, registry

    with database.read() as session:
        version = registry.of_job(session, job.id)
        done = jobs.epochs(session, job.id)
        figures = registry.metrics(session, version.id) if version else {}
        base = registry.base_model_of_job(session, job.id)
    if json:
        output.as_json(
            {
                **output.fields(job),
                "epochs": [output.fields(epoch) for epoch in done],
                "model_version_id": version.id if version else None,
                "metrics": output.metric_rows(figures),
                "base_model": output.fields(base) if base else None,
            }
        )
    else:
        job_output.job_summary(database, job)
        if version:
            output.console.print(f"next: tweetscore models promote {version.id}")
        if base:
            output.console.print(f"next: tweetscore train FILE --base-model adapted:{base.id}")
    if job.state in ("failed", "cancelled"):
        raise typer.Exit(1)
