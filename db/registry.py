"""Queries of the model registry: versions, their test metrics and the aliases. The caller owns the transaction."""

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
    """Add a model version with its test results. The rows need no `model_version_id`."""
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
        raise NotFound(f"there is no model {version_id}; `tweetscore models list` shows the existing ones")
    return version


def of_job(session: Session, job_id: int) -> ModelVersion | None:
    return session.scalar(select(ModelVersion).where(ModelVersion.job_id == job_id))


def revision_used(session: Session, base_model: str) -> str | None:
    """Hub commit of the first model trained on `base_model`; later models use the same commit."""
    return session.scalar(
        select(ModelVersion.base_revision)
        .where(ModelVersion.base_model == base_model, ModelVersion.base_revision.is_not(None))
        .order_by(ModelVersion.id)
        .limit(1)
    )


def versions(session: Session, deleted: bool = False) -> list[ModelVersion]:
    """Newest first; with `deleted`, deleted versions too."""
    query = select(ModelVersion).order_by(ModelVersion.id.desc())
    return list(session.scalars(query if deleted else query.where(ModelVersion.deleted_at.is_(None))))


def assign(session: Session, alias: str, version_id: int) -> None:
    """Point an alias at a version. Adds a row and changes none, so the history is kept."""
    if alias not in ALIASES:
        raise NotFound(f"there is no alias {alias!r}; use one of {', '.join(ALIASES)}")
    usable(session, version_id)
    session.add(ModelAlias(alias=alias, model_version_id=version_id))
    session.flush()


def usable(session: Session, version_id: int) -> ModelVersion:
    """A version whose artifact can be loaded. Raises `NotFound` when it does not exist or was deleted."""
    version = get(session, version_id)
    if version.deleted_at is not None:
        raise NotFound(f"model {version_id} was deleted; `tweetscore models list` shows the existing ones")
    return version


def rollback(session: Session, alias: str) -> tuple[int, int]:
    """Point an alias at its previous version. Returns the version ids (from, to).

    Raises `NotFound` when there is no previous version that still exists.
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
            f"no other model was the {alias} before; set one with `tweetscore models promote ID --alias {alias}`"
        )
    assign(session, alias, before)
    return now, before


def history(session: Session) -> list[ModelAlias]:
    """Every assignment of every alias, oldest first."""
    return list(session.scalars(select(ModelAlias).order_by(ModelAlias.id)))


def mark_deleted(session: Session, version_id: int, predictions: bool) -> ModelVersion:
    """Mark a version as deleted. Its test results stay; with `predictions`, its predictions are deleted.

    Raises `InUse` while an alias points to it.
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
    """The newest assignment of an alias; None when it was never assigned."""
    return session.scalar(select(ModelAlias).where(ModelAlias.alias == alias).order_by(ModelAlias.id.desc()).limit(1))


def assigned(session: Session, alias: str) -> int | None:
    """The id of the model version that an alias points to; None when it was never assigned."""
    newest = assignment(session, alias)
    return newest.model_version_id if newest else None


def metrics(session: Session, version_id: int) -> dict[tuple[str, str], float]:
    """Every test metric of a version by (metric, label). The label is empty for the whole test split."""
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
    """The misclassified test rows of a version, by falling probability."""
    wrong = (TestPrediction.model_version_id == version_id, TestPrediction.actual != TestPrediction.predicted)
    order = (TestPrediction.probability.desc(), TestPrediction.row_number)
    return list(session.scalars(select(TestPrediction).where(*wrong).order_by(*order).limit(limit)))


def tested_rows(session: Session, version_id: int) -> set[int]:
    """The row numbers of a version's test rows in its dataset."""
    query = select(TestPrediction.row_number).where(TestPrediction.model_version_id == version_id)
    return set(session.scalars(query))


def paired(session: Session, one: int, other: int) -> tuple[int, int, int]:
    """Counts of texts that both versions were tested on with the same label: (all, only `one` correct, only `other`).

    A text that occurs several times among the test rows, as in the guide's split, counts once.
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
    """The distinct texts and labels of a version's test rows, and whether every occurrence was predicted correctly."""
    rows = (TestPrediction.text, TestPrediction.actual)
    right = func.min(case((TestPrediction.actual == TestPrediction.predicted, 1), else_=0)) == 1
    return (
        select(*rows, right.label("right"))
        .where(TestPrediction.model_version_id == version_id)
        .group_by(*rows)
        .subquery()
    )
