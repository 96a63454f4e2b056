"""Requests to train that come as Celery messages: message -> row -> outcome, from a thread of a training worker.

A message waits in its queue until its request is a row (`worker.inbox`), so that a database that is away costs time and
no request. While a job of this worker runs, Celery's result backend is told how far it is. When a job has ended,
whoever worked it, its message is given to Celery once more: the task then returns the outcome, and Celery stores it and
runs what is chained behind it. That is done again until it is noted in the row, so a crash repeats and loses nothing.
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
from worker import results
from worker.gate import Gate
from worker.inbox import CANCEL, Inbox, Request, is_message, read_request
from worker.intake import accept_request
from worker.settings import Settings

log = logging.getLogger(__name__)

# An outcome that was given to Celery and not noted as told is told again after this.
ANSWER_SECONDS = 60.0
LONGEST_PAUSE_SECONDS = 5.0
# What may go well when it is tried again.
PASSING = (SQLAlchemyError, TweetscoreError, KombuError, RedisError, OSError)
# Cancelled by `AsyncResult.revoke()` before their message came; most ids on a shared broker are other programs'.
REVOKED_IDS, REVOKED_SECONDS = 10_000, 3 * 3600


class Requests:
    """`owner` is whose jobs are reported, `wake` is called when there may be a job to run."""

    def __init__(
        self, settings: Settings, database: Database, gate: Gate, inbox: Inbox, app: Celery, owner: str,
        wake: Callable[[], None], stopping: threading.Event,
    ) -> None:  # fmt: skip
        self._settings = settings
        self._database = database
        self._gate = gate
        self._inbox = inbox
        self._app = app
        self._owner = owner
        self._wake = wake
        self._stopping = stopping
        self._revoked = LimitedSet(maxlen=REVOKED_IDS, expires=REVOKED_SECONDS)
        self._to_cancel: set[str] = set()
        self._told: dict[int, tuple[str, Any]] = {}
        self._thread = threading.Thread(target=self._run, name="requests", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def revoke(self, ids: Iterable[str]) -> None:
        """Cancel the jobs of these requests soon, and those whose message is still to come. From any thread."""
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
            except PASSING as error:
                said = getattr(error, "orig", None) or error
                log.warning("requests to train wait, trying again in %.1f s: %s", pause, said)
                self._stopping.wait(pause)
                pause = min(LONGEST_PAUSE_SECONDS, 2 * pause)
            except Exception:
                log.exception("requests to train wait, trying again in %.0f s", LONGEST_PAUSE_SECONDS)
                self._stopping.wait(LONGEST_PAUSE_SECONDS)

    def _step(self) -> None:
        for raw in self._inbox.take(self._settings.watch_seconds):
            self._accept(raw)
        self._cancel_revoked()
        self._report()
        self._answer()

    def _accept(self, raw: bytes) -> None:
        failpoint.passing("taken")
        if not is_message(raw):
            log.warning("something in the queue is no message of Celery's and was thrown away, %d bytes", len(raw))
            self._inbox.drop(raw)
            return
        request = read_request(raw)
        if request is not None:
            try:
                self._keep(request)
            except Exception as error:
                if _may_pass(error):
                    raise
                # It would fail for ever, and hold up what is behind it; its sender is told that it failed.
                log.warning("a request to train cannot be kept: %s", type(error).__name__)
        failpoint.passing("accepted")
        self._inbox.forward(raw)
        if request is not None and request.asks_to_train:
            self._wake()

    def _keep(self, request: Request) -> None:
        """Make rows of what a message asks for, before Celery sees it."""
        if request.task == CANCEL:
            cancel(self._database, request.arguments.get("job_id"), request.arguments.get("request_id"))
        if not request.asks_to_train:
            return
        ended = None
        if request.id in self._revoked:
            ended = "cancelled", results.REVOKED
        elif request.expired:
            ended = "cancelled", f"the request expired at {request.expires_at}, before a worker took it"
        job = accept_request(self._settings, self._database, request, ended)
        if job.state == "failed":
            # Why, its row says: the reason quotes what was sent.
            log.warning("job %d was refused; `tweetscore jobs show %d` says why", job.id, job.id)
        if job.finished_at and job.message is None:  # sent again after all was told: `_report` tells the backend again
            self._told[job.id] = "", None

    def _cancel_revoked(self) -> None:
        for id_ in list(self._to_cancel):
            with self._database.read() as session:
                found = jobs.of_request(session, id_)
            if found is not None and found.finished_at is None:
                with self._database.begin() as session:
                    jobs.request_cancel(session, found.id)
                log.info("job %d: asked to stop", found.id)
            self._to_cancel.discard(id_)

    def _report(self) -> None:
        """Tell the backend how far this worker's jobs are, and what became of those it last told about."""
        told: list[tuple[TrainingJob, tuple[str, Any] | None]] = []
        with self._database.read() as session:
            running = {job.id: job for job in jobs.held_by(session, self._owner)}
            for job in running.values():
                if (found := results.state_of(session, job)) != self._told.get(job.id):
                    told.append((job, found))
            for id_ in set(self._told) - set(running):
                job = jobs.get(session, id_)
                # One that a message asked for is answered below, with what is linked to it.
                if job.finished_at is None or job.message is None:
                    told.append((job, results.state_of(session, job)))
        for job, found in told:
            results.publish(self._app, job, found)
            if found is not None and job.state == "running":
                self._told[job.id] = found
            else:
                self._told.pop(job.id, None)

    def _answer(self) -> None:
        """Give Celery the messages of jobs that have ended."""
        with self._database.read() as session:
            if not jobs.any_unanswered(session):
                return
        with self._database.begin() as session:
            due = jobs.claim_answers(session, ANSWER_SECONDS)
        for message in filter(None, (job.message for job in due)):
            self._inbox.send(message)


def _may_pass(error: Exception) -> bool:
    return isinstance(error, PASSING) and not isinstance(error, DataError)


def cancel(database: Database, job_id: Any, request_id: Any) -> TrainingJob | None:
    """Cancel a job by its id or that of its request; of a request that is still to come, note that it is cancelled.

    None for a job that is not there.
    """
    with database.begin() as session:
        if request_id is not None:
            job = jobs.submit(
                session, request_id=str(request_id), dataset="", dataset_sha256=None, config={},
                ended=("cancelled", results.REVOKED),
            )  # fmt: skip
            return job if job.finished_at else jobs.request_cancel(session, job.id)
        there = isinstance(job_id, int) and session.get(TrainingJob, job_id) is not None
        return jobs.request_cancel(session, job_id) if there else None
