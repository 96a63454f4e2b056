"""The Celery tasks: nudges of a few lines. What they are about lies in the stream and in SQL."""

import logging
import signal
from typing import Any, NoReturn

from celery import Task
from celery.signals import celeryd_after_setup, setup_logging, worker_ready, worker_shutdown, worker_shutting_down
from celery.utils.nodenames import worker_direct

from db.errors import TweetscoreError
from training import failpoint
from worker import logs, metrics
from worker.app import SCORING, TRAINING, app
from worker.intake import record_refusal, submit_job
from worker.lane import Lane, ScoringLane, TrainingLane
from worker.pulse import end_at_signal
from worker.settings import load_settings

log = logging.getLogger(__name__)

lanes: dict[str, Lane] = {}


@app.task(name="worker.tasks.score")
def score() -> int:
    """There may be tweets in the stream. Returns how many were scored."""
    return lanes[SCORING].run() if SCORING in lanes else 0


@app.task(name="worker.tasks.train", bind=True)
def train(self: Task, dataset: str | None = None, preset: str | None = None, **options: Any) -> int:
    """There may be a job to run; with `dataset`, first submit one. Returns how many jobs were run.

    A client that only knows Celery sends `kwargs={"dataset": path, ...}`; the message's id is the job's `request_id`,
    so that the same message twice is one job.
    """
    lane = lanes.get(TRAINING)
    if lane is None:
        return 0
    if dataset is not None:
        lane.gate.wait(lane.stopping)
        try:
            submit_job(lane.settings, lane.database, dataset, preset, options, self.request.id)
        except TweetscoreError as error:
            job = record_refusal(lane.database, str(dataset), options, str(error), self.request.id)
            # Why, its row says: the reason quotes what was sent.
            log.warning("job %d was refused; `tweetscore jobs show %d` says why", job.id, job.id)
    return lane.run()


@celeryd_after_setup.connect
def _start(sender: str, instance: Any, **_: Any) -> None:
    """Before Celery speaks to the broker: a worker empties a full one, whether or not Celery can start."""
    try:
        _open_lanes(sender, set(instance.app.amqp.queues.consume_from))
    except TweetscoreError as error:
        # Celery would log what a signal's handler raises, and run a worker that does nothing.
        log.critical("%s", error)
        raise SystemExit(2) from error
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
        lanes[TRAINING] = TrainingLane(settings, lambda: train.apply_async(queue=own, retry=False))
    if settings.metrics_port is not None:
        metrics.serve(settings.metrics_host, settings.metrics_port, [lane.looks for lane in lanes.values()])
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
