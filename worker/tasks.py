"""The Celery tasks: nudges of a few lines, and the outcome of a job. The data is in the stream and in SQL."""

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
from celery.worker.control import ok as flagged
from celery.worker.control import revoke as revoke_others
from sqlalchemy.exc import SQLAlchemyError

from db import jobs
from db.errors import NotFound, TweetscoreError
from training import failpoint
from worker import logs, metrics_endpoint, requests, results
from worker.app import SCORING, TRAINING, app
from worker.errors import JobFailed
from worker.inbox import Inbox
from worker.lane import Lane, ScoringLane, TrainingLane
from worker.pulse import end_at_signal
from worker.redis_client import connect
from worker.runtime import stream_url
from worker.settings import load_settings

log = logging.getLogger(__name__)

lanes: dict[str, Lane] = {}


@app.task(name="worker.tasks.score")
def score() -> int:
    """There may be tweets in the stream. Returns how many were scored."""
    return lanes[SCORING].run() if SCORING in lanes else 0


class Outcome(Task):  # type: ignore[misc]
    """Returns the outcome of a job. When Celery has stored it and started what follows, the row notes that."""

    def on_success(self, retval: Any, task_id: str, args: Any, kwargs: Any) -> None:
        self._note(task_id)

    def on_failure(self, exc: Exception, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
        if isinstance(exc, JobFailed):
            self._note(task_id)

    def _note(self, task_id: str) -> None:
        if TRAINING in lanes:
            with lanes[TRAINING].database.begin() as session:
                jobs.answered(session, task_id)


@app.task(name="worker.tasks.train", base=Outcome, bind=True, ignore_result=False, throws=(JobFailed,))
def train(self: Task, dataset: str | None = None, preset: str | None = None, **options: Any) -> Any:
    """Without `dataset`, there may be a job to run: a nudge. With it, what became of the job that was asked for.

    A client that only knows Celery sends `kwargs={"dataset": path, ...}` to the queue `training`. The message's id is
    the job's `request_id`: the same message twice is one job. `worker.requests` has made it a row before it comes here,
    and sends it here again when the job has ended.

    Returns {"job_id", "model_version_id", "metrics"}; raises `JobFailed` with the job's sentence.
    """
    lane = lanes.get(TRAINING)
    if lane is None:
        raise Ignore
    if dataset is None:
        return lane.run()
    return _outcome(self, lane)


def _outcome(task: Task, lane: Lane) -> dict[str, Any]:
    """Raises `Ignore`, which tells nobody anything, while the job goes on and once its outcome was told."""
    id_ = task.request.id
    try:
        with lane.database.read() as session:
            job = jobs.of_request(session, id_)
            if job is None:
                raise JobFailed("the request could not be stored as a job; look at its arguments, then send it again")
            found = results.state_of(session, job) if job.finished_at and job.message is not None else None
    except SQLAlchemyError as error:
        raise Ignore from error  # it is sent again
    if found is None:
        raise Ignore
    _, result = found
    if job.state == "failed":
        raise result
    if job.state == "cancelled":
        task.backend.mark_as_revoked(id_, str(result), request=task.request, store_result=True)
        task.send_event("task-revoked", terminated=False, signum=None, expired=False)
        with lane.database.begin() as session:
            jobs.answered(session, id_)
        raise Ignore
    return dict(result)


@app.task(name="worker.tasks.cancel", ignore_result=False, throws=(NotFound,))
def cancel(job_id: int | None = None, request_id: str | None = None) -> dict[str, Any]:
    """Stop a job: at once when it waits, within a few steps when it runs. Returns its {"job_id", "state"}.

    `request_id` is the id of the message that asked for the job, which need not have come yet.
    """
    lane = lanes.get(TRAINING)
    if lane is None:
        raise Ignore
    job = requests.cancel(lane.database, job_id, request_id)
    if job is None:
        raise NotFound(f"there is no job {job_id}; name one as job_id, or its message as request_id")
    return {"job_id": job.id, "state": job.state}


@control_command(name="revoke", variadic="task_id", signature="[id1 [id2 [... [idN]]]]")
def revoke(state: Any, task_id: Any, terminate: bool = False, signal: Any = None, **options: Any) -> Any:
    """`AsyncResult.revoke()`: a training worker cancels the job that has this request's id."""
    lane = lanes.get(TRAINING)
    if not isinstance(lane, TrainingLane) or lane.requests is None:
        return revoke_others(state, task_id, terminate, signal, **options)
    ids = {str(id_) for id_ in (task_id if isinstance(task_id, list | tuple | set) else [task_id])}
    lane.requests.revoke(ids)
    return flagged(f"tasks {ids} flagged as revoked")


@task_revoked.connect(sender=train)
def _note_expired(request: Any, **_: Any) -> None:
    """A message that Celery itself found expired: its job was cancelled for that, and the backend says so."""
    train._note(request.id)


@celeryd_after_setup.connect
def _start(sender: str, instance: Any, **_: Any) -> None:
    """Before Celery speaks to the broker: a worker empties a full one, whether or not Celery can start."""
    queues = instance.app.amqp.queues
    try:
        _open_lanes(sender, set(queues.consume_from))
    except TweetscoreError as error:
        # Celery would log what a signal's handler raises, and run a worker that does nothing.
        log.critical("%s", error)
        raise SystemExit(2) from error
    queues.deselect(TRAINING)  # which `worker.inbox` reads
    _await_database()


def _await_database() -> None:
    """Take no message before there is a database to work with: others may have one, and a request waits on the broker.

    Celery listens for signals later. Told to end meanwhile, this worker ends: it holds nothing.
    """

    def end(*_: Any) -> NoReturn:
        raise SystemExit(0)

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)}
    try:
        for lane in lanes.values():
            lane.gate.opened.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _open_lanes(hostname: str, queues: set[str]) -> None:
    """A worker serves the queues it was told to consume."""
    settings = load_settings()
    failpoint.arm(settings.failpoints)
    failpoint.passing("starting")
    # A worker that found work nudges itself: on the shared queue a busy neighbour might take the nudge and drop it.
    own = worker_direct(hostname)
    if SCORING in queues:
        lanes[SCORING] = ScoringLane(settings, lambda: score.apply_async(queue=own, retry=False))
    if TRAINING in queues:
        inbox = Inbox(connect(stream_url(settings)), TRAINING, own.name, settings.default_queue)
        lanes[TRAINING] = TrainingLane(
            settings, lambda: train.apply_async(queue=own, retry=False, ignore_result=True), inbox
        )
    if settings.metrics_port is not None:
        metrics_endpoint.serve(
            settings.metrics_host, settings.metrics_port, [lane.collector for lane in lanes.values()]
        )
    for lane in lanes.values():
        lane.start()


@worker_ready.connect
def _answer_quit(**_: Any) -> None:
    """Celery's own answer to SIGQUIT waits for the work at hand without telling it to stop."""
    signal.signal(signal.SIGQUIT, end_at_signal)


@worker_shutting_down.connect
def _stop_lanes(sig: str, **_: Any) -> None:
    """The first signal to end, in the main thread: what is at hand is finished within the grace period.

    A second signal ends the process at once: it is listened for first, since a lane that stops takes leave of a server
    that may be silent. One that comes while Celery still answers the first makes it send this twice.
    """
    if signal.getsignal(signal.SIGTERM) is end_at_signal:
        end_at_signal(signal.Signals[sig], None)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT):
        signal.signal(number, end_at_signal)
    for lane in lanes.values():
        lane.stop()


@worker_shutdown.connect
def _end_lanes(**_: Any) -> None:
    """Celery waits for its tasks; a watcher that works without a nudge is none."""
    for lane in lanes.values():
        lane.end()


@setup_logging.connect
def _setup_logging(loglevel: int | str = "INFO", **_: Any) -> None:
    logs.set_up()
    # Celery logs every nudge it receives and ends; the routes log what was done.
    for name in ("celery.worker.strategy", "celery.app.trace"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # With a traceback every second while the broker's memory is full; what fails for good is an error.
    logging.getLogger("kombu.transport.redis").setLevel(logging.ERROR)
