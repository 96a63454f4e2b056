"""Queries of the model registry: versions, their test figures, and the aliases. The caller owns the transaction."""

from typing import Any

from sqlalchemy import insert, select
from sqlalchemy.orm import Session

from db.errors import NotFound
from db.models import ConfusionCell, ModelAlias, ModelVersion, TestMetric, TestPrediction

CHAMPION = "champion"
ALIASES = (CHAMPION, "challenger")


def add_version(
    session: Session,
    version: ModelVersion,
    metrics: list[dict[str, Any]],
    confusion: list[dict[str, Any]],
    test_predictions: list[dict[str, Any]],
) -> ModelVersion:
    """Add a model version with its test figures; the rows lack only `model_version_id`."""
    session.add(version)
    session.flush()
    tables = ((TestMetric, metrics), (ConfusionCell, confusion), (TestPrediction, test_predictions))
    for table, rows in tables:
        if rows:
            session.execute(insert(table), [{**row, "model_version_id": version.id} for row in rows])
    return version


def get(session: Session, version_id: int) -> ModelVersion:
    version = session.get(ModelVersion, version_id)
    if version is None:
        raise NotFound(f"there is no model {version_id}; `tweetscore models list` shows those there are")
    return version


def of_job(session: Session, job_id: int) -> ModelVersion | None:
    return session.scalar(select(ModelVersion).where(ModelVersion.job_id == job_id))


def revision_used(session: Session, base_model: str) -> str | None:
    """The hub's commit of the first model that was trained on `base_model`: later ones are trained on the same."""
    return session.scalar(
        select(ModelVersion.base_revision)
        .where(ModelVersion.base_model == base_model, ModelVersion.base_revision.is_not(None))
        .order_by(ModelVersion.id)
        .limit(1)
    )


def versions(session: Session) -> list[ModelVersion]:
    return list(session.scalars(select(ModelVersion).order_by(ModelVersion.id.desc())))


def assign(session: Session, alias: str, version_id: int) -> None:
    """Point an alias at a version. A row is added, none changed, so that the history stays."""
    if alias not in ALIASES:
        raise NotFound(f"there is no alias {alias!r}; use one of {', '.join(ALIASES)}")
    get(session, version_id)
    session.add(ModelAlias(alias=alias, model_version_id=version_id))
    session.flush()


def assignment(session: Session, alias: str) -> ModelAlias | None:
    """The newest assignment of an alias."""
    return session.scalar(select(ModelAlias).where(ModelAlias.alias == alias).order_by(ModelAlias.id.desc()).limit(1))


def assigned(session: Session, alias: str) -> int | None:
    """The model version id an alias points at now."""
    newest = assignment(session, alias)
    return newest.model_version_id if newest else None


def metrics(session: Session, version_id: int) -> dict[tuple[str, str], float]:
    """Every test figure of a version by (metric, label); the label is empty for the whole split."""
    rows = session.execute(
        select(TestMetric.metric, TestMetric.label, TestMetric.value).where(TestMetric.model_version_id == version_id)
    )
    return {(metric, label): value for metric, label, value in rows}


def confusion(session: Session, version_id: int) -> dict[tuple[str, str], int]:
    rows = session.execute(
        select(ConfusionCell.actual, ConfusionCell.predicted, ConfusionCell.count).where(
            ConfusionCell.model_version_id == version_id
        )
    )
    return {(actual, predicted): count for actual, predicted, count in rows}
