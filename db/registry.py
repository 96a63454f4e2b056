"""Queries of the model registry: versions, their test figures, and the aliases. The caller owns the transaction."""

from typing import Any

from sqlalchemy import Subquery, and_, case, delete, func, insert, join, select
from sqlalchemy.orm import Session

from db.errors import InUse, NotFound
from db.models import ConfusionCell, ModelAlias, ModelVersion, Prediction, TestMetric, TestPrediction, utc_now

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


def versions(session: Session, deleted: bool = False) -> list[ModelVersion]:
    """Newest first; those that were deleted only when asked for."""
    query = select(ModelVersion).order_by(ModelVersion.id.desc())
    return list(session.scalars(query if deleted else query.where(ModelVersion.deleted_at.is_(None))))


def assign(session: Session, alias: str, version_id: int) -> None:
    """Point an alias at a version. A row is added, none changed, so that the history stays."""
    if alias not in ALIASES:
        raise NotFound(f"there is no alias {alias!r}; use one of {', '.join(ALIASES)}")
    usable(session, version_id)
    session.add(ModelAlias(alias=alias, model_version_id=version_id))
    session.flush()


def usable(session: Session, version_id: int) -> ModelVersion:
    """A version whose artifact is to be loaded; raises `NotFound` when it was deleted."""
    version = get(session, version_id)
    if version.deleted_at is not None:
        raise NotFound(f"model {version_id} was deleted; `tweetscore models list` shows those there are")
    return version


def rollback(session: Session, alias: str) -> tuple[int, int]:
    """Point an alias at the version it pointed at before. Returns the version ids (from, to).

    Raises `NotFound` when it never pointed at another one that is still there.
    """
    now = assigned(session, alias)
    before = session.scalar(
        select(ModelAlias.model_version_id)
        .join(ModelVersion)
        .where(ModelAlias.alias == alias, ModelAlias.model_version_id != now, ModelVersion.deleted_at.is_(None))
        .order_by(ModelAlias.id.desc())
        .limit(1)
    )
    if now is None or before is None:
        raise NotFound(
            f"no other model was the {alias} before; `tweetscore models promote ID --alias {alias}` names one"
        )
    assign(session, alias, before)
    return now, before


def history(session: Session) -> list[ModelAlias]:
    """Every assignment of every alias, oldest first."""
    return list(session.scalars(select(ModelAlias).order_by(ModelAlias.id)))


def mark_deleted(session: Session, version_id: int, predictions: bool) -> ModelVersion:
    """Take a version out of use; its figures, and its predictions unless they are to go too, stay.

    Raises `InUse` while an alias points at it.
    """
    version = usable(session, version_id)
    for alias in ALIASES:
        if assigned(session, alias) == version_id:
            raise InUse(f"model {version_id} is the {alias}; promote another one first")
    version.deleted_at = utc_now()
    if predictions:
        session.execute(delete(Prediction).where(Prediction.model_version_id == version_id))
    return version


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


def wrongest(session: Session, version_id: int, limit: int = 20) -> list[TestPrediction]:
    """The test rows a version was wrong about, those it was surest of first."""
    wrong = (TestPrediction.model_version_id == version_id, TestPrediction.actual != TestPrediction.predicted)
    order = (TestPrediction.probability.desc(), TestPrediction.row_number)
    return list(session.scalars(select(TestPrediction).where(*wrong).order_by(*order).limit(limit)))


def paired(session: Session, one: int, other: int) -> tuple[int, int, int]:
    """Texts two versions were tested on with the same label: (all, those only `one` has right, those only `other` has).

    Each counts once, however often the guide's split has it among the test rows.
    """
    a, b = _tested(one), _tested(other)
    shared, only_a, only_b = session.execute(
        select(
            func.count(),
            func.count().filter(a.c.right, ~b.c.right),
            func.count().filter(b.c.right, ~a.c.right),
        ).select_from(join(a, b, and_(a.c.text == b.c.text, a.c.actual == b.c.actual)))
    ).one()
    return shared, only_a, only_b


def _tested(version_id: int) -> Subquery:
    """Text and label of a version's test rows, each once, and whether it was right of all of them."""
    rows = (TestPrediction.text, TestPrediction.actual)
    right = func.min(case((TestPrediction.actual == TestPrediction.predicted, 1), else_=0)) == 1
    return (
        select(*rows, right.label("right"))
        .where(TestPrediction.model_version_id == version_id)
        .group_by(*rows)
        .subquery()
    )
