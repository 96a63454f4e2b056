"""Queries of the webhook's outbox and of what has happened since a time. The caller owns the transaction."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, datetime
from typing import Any

from sqlalchemy import delete, func, inspect, select, text, update
from sqlalchemy.orm import Session

from db.models import FINISHED_STATES, DeadLetter, ModelAlias, ModelVersion, TrainingJob, WebhookEvent
from db.registry import CHAMPION, metrics

# The row of this key is no event. It holds when the webhook was switched on (`created_at`), and when a worker last
# looked for events (`next_attempt_at`).
WATCH = "webhook.watch"
DRIFT_MEASURES = ("psi_labels", "psi_length", "psi_unknown")
DRIFT = text(
    "SELECT model_version_id, tweets, psi_labels, psi_length, psi_unknown FROM v_drift WHERE CAST(day AS TEXT) = :day"
)


@dataclass(frozen=True)
class Event:
    """Something that happened. `key` identifies it, so that it is sent once, however often it is found."""

    key: str
    kind: str
    at: datetime
    details: dict[str, Any]


# --- what has happened


def ended_jobs(session: Session, since: datetime) -> list[Event]:
    """The jobs that ended since a time, with the test figures of their models."""
    columns = (
        TrainingJob.id, TrainingJob.kind, TrainingJob.state, TrainingJob.started_at, TrainingJob.finished_at,
        TrainingJob.error, ModelVersion.id.label("model"), ModelVersion.base_model,
    )  # fmt: skip
    query = select(*columns).outerjoin(ModelVersion, ModelVersion.job_id == TrainingJob.id)
    ended = (TrainingJob.state.in_(FINISHED_STATES), TrainingJob.finished_at >= since)
    return [_ended(session, row) for row in session.execute(query.where(*ended).order_by(TrainingJob.finished_at))]


def _ended(session: Session, job: Any) -> Event:
    seconds = None if job.started_at is None else (job.finished_at - job.started_at).total_seconds()
    figures = {} if job.model is None else metrics(session, job.model)
    details = {
        "job": job.id,
        "job_kind": job.kind,
        "state": job.state,
        "seconds": seconds,
        "error": job.error,
        "model": job.model,
        "base_model": job.base_model,
        "figures": {metric: value for (metric, label), value in sorted(figures.items()) if not label},
    }
    # A job that is retried ends again.
    return Event(f"job.ended {job.id} {job.finished_at.isoformat()}", "job.ended", job.finished_at, details)


def champion_changes(session: Session, since: datetime) -> list[Event]:
    """The assignments since a time that made another model version the champion."""
    before = func.lag(ModelAlias.model_version_id).over(order_by=ModelAlias.id)
    history = (
        select(ModelAlias.id, ModelAlias.assigned_at, ModelAlias.model_version_id.label("to"), before.label("before"))
        .where(ModelAlias.alias == CHAMPION)
        .subquery()
    )
    changed = (history.c.assigned_at >= since, history.c.before.is_distinct_from(history.c.to))
    rows = session.execute(select(history).where(*changed).order_by(history.c.id))
    return [
        Event(f"champion.changed {row.id}", "champion.changed", row.assigned_at, {"from": row.before, "to": row.to})
        for row in rows
    ]


def dead_letters(session: Session, since: datetime, now: datetime) -> Event | None:
    """The dead letters that were buried after the last such event, or else since a time. Has one key an hour."""
    kind = "dead_letters.found"
    last = session.scalar(
        select(WebhookEvent.payload).where(WebhookEvent.kind == kind).order_by(WebhookEvent.id.desc()).limit(1)
    )
    after = max(since, datetime.fromisoformat(last["until"])) if last else since
    count, until = session.execute(
        select(func.count(), func.max(DeadLetter.buried_at)).where(DeadLetter.buried_at > after)
    ).one()
    if not count:
        return None
    return Event(f"{kind} {now:%Y-%m-%dT%H}", kind, until, {"count": count, "until": until.isoformat()})


def drift(session: Session, day: date, at_least: float, tweets: int) -> list[Event]:
    """The measures of `v_drift` above a limit on a day with so many tweets; one event per measure."""
    if not inspect(session.connection()).has_table("v_drift"):
        return []
    row = session.execute(DRIFT, {"day": day.isoformat()}).mappings().first()
    if row is None or row["tweets"] < tweets:
        return []
    return [
        Event(
            f"drift.found {day} {measure}",
            "drift.found",
            # The day is over.
            datetime.fromisoformat(f"{day}T23:59:59+00:00"),
            {
                "day": day.isoformat(),
                "measure": measure,
                "value": float(row[measure]),
                "model": row["model_version_id"],
                "tweets": row["tweets"],
            },
        )
        for measure in DRIFT_MEASURES
        if row[measure] is not None and row[measure] > at_least
    ]


# --- the outbox


def watch_row(session: Session) -> WebhookEvent | None:
    """The row that holds when the webhook was switched on and looked for last; None before the first look."""
    return session.scalar(select(WebhookEvent).where(WebhookEvent.event_key == WATCH))


def start_watching(session: Session, now: datetime) -> None:
    """Note that the webhook is switched on: what happened before is not sent."""
    session.execute(delete(WebhookEvent).where(WebhookEvent.event_key == WATCH))
    session.add(
        WebhookEvent(
            event_key=WATCH, kind=WATCH, payload={}, created_at=now, next_attempt_at=now, delivered_at=now, error=None
        )
    )


def missing(session: Session, events: Sequence[Event]) -> list[Event]:
    """The events that are not in the outbox yet."""
    keys = select(WebhookEvent.event_key).where(WebhookEvent.event_key.in_([event.key for event in events]))
    known = set(session.scalars(keys)) if events else set()
    return [event for event in events if event.key not in known]


def add(session: Session, events: Sequence[Event]) -> None:
    for event in events:
        payload = {"kind": event.kind, "at": event.at.isoformat(), **event.details}
        session.add(WebhookEvent(event_key=event.key, kind=event.kind, payload=payload))


def note_look(session: Session, now: datetime) -> None:
    session.execute(update(WebhookEvent).where(WebhookEvent.event_key == WATCH).values(next_attempt_at=now))


def note_delivered(session: Session, event_id: int, now: datetime) -> None:
    values = {"delivered_at": now, "attempts": WebhookEvent.attempts + 1, "error": None}
    session.execute(update(WebhookEvent).where(WebhookEvent.id == event_id).values(values))


def note_failed(session: Session, event_id: int, error: str, next_attempt_at: datetime) -> None:
    values = {"next_attempt_at": next_attempt_at, "attempts": WebhookEvent.attempts + 1, "error": error}
    session.execute(update(WebhookEvent).where(WebhookEvent.id == event_id).values(values))


def due(session: Session, now: datetime, limit: int) -> list[WebhookEvent]:
    """Events to deliver now, oldest first."""
    waiting = (WebhookEvent.delivered_at.is_(None), WebhookEvent.next_attempt_at <= now)
    return list(session.scalars(select(WebhookEvent).where(*waiting).order_by(WebhookEvent.id).limit(limit)))


def delete_created_before(session: Session, before: datetime) -> int:
    """Delete old events. Returns how many of them were not delivered."""
    old = (WebhookEvent.created_at < before, WebhookEvent.event_key != WATCH)
    undelivered = select(func.count()).select_from(WebhookEvent).where(*old, WebhookEvent.delivered_at.is_(None))
    count = session.scalar(undelivered) or 0
    session.execute(delete(WebhookEvent).where(*old))
    return count
