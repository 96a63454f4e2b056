"""Queries of the model registry: versions, cascades, their test metrics, the aliases, and adapted base models.

The caller owns the transaction.
"""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import ColumnElement, Double, Subquery, and_, case, cast, delete, func, insert, join, or_, select
from sqlalchemy.orm import Session

from db.errors import InUse, NotFound
from db.models import (
    BaseModel,
    Cascade,
    ConfusionCell,
    Evaluation,
    EvaluationMetric,
    ModelAlias,
    ModelVersion,
    OutOfFoldPrediction,
    Prediction,
    TestMetric,
    TestPrediction,
    utc_now,
)

CHAMPION, CHALLENGER = "champion", "challenger"
ALIASES = (CHAMPION, CHALLENGER)


def add_version(
    session: Session,
    version: ModelVersion,
    metrics: list[dict[str, Any]],
    confusion: list[dict[str, Any]],
    test_predictions: list[dict[str, Any]],
    out_of_fold_predictions: Sequence[dict[str, Any]] = (),
) -> ModelVersion:
    """Add a model version with its test results. The rows need no `model_version_id`."""
    session.add(version)
    session.flush()
    tables = (
        (TestMetric, metrics),
        (ConfusionCell, confusion),
        (TestPrediction, test_predictions),
        (OutOfFoldPrediction, out_of_fold_predictions),
    )
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
    now, before = assigned(session, alias), previous(session, alias)
    if now is None or before is None:
        raise NotFound(
            f"no other model was the {alias} before; set one with `tweetscore models promote ID --alias {alias}`"
        )
    assign(session, alias, before)
    return now, before


def previous(session: Session, alias: str) -> int | None:
    """The version that `rollback` returns an alias to; None without one that still exists."""
    now = assigned(session, alias)
    return session.scalar(
        select(ModelAlias.model_version_id)
        .join(ModelVersion)
        .where(ModelAlias.alias == alias, ModelAlias.model_version_id != now, ModelVersion.deleted_at.is_(None))
        .order_by(ModelAlias.id.desc())
        .limit(1)
    )


def history(session: Session) -> list[ModelAlias]:
    """Every assignment of every alias, oldest first."""
    return list(session.scalars(select(ModelAlias).order_by(ModelAlias.id)))


def mark_deleted(session: Session, version_id: int, predictions: bool) -> ModelVersion:
    """Mark a version as deleted. Its test results stay; with `predictions`, its predictions are deleted.

    Raises `InUse` while an alias points to it or a cascade uses it.
    """
    # Locked, so that no cascade of it is added in between.
    session.get(ModelVersion, version_id, with_for_update={"key_share": True})
    version = usable(session, version_id)
    for alias in ALIASES:
        if assigned(session, alias) == version_id:
            raise InUse(f"model {version_id} is the {alias}; promote another one first")
    if used := cascades_with(session, version_id):
        raise InUse(
            f"model {version_id} is a part of the cascade {used[0]}; delete that one first: `tweetscore models delete "
            f"{used[0]}`"
        )
    version.deleted_at = utc_now()
    if predictions:
        session.execute(delete(Prediction).where(Prediction.model_version_id == version_id))
    return version


def add_cascade(session: Session, cascade: Cascade) -> None:
    """Add what a version is made of. Raises `NotFound` when the student or the teacher was deleted meanwhile."""
    for part in (cascade.student_id, cascade.teacher_id):
        # `mark_deleted` waits for this lock; workers that score with the version go on.
        session.get(ModelVersion, part, with_for_update={"read": True}, populate_existing=True)
        usable(session, part)
    session.add(cascade)
    session.flush()


def cascade(session: Session, version_id: int) -> Cascade | None:
    """What a version is made of; None for a model that is no cascade."""
    return session.get(Cascade, version_id)


def made_of(session: Session, version: ModelVersion) -> list[ModelVersion]:
    """The models that compute: the student and the teacher of a cascade, or the version itself."""
    found = cascade(session, version.id)
    return [version] if found is None else [get(session, id_) for id_ in (found.student_id, found.teacher_id)]


def cascades_with(session: Session, version_id: int) -> list[int]:
    """The cascades that use a version and are not deleted, oldest first."""
    query = select(Cascade.model_version_id).join(ModelVersion, ModelVersion.id == Cascade.model_version_id)
    uses = or_(Cascade.student_id == version_id, Cascade.teacher_id == version_id)
    return list(session.scalars(query.where(uses, ModelVersion.deleted_at.is_(None)).order_by(ModelVersion.id)))


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


def add_evaluation(session: Session, evaluation: Evaluation, metrics: list[dict[str, Any]]) -> Evaluation:
    """Add an evaluation with its metrics; an earlier one of the same version and file is replaced.

    The metrics need no `evaluation_id`. Raises `NotFound` when the version does not exist or was deleted.
    """
    # Locked, so that two evaluations on one file at the same time take turns. `key_share` lets workers that score with
    # this version go on.
    session.get(ModelVersion, evaluation.model_version_id, with_for_update={"key_share": True})
    usable(session, evaluation.model_version_id)
    session.execute(
        delete(Evaluation).where(
            Evaluation.model_version_id == evaluation.model_version_id,
            Evaluation.dataset_sha256 == evaluation.dataset_sha256,
        )
    )
    session.add(evaluation)
    session.flush()
    session.execute(insert(EvaluationMetric), [{**row, "evaluation_id": evaluation.id} for row in metrics])
    return evaluation


def evaluations(session: Session, version_id: int) -> list[tuple[Evaluation, dict[tuple[str, str], float]]]:
    """Every evaluation of a version with its metrics by (metric, label), oldest first."""
    query = select(Evaluation).where(Evaluation.model_version_id == version_id).order_by(Evaluation.id)
    found: dict[int, tuple[Evaluation, dict[tuple[str, str], float]]] = {
        evaluation.id: (evaluation, {}) for evaluation in session.scalars(query)
    }
    rows = select(EvaluationMetric).where(EvaluationMetric.evaluation_id.in_(list(found)))
    for row in session.scalars(rows):
        found[row.evaluation_id][1][row.metric, row.label] = row.value
    return list(found.values())


def confusion(session: Session, version_id: int) -> dict[tuple[str, str], int]:
    rows = session.execute(
        select(ConfusionCell.actual, ConfusionCell.predicted, ConfusionCell.count).where(
            ConfusionCell.model_version_id == version_id
        )
    )
    return {(actual, predicted): count for actual, predicted, count in rows}


def wrongest(session: Session, version_id: int, limit: int = 20) -> list[TestPrediction]:
    """The misclassified test rows of a version, by falling probability; those of a continuous one by falling error."""
    wrong = (TestPrediction.model_version_id == version_id, TestPrediction.actual != TestPrediction.predicted)
    measure = _error() if _is_continuous(session, version_id) else TestPrediction.probability
    order = (measure.desc(), TestPrediction.row_number)
    return list(session.scalars(select(TestPrediction).where(*wrong).order_by(*order).limit(limit)))


def out_of_fold(session: Session, version_id: int) -> list[OutOfFoldPrediction]:
    """The predictions of the cross-validation of a version's job, by row number; none without a cross-validation."""
    query = select(OutOfFoldPrediction).where(OutOfFoldPrediction.model_version_id == version_id)
    return list(session.scalars(query.order_by(OutOfFoldPrediction.row_number)))


def tested_rows(session: Session, version_id: int) -> set[int]:
    """The row numbers of a version's test rows in its dataset."""
    query = select(TestPrediction.row_number).where(TestPrediction.model_version_id == version_id)
    return set(session.scalars(query))


def paired(session: Session, one: int, other: int) -> tuple[int, int, int]:
    """Counts of texts that both versions were tested on with the same label: (all, only `one` correct, only `other`).

    Of two continuous versions the counts are those of texts to whose target only one is closer. A text that occurs
    several times among the test rows, as in the guide's split, counts once.
    """
    continuous = _is_continuous(session, one) and _is_continuous(session, other)
    a, b = _tested(one, continuous), _tested(other, continuous)
    shared, only_a, only_b = session.execute(
        select(
            func.count(),
            func.count().filter(a.c.loss < b.c.loss),
            func.count().filter(b.c.loss < a.c.loss),
        ).select_from(join(a, b, and_(a.c.text == b.c.text, a.c.actual == b.c.actual)))
    ).one()
    return shared, only_a, only_b


def _tested(version_id: int, continuous: bool) -> Subquery:
    """The distinct texts and labels of a version's test rows, and the largest loss of their occurrences.

    The loss is 0 for a correct label and 1 for another, and the absolute error of a continuous prediction.
    """
    rows = (TestPrediction.text, TestPrediction.actual)
    loss = _error() if continuous else case((TestPrediction.actual == TestPrediction.predicted, 0), else_=1)
    return (
        select(*rows, func.max(loss).label("loss"))
        .where(TestPrediction.model_version_id == version_id)
        .group_by(*rows)
        .subquery()
    )


def _is_continuous(session: Session, version_id: int) -> bool:
    """Whether a version predicts a number: then it has one output and no other label."""
    return len(get(session, version_id).labels) == 1


def _error() -> ColumnElement[float]:
    """The absolute error of a test row whose actual and predicted labels are numbers."""
    actual, predicted = (cast(column, Double) for column in (TestPrediction.actual, TestPrediction.predicted))
    return func.abs(predicted - actual)


# --- adapted base models


def base_model(session: Session, base_model_id: int) -> BaseModel:
    """The base model that jobs name `adapted:ID`."""
    found = session.get(BaseModel, base_model_id)
    if found is None:
        raise NotFound(
            f"there is no base model adapted:{base_model_id}; `tweetscore models bases` shows the existing ones"
        )
    return found


def base_model_of_job(session: Session, job_id: int) -> BaseModel | None:
    return session.scalar(select(BaseModel).where(BaseModel.job_id == job_id))


def base_models(session: Session) -> list[BaseModel]:
    """Newest first."""
    return list(session.scalars(select(BaseModel).order_by(BaseModel.id.desc())))
