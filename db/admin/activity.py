"""Queries of what the workers do now, read every few seconds. The caller owns the transaction."""

from datetime import datetime
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, Integer, cast, func, select
from sqlalchemy.orm import InstrumentedAttribute, Session

from db.models import Label, ModelAlias, ModelVersion, Prediction, ScoringWindow, TrainingJob
from db.registry import ALIASES, assignment


class Windows(NamedTuple):
    """Windows that began since a time: their number, tweets, and milliseconds in each stage."""

    windows: int
    tweets: int
    read_ms: float
    tokenise_ms: float
    forward_ms: float
    store_ms: float


def windows(session: Session, since: datetime) -> Windows:
    columns = (
        ScoringWindow.tweets, ScoringWindow.read_ms, ScoringWindow.tokenise_ms, ScoringWindow.forward_ms,
        ScoringWindow.store_ms,
    )  # fmt: skip
    sums = (func.coalesce(func.sum(column), 0) for column in columns)
    row = session.execute(select(func.count(), *sums).where(ScoringWindow.started_at >= since)).one()
    return Windows(int(row[0]), int(row[1]), *map(float, row[2:]))


def tweets_by_period(session: Session, since: datetime, seconds: int) -> dict[int, int]:
    """Tweets of the windows that began since a time, by the Unix time of their beginning divided by `seconds`."""
    period = _period(session, ScoringWindow.started_at, seconds)
    query = select(period, func.sum(ScoringWindow.tweets)).where(ScoringWindow.started_at >= since).group_by(period)
    return {int(number): int(count) for number, count in session.execute(query)}


def labels_by_period(session: Session, since: datetime, seconds: int) -> dict[int, int]:
    """Labels that people gave since a time, by Unix time divided by `seconds`."""
    period = _period(session, Label.at, seconds)
    query = select(period, func.count()).where(Label.at >= since, Label.source != "model").group_by(period)
    return {int(number): int(count) for number, count in session.execute(query)}


def open_jobs(session: Session, limit: int) -> list[TrainingJob]:
    """Running and queued jobs, those that run first."""
    query = select(TrainingJob).where(TrainingJob.state.in_(("running", "queued")))
    return list(session.scalars(query.order_by(TrainingJob.state.desc(), TrainingJob.id).limit(limit)))


def aliases(session: Session) -> dict[str, tuple[ModelAlias, ModelVersion]]:
    """The newest assignment of each alias that has one, with its version."""
    found = {alias: assignment(session, alias) for alias in ALIASES}
    return {
        alias: (assigned, session.get_one(ModelVersion, assigned.model_version_id))
        for alias, assigned in found.items()
        if assigned is not None
    }


def predictions_since(session: Session, model_version_id: int, since: datetime) -> int:
    query = select(func.count()).where(Prediction.model_version_id == model_version_id, Prediction.scored_at >= since)
    return session.scalar(query) or 0


def _period(session: Session, column: InstrumentedAttribute[datetime], seconds: int) -> ColumnElement[Any]:
    if session.get_bind().dialect.name == "sqlite":
        return cast(func.strftime("%s", column), Integer) / seconds
    return func.floor(func.extract("epoch", column) / seconds)
