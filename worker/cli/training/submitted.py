"""After a command has queued a job: nudge a worker, or run one and show the job until it ends."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from db.errors import public_url
from worker.cli import output
from worker.cli.jobs import follow_job, report_job
from worker.cli.training import job_output
from worker.intake.job_progress import nudge_worker

if TYPE_CHECKING:
    from db.models import TrainingJob
    from db.session import Database
    from worker.settings import Settings


def submitted(settings: "Settings", database: "Database", job: "TrainingJob", wait: bool, json: bool) -> None:
    """Report a queued job or, with `wait`, show it until it ends; a worker is started for it unless a server runs."""
    from worker.app import TRAINING, make_app, nudge
    from worker.process.supervisor import supervise
    from worker.stream import embedded_valkey

    if not wait:
        hint = nudge_worker(settings)
        output.as_json(output.fields(job)) if json else job_output.queued(job, hint)
        return
    no_server = settings.embedded and embedded_valkey.owner(settings.home) is None
    if no_server:
        with owned_broker(settings, output.aside), supervise(settings, ["train"], output.aside) as running:
            job = follow_job(database, job.id, json, running.watch)
    else:
        nudge(make_app(settings), TRAINING)
        job = follow_job(database, job.id, json, lambda: None)
    report_job(database, job, json)


@contextmanager
def owned_broker(
    settings: "Settings", notify: Callable[[str], None], give_up: Callable[[], bool] = lambda: False
) -> Iterator[str]:
    if settings.redis_url:
        yield public_url(settings.redis_url)
        return
    from worker.connections import prepare_home
    from worker.stream import embedded_valkey

    prepare_home(settings)
    with embedded_valkey.owned(
        settings.home, settings.server_memory_mb, settings.server_sync, notify, give_up
    ) as server:
        yield server.url
