"""Training requests that arrive as Celery messages: message -> row -> outcome, in a thread of a training worker.

A message stays in its queue until its request is a row (`worker.intake.request_queue`), so an outage of the database
loses no request. While a job of this worker runs, its progress is written to Celery's result backend. When a job has
ended, in any worker, its message is passed to Celery again: the task returns the outcome, and Celery stores it and
runs callbacks and chained tasks. This is repeated until the row is marked as answered, so a crash may repeat the
outcome but does not lose it.
"""

import logging
import threading
from collections.abc import Callable, Iterable
from typing import Any

from celery import Celery
from celery.utils.collections import LimitedSet
from kombu.exceptions import KombuError
from redis import RedisError
from sqlalchemy.exc import DataError, SQLAlchemyError

from db import jobs
from db.errors import TweetscoreError
from db.models import TrainingJob
from db.session import Database
from training import failpoint
from worker.intake.request_queue import CANCEL, Request, RequestQueue, is_message, read_request
from worker.intake.submit_job import accept_request
from worker.process import task_results
from worker.process.schema_gate import DatabaseGate
from worker.settings import Settings

log = logging.getLogger(__name__)

# A message that was passed to Celery again and not marked as answered is repeated after this.
RESEND_SECONDS = 60.0
LONGEST_PAUSE_SECONDS = 5.0
# Errors after which the same step may succeed later.
TRANSIENT_ERRORS = (SQLAlchemyError, TweetscoreError, KombuError, RedisError, OSError)
# How many revoked ids are remembered, and for how long. On a shared broker most belong to other programs.
REVOKED_IDS, REVOKED_SECONDS = 10_000, 3 * 3600


class RequestThread:
    """Stores requests as jobs and reports their progress and outcome.

    `owner` is the lease owner whose running jobs are reported. `wake` is called when there may be a job to run.
    """

    def __init__(
        self, settings: Settings, database: Database, gate: DatabaseGate, queue: RequestQueue, app: Celery, owner: str,
        wake: Callable[[], None], stopping: threading.Event,
    ) -> None:  # fmt: skip
        self._settings = settings
        self._database = database
        self._gate = gate
        self._queue = queue
        self._app = app
        self._owner = owner
        self._wake = wake
        self._stopping = stopping
        self._revoked = LimitedSet(maxlen=REVOKED_IDS, expires=REVOKED_SECONDS)
        self._to_cancel: set[str] = set()
        self._reported: dict[int, tuple[str, Any]] = {}
        self._thread = threading.Thread(target=self._run, name="requests", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def revoke(self, ids: Iterable[str]) -> None:
        """Cancel the jobs of these requests, also when their message arrives later. May be called from any thread."""
        for id_ in ids:
            self._revoked.add(id_)
            self._to_cancel.add(id_)

    def _run(self) -> None:
        pause = 0.1
        while not self._stopping.is_set():
            try:
                if self._gate.wait(self._stopping):
                    self._step()
                pause = 0.1
            except TRANSIENT_ERRORS as error:
                reason = getattr(error, "orig", None) or error
                log.warning("training requests wait, trying again in %.1f s: %s", pause, reason)
                self._stopping.wait(pause)
                pause = min(LONGEST_PAUSE_SECONDS, 2 * pause)
            except Exception:
                log.exception("training requests wait, trying again in %.0f s", LONGEST_PAUSE_SECONDS)
                self._stopping.wait(LONGEST_PAUSE_SECONDS)

    def _step(self) -> None:
        for raw in self._queue.take(self._settings.watch_seconds):
            self._accept(raw)
        self._cancel_revoked()
        self._report_progress()
        self._send_finished()

    def _accept(self, raw: bytes) -> None:
        failpoint.passing("taken")
        if not is_message(raw):
            log.warning("dropped %d bytes from the queue that are not a Celery message", len(raw))
            self._queue.drop(raw)
            return
        request = read_request(raw)
        if request is not None:
            try:
                self._save_job(request)
            except Exception as error:
                if _is_transient(error):
                    raise
                # A retry would fail too and block the requests behind it. The task reports the failure to the sender.
                log.warning("a training request cannot be stored: %s", type(error).__name__)
        failpoint.passing("accepted")
        self._queue.forward(raw)
        if request is not None and request.is_training_request:
            self._wake()

    def _save_job(self, request: Request) -> None:
        """Write the request to SQL before Celery receives the message."""
        if request.task == CANCEL:
            cancel(self._database, request.arguments.get("job_id"), request.arguments.get("request_id"))
        if not request.is_training_request:
            return
        ended = None
        if request.id in self._revoked:
            ended = "cancelled", task_results.REVOKED
        elif request.expired:
            ended = "cancelled", f"the request expired at {request.expires_at}, before a worker took it"
        job = accept_request(self._settings, self._database, request, ended)
        if job.state == "failed":
            # The reason is only in the row: it quotes what was sent.
            log.warning("job %d was refused; see `tweetscore jobs show %d`", job.id, job.id)
        if job.finished_at and job.message is None:  # a repeated request of an answered job: report its result again
            self._reported[job.id] = "", None

    def _cancel_revoked(self) -> None:
        for id_ in list(self._to_cancel):
            with self._database.read() as session:
                found = jobs.of_request(session, id_)
            if found is not None and found.finished_at is None:
                with self._database.begin() as session:
                    jobs.request_cancel(session, found.id)
                log.info("job %d: cancellation requested", found.id)
            self._to_cancel.discard(id_)

    def _report_progress(self) -> None:
        """Write the progress of this worker's jobs to the result backend, and the result of those that no longer
        run."""
        changed: list[tuple[TrainingJob, tuple[str, Any] | None]] = []
        with self._database.read() as session:
            running = {job.id: job for job in jobs.held_by(session, self._owner)}
            for job in running.values():
                if (found := task_results.state_of(session, job)) != self._reported.get(job.id):
                    changed.append((job, found))
            for id_ in set(self._reported) - set(running):
                job = jobs.get(session, id_)
                # The outcome of a job that has a message is reported by `_send_finished`, which also runs callbacks.
                if job.finished_at is None or job.message is None:
                    changed.append((job, task_results.state_of(session, job)))
        for job, found in changed:
            task_results.publish(self._app, job, found)
            if found is not None and job.state == "running":
                self._reported[job.id] = found
            else:
                self._reported.pop(job.id, None)

    def _send_finished(self) -> None:
        """Pass the messages of finished jobs to Celery again."""
        with self._database.read() as session:
            if not jobs.any_unanswered(session):
                return
        with self._database.begin() as session:
            due = jobs.claim_answers(session, RESEND_SECONDS)
        for message in filter(None, (job.message for job in due)):
            self._queue.send_again(message)


def _is_transient(error: Exception) -> bool:
    return isinstance(error, TRANSIENT_ERRORS) and not isinstance(error, DataError)


def cancel(database: Database, job_id: Any, request_id: Any) -> TrainingJob | None:
    """Cancel a job by its id or its request's id. A request that has not arrived yet is stored as cancelled.

    Returns None when there is no job with this id.
    """
    with database.begin() as session:
        if request_id is not None:
            job = jobs.submit(
                session, request_id=str(request_id), dataset="", dataset_sha256=None, config={},
                ended=("cancelled", task_results.REVOKED),
            )  # fmt: skip
            return job if job.finished_at else jobs.request_cancel(session, job.id)
        exists = isinstance(job_id, int) and session.get(TrainingJob, job_id) is not None
        return jobs.request_cancel(session, job_id) if exists else None
