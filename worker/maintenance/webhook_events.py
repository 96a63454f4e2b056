"""Find what happened and tell the webhook: jobs ended, champions changed, drift, dead letters.

One worker at a time looks at the tables every few seconds, so the routes of tweets and jobs do nothing for it. What it
finds goes to the table `webhook_events`, once per `event_key`, and is delivered from there until the receiver accepts
it: at least once.
"""

import logging
import threading
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from sqlalchemy.orm import Session

from db.admin import webhook_events
from db.admin.webhook_events import Event
from db.models import WebhookEvent, utc_now
from db.session import Database
from worker.maintenance.maintenance_thread import maintenance_lock
from worker.maintenance.retention import Begin
from worker.maintenance.webhook import NotDelivered, Receiver, send

log = logging.getLogger(__name__)

LOOK_SECONDS = 5.0
# A look begins this long before the last one: a transaction may commit a time that lies before its commit.
OVERLAP = timedelta(hours=1)
# How often the time of the last look is written.
NOTE_LOOK = timedelta(minutes=10)
# After this long without a look the webhook counts as switched on anew: what happened meanwhile is not told.
OFF_AFTER = timedelta(days=1)
KEEP = timedelta(days=30)
HOUR_SECONDS = 3600.0
# Pauses after a failed delivery double from the first to the longest.
FIRST_PAUSE = timedelta(seconds=5)
LONGEST_PAUSE = timedelta(days=1)
EVENTS_A_LOOK = 50
MUCH_DRIFT = 0.25
# Chance alone makes the stability index of fewer tweets large.
DRIFT_TWEETS = 200


class WebhookWatch:
    """Looks for events and delivers them, as long as this worker holds the lock of the webhook."""

    def __init__(
        self, database: Database, folder: Path, receiver: Receiver, stopping: threading.Event,
        allowed: Callable[[], bool] = lambda: True,
    ) -> None:  # fmt: skip
        """`folder` holds the lock of workers that share a SQLite file. While `allowed()` is false nothing is done: the
        schema may be another one."""
        self._database = database
        self._folder = folder
        self._receiver = receiver
        self._stopping = stopping
        self._allowed = allowed
        self._hourly_at = -float("inf")
        self._failing = False

    def run(self) -> bool:
        """A maintenance task: returns False while another worker looks, and else looks until the worker stops."""
        with maintenance_lock(self._database, self._folder, "webhook") as begin:
            if begin is None:
                return False
            # PostgreSQL reads on the connection that holds the lock. On SQLite a reader does not block the writers.
            read = self._database.read if self._database.engine.dialect.name == "sqlite" else begin
            while self._allowed() and not self._stopping.is_set():
                self.look(begin, read)
                self._stopping.wait(LOOK_SECONDS)
        return self._stopping.is_set()

    def look(self, begin: Begin, read: Begin) -> None:
        """Store new events and deliver those that are due. `begin` opens transactions that write, `read` that read."""
        now, hourly = utc_now(), time.monotonic() - self._hourly_at >= HOUR_SECONDS
        with read() as session:
            watch = webhook_events.watch_row(session)
            on = watch is not None and now - watch.next_attempt_at <= OFF_AFTER
            found = find_events(session, watch, now, hourly) if watch is not None and on else []
        if watch is None or not on:
            with begin() as session:
                webhook_events.start_watching(session, now)
        elif found or hourly or now - watch.next_attempt_at > NOTE_LOOK:
            with begin() as session:
                webhook_events.add(session, found)
                webhook_events.note_look(session, now)
                if hourly:
                    self._forget(session, now)
        if hourly:
            self._hourly_at = time.monotonic()
        self._deliver(begin, read)

    def _forget(self, session: Session, now: datetime) -> None:
        lost = webhook_events.delete_created_before(session, now - KEEP)
        if lost:
            log.warning("%d events of the webhook are deleted after %d days without a delivery", lost, KEEP.days)

    def _deliver(self, begin: Begin, read: Begin) -> None:
        """Send the events that are due. After one that found no receiver, the others wait for the next look."""
        with read() as session:
            waiting = [(e.id, e.attempts, e.payload) for e in webhook_events.due(session, utc_now(), EVENTS_A_LOOK)]
        for id_, attempts, payload in waiting:
            if self._stopping.is_set():
                return
            try:
                send(self._receiver, envelope(id_, payload))
            except NotDelivered as error:
                with begin() as session:
                    webhook_events.note_failed(session, id_, str(error), utc_now() + pause_after(attempts + 1))
                if not self._failing:
                    log.warning("event %d of the webhook was not accepted, trying again later: %s", id_, error)
                self._failing = True
                if not error.reached:
                    return
            else:
                with begin() as session:
                    webhook_events.note_delivered(session, id_, utc_now())
                self._failing = False


def find_events(session: Session, watch: WebhookEvent, now: datetime, hourly: bool) -> list[Event]:
    """What has happened and is not in the outbox yet. Drift is looked up only `hourly`: a day that is over hardly
    changes."""
    switched_on, since = watch.created_at, max(watch.created_at, watch.next_attempt_at - OVERLAP)
    found = webhook_events.ended_jobs(session, since) + webhook_events.champion_changes(session, since)
    # An event that was deleted after `KEEP` does not show any more which dead letters it counted.
    buried = webhook_events.dead_letters(session, max(switched_on, now - KEEP), now)
    found += [buried] if buried else []
    midnight = now.replace(hour=0, minute=0, second=0, microsecond=0)
    if hourly and midnight >= switched_on:
        yesterday = (midnight - timedelta(days=1)).date()
        found += webhook_events.drift(session, yesterday, MUCH_DRIFT, DRIFT_TWEETS)
    return webhook_events.missing(session, found)


def pause_after(attempts: int) -> timedelta:
    """The pause after so many failed deliveries of an event."""
    doublings = min(attempts - 1, 20)  # more exceed the longest pause, and in the end the range of a timedelta
    return min(LONGEST_PAUSE, FIRST_PAUSE * (1 << doublings))


def envelope(event_id: int, payload: dict[str, Any]) -> dict[str, Any]:
    """The JSON object that is sent: `id`, `kind` and `at` first. PostgreSQL does not keep the order of keys."""
    ordered = {"id": event_id, "kind": payload["kind"], "at": payload["at"]}
    return ordered | {name: value for name, value in sorted(payload.items()) if name not in ordered}
