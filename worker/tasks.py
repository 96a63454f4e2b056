"""The Celery tasks: nudges, and the outcome of a job. Records are in the stream and jobs in SQL."""

import logging
import signal
from typing import Any, NoReturn

from celery import Task
from celery.exceptions import Ignore
from celery.signals import (
    celeryd_after_setup,
    setup_logging,
    task_revoked,
    worker_ready,
    worker_shutdown,
    worker_shutting_down,
)
from celery.utils.nodenames import worker_direct
from celery.worker.control import control_command
from celery.worker.control import ok as ok_reply
from celery.worker.control import revoke as celery_revoke
from sqlalchemy.exc import SQLAlchemyError

from db import jobs
from db.errors import NotFound, TweetscoreError
from training import failpoint
from worker.app import SCORING, TRAINING, app
from worker.connections import stream_url
from worker.errors import JobFailed
from worker.exit_codes import BAD_SETTINGS_EXIT
from worker.intake.request_queue import RequestQueue
from worker.process import logging_setup, metrics_endpoint, task_results, training_requests
from worker.process.watchdog import end_at_once, end_at_signal
from worker.process.worker_process import ScoringWorker, TrainingWorker, WorkerProcess
from worker.settings import load_settings
from worker.stream.redis_client import connect

log = logging.getLogger(__name__)

# What this process runs, by the name of the Celery queue it consumes.
workers: dict[str, WorkerProcess] = {}


@app.task(name="worker.tasks.score")
def score() -> int:
    """Score the tweets in the stream. Returns how many were scored."""
    return workers[SCORING].run() if SCORING in workers else 0


class JobOutcomeTask(Task):  # type: ignore[misc]
    """Marks the job's row as answered after Celery has stored the outcome and started callbacks and chained tasks."""

    def on_success(self, retval: Any, task_id: str, args: Any, kwargs: Any) -> None:
        self._mark_answered(task_id)

    def on_failure(self, exc: Exception, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
        if isinstance(exc, JobFailed):
            self._mark_answered(task_id)

    def _mark_answered(self, task_id: str) -> None:
        if TRAINING in workers:
            with workers[TRAINING].database.begin() as session:
                jobs.mark_answered(session, task_id)


@app.task(name="worker.tasks.train", base=JobOutcomeTask, bind=True, ignore_result=False, throws=(JobFailed,))
def train(self: Task, dataset: str | None = None, preset: str | None = None, **options: Any) -> Any:
    """Without `dataset`, a nudge: run the queued jobs. With `dataset`, return the outcome of the job it requested.

    A plain Celery client sends `kwargs={"dataset": path, ...}` to the queue `training`. The message's id is the job's
    `request_id`, so the same message twice creates one job. `worker.process.training_requests` creates the row before
    Celery receives the message, and sends the message again when the job has ended.

    Returns {"job_id", "model_version_id", "metrics"}; raises `JobFailed` with the job's error message.
    """
    worker = workers.get(TRAINING)
    if worker is None:
        raise Ignore
    if dataset is None:
        return worker.run()
    return _outcome(self, worker)


@app.task(name="worker.tasks.adapt", base=JobOutcomeTask, bind=True, ignore_result=False, throws=(JobFailed,))
def adapt(self: Task, *refused: Any, **options: Any) -> Any:
    """Return the outcome of the job that the message requested: to adapt a base model to stored tweets.

    A plain Celery client sends fields of `training.config.AdaptConfig` as `kwargs` to the queue `training`. As for
    `train`, the row exists before Celery receives the message; that of a message with `args` is a failed job.

    Returns {"job_id", "base_model", "metrics"}, with the name `adapted:ID` for later jobs; raises `JobFailed`.
    """
    worker = workers.get(TRAINING)
    if worker is None:
        raise Ignore
    return _outcome(self, worker)


def _outcome(task: Task, worker: WorkerProcess) -> dict[str, Any]:
    """Raises `Ignore`, which stores no result, while the job runs and after its outcome was stored."""
    id_ = task.request.id
    try:
        with worker.database.read() as session:
            job = jobs.of_request(session, id_)
            if job is None:
                raise JobFailed("the request could not be stored as a job; check its arguments and send it again")
            found = task_results.state_of(session, job) if job.finished_at and job.message is not None else None
    except SQLAlchemyError as error:
        raise Ignore from error  # `worker.process.training_requests` sends the message again
    if found is None:
        raise Ignore
    _, result = found
    if job.state == "failed":
        raise result
    if job.state == "cancelled":
        task.backend.mark_as_revoked(id_, str(result), request=task.request, store_result=True)
        task.send_event("task-revoked", terminated=False, signum=None, expired=False)
        with worker.database.begin() as session:
            jobs.mark_answered(session, id_)
        raise Ignore
    return dict(result)


@app.task(name="worker.tasks.cancel", ignore_result=False, throws=(NotFound,))
def cancel(job_id: int | None = None, request_id: str | None = None) -> dict[str, Any]:
    """Cancel a job: a queued one at once, a running one within a few steps. Returns {"job_id", "state"}.

    `request_id` is the id of the message that requests the job; that message may arrive later.
    """
    worker = workers.get(TRAINING)
    if worker is None:
        raise Ignore
    job = training_requests.cancel(worker.database, job_id, request_id)
    if job is None:
        raise NotFound(f"there is no job {job_id}; name one as job_id, or its message as request_id")
    return {"job_id": job.id, "state": job.state}


@control_command(name="revoke", variadic="task_id", signature="[id1 [id2 [... [idN]]]]")
def revoke(state: Any, task_id: Any, terminate: bool = False, signal: Any = None, **options: Any) -> Any:
    """Handle `AsyncResult.revoke()`: a training worker cancels the job with this request id."""
    worker = workers.get(TRAINING)
    if not isinstance(worker, TrainingWorker) or worker.requests is None:
        return celery_revoke(state, task_id, terminate, signal, **options)
    ids = {str(id_) for id_ in (task_id if isinstance(task_id, list | tuple | set) else [task_id])}
    worker.requests.revoke(ids)
    return ok_reply(f"tasks {ids} flagged as revoked")


@task_revoked.connect(sender=train)
@task_revoked.connect(sender=adapt)
def _mark_expired(request: Any, **_: Any) -> None:
    """Celery found the message expired and stored that result; the job was cancelled for the same reason."""
    train._mark_answered(request.id)


@celeryd_after_setup.connect
def _start(sender: str, instance: Any, **_: Any) -> None:
    """Start before Celery connects to the broker: a full broker may refuse Celery until this worker has freed
    memory."""
    queues = instance.app.amqp.queues
    try:
        _start_workers(sender, set(queues.consume_from))
    except TweetscoreError as error:
        # Celery logs an exception of a signal handler and runs on without a pipeline. It also drops the code of a
        # SystemExit raised here, so that the process would end with 0.
        end_at_once(BAD_SETTINGS_EXIT, str(error))
    queues.deselect(TRAINING)  # `worker.intake.request_queue` reads this queue
    _wait_for_database()


def _wait_for_database() -> None:
    """Consume no message before the database can be used: another worker may have one, and requests wait on the broker.

    Celery installs its signal handlers later, so handle signals here. The worker holds nothing and may exit at once.
    """

    def end(*_: Any) -> NoReturn:
        raise SystemExit(0)

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)}
    try:
        for worker in workers.values():
            worker.gate.opened.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _start_workers(hostname: str, queues: set[str]) -> None:
    """Start a worker for each queue that this Celery worker consumes."""
    settings = load_settings()
    failpoint.arm(settings.failpoints)
    failpoint.passing("starting")
    # The poller nudges its own worker: on the shared queue a busy worker could take the nudge and drop it.
    own_queue = worker_direct(hostname)
    if SCORING in queues:
        workers[SCORING] = ScoringWorker(settings, lambda: score.apply_async(queue=own_queue, retry=False))
    if TRAINING in queues:
        request_queue = RequestQueue(connect(stream_url(settings)), TRAINING, own_queue.name, settings.default_queue)
        workers[TRAINING] = TrainingWorker(
            settings, lambda: train.apply_async(queue=own_queue, retry=False, ignore_result=True), request_queue
        )
    if settings.metrics_port is not None:
        collectors = [worker.collector for worker in workers.values()]
        metrics_endpoint.serve(settings.metrics_host, settings.metrics_port, collectors)
    for worker in workers.values():
        worker.start()


@worker_ready.connect
def _handle_sigquit(**_: Any) -> None:
    """Celery's own handler of SIGQUIT waits for the current task without asking it to stop."""
    signal.signal(signal.SIGQUIT, end_at_signal)


@worker_shutting_down.connect
def _stop_workers(sig: str, **_: Any) -> None:
    """Handle the first signal, in the main thread: current work may finish within the grace period.

    A second signal ends the process at once. Its handlers are installed first, because `stop` calls servers that may
    not answer. When the second signal arrives while Celery still handles the first, Celery calls this function again.
    """
    if signal.getsignal(signal.SIGTERM) is end_at_signal:
        end_at_signal(signal.Signals[sig], None)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT):
        signal.signal(number, end_at_signal)
    for worker in workers.values():
        worker.stop()


@worker_shutdown.connect
def _wait_for_workers(**_: Any) -> None:
    """Celery does not wait for work that a poller started, so wait for it here."""
    for worker in workers.values():
        worker.stop_and_wait()


@setup_logging.connect
def _setup_logging(loglevel: int | str = "INFO", **_: Any) -> None:
    logging_setup.set_up()
    # Celery logs the start and end of every nudge; the pipelines log what was done.
    for name in ("celery.worker.strategy", "celery.app.trace"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # While the broker's memory is full kombu logs a traceback every second; permanent failures are logged as errors.
    logging.getLogger("kombu.transport.redis").setLevel(logging.ERROR)
