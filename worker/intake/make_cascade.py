"""Make a cascade of two models: labelled rows -> logits -> threshold -> store the artifact -> insert its row."""

import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from math import isfinite
from typing import Any

import numpy as np
import torch

from db import registry
from db.errors import listed, public_url
from db.models import Cascade, ModelVersion
from db.session import Database, is_away
from training.errors import BadConfig, CannotSave, StoreUnavailable
from training.evaluation.cascade import (
    BOUNDS,
    TASK,
    Point,
    Temperatures,
    as_rows,
    cascade_curve,
    choose_threshold,
    fit_temperatures,
)
from training.evaluation.decisions import Floats, highest, to_probabilities
from training.evaluation.metrics import Figures, metrics, model_figures
from training.jobs.register import confusion_rows, prediction_rows
from training.loop.cascade_logits import TextLogits, text_logits
from training.model.artifact import Spec, load_artifact
from training.model.cascade import CascadePart, CascadeSpec, save_cascade
from training.model.devices import pick_device
from training.store.store import Store
from worker.connections import model_store, open_sql
from worker.intake.cascade_rows import CascadeRows, LabelledTexts, cascade_rows, job_of
from worker.settings import Settings, load_settings

KEEP = 0.995
SEED = 0


@dataclass(frozen=True)
class MadeCascade:
    """A registered cascade. The figures are of its test rows: of the student, the cascade and the teacher.

    They are empty without test rows. `tested_share` is the share of the test rows that is passed on.
    """

    version: ModelVersion
    spec: CascadeSpec
    rows: CascadeRows
    student: Figures
    cascade: Figures
    teacher: Figures
    tested_share: float


def make_cascade(
    settings: Settings,
    database: Database,
    student_id: int,
    teacher_id: int,
    keep: float = KEEP,
    bound: str = BOUNDS[0],
    file: str | None = None,
    labels: dict[str, str] | None = None,
    progress: Callable[[], None] = lambda: None,
) -> MadeCascade:
    """Choose the threshold of a cascade of two model versions and register it as a model version.

    `keep` is the share of the teacher's macro-F1 that it is to keep, and `bound` says by what: the lower bound of a
    bootstrap, or the estimate. `file` holds labelled rows to choose on, and `labels` maps its labels to the models'.
    `progress` is called after each batch. Raises `NotFound`, `BadConfig` for models that do not fit together, those of
    `cascade_rows`, and `NoThreshold` when no threshold keeps so much.
    """
    if not (isfinite(keep) and 0 < keep <= 1) or bound not in BOUNDS:
        raise BadConfig(f"keep is {keep:g} and bound {bound!r}; keep is above 0 and at most 1, bound {listed(BOUNDS)}")
    with database.read() as session:
        versions = registry.usable(session, student_id), registry.usable(session, teacher_id)
        jobs_of = job_of(session, versions[0]), job_of(session, versions[1])
        for version in versions:
            if registry.cascade(session, version.id) is not None:
                raise BadConfig(f"model {version.id} is a cascade itself; name two models that are none")
    _check_labels(*versions)
    rows = cascade_rows(settings, versions, jobs_of, file, labels)
    store, device = model_store(settings), pick_device(settings.device)
    texts = [*rows.choosing.texts, *rows.test.texts]
    student, teacher = (_logits(store, version, texts, device, progress) for version in versions)
    point, temperatures, curve = _choose(rows, student, teacher, keep, bound)
    if not point.share:
        rows.notes.append(
            f"nothing is passed on: model {student_id} alone keeps {keep:g} of the macro-F1 of model {teacher_id} on "
            "these rows; promote it instead"
        )
    name = f"cascade-{uuid.uuid4().hex[:16]}"
    spec = CascadeSpec(
        _part(versions[0], temperatures.student, store.url_of(name)),
        _part(versions[1], temperatures.teacher, store.url_of(name)),
        point.threshold,
        point.share,
        keep,
        bound,
        len(rows.choosing),
        as_rows(curve),
    )
    return _register(database, store, name, spec, rows, _Measured(rows, student, teacher, spec))


def cascade_with_settings(student: int, teacher: int, keep: float = KEEP, **options: Any) -> int:
    """Make a cascade with the settings of the environment. Returns the id of the model version."""
    settings = load_settings()
    database = open_sql(settings)
    try:
        return make_cascade(settings, database, student, teacher, keep, **options).version.id
    finally:
        database.close()


def _check_labels(student: ModelVersion, teacher: ModelVersion) -> None:
    if student.id == teacher.id:
        raise BadConfig(f"model {student.id} cannot be both student and teacher; name two models")
    if set(student.labels) != set(teacher.labels):
        raise BadConfig(
            f"model {student.id} has the labels {listed(student.labels)}, and model {teacher.id} "
            f"{listed(teacher.labels)}; a cascade needs two models of the same labels"
        )


def _part(version: ModelVersion, temperature: float, cascade_url: str) -> CascadePart:
    name = version.artifact_url.rstrip("/").rpartition("/")[2]
    part = CascadePart(version.id, name, version.sha256, temperature)
    if part.url(cascade_url) != version.artifact_url.rstrip("/"):
        raise BadConfig(
            f"model {version.id} lies at {public_url(version.artifact_url)}, and not beside the other models of the "
            "model store; move it there and correct its artifact_url"
        )
    return part


def _logits(
    store: Store, version: ModelVersion, texts: list[str], device: torch.device, progress: Callable[[], None]
) -> TextLogits:
    with store.fetched(version.artifact_url, version.sha256) as folder:
        artifact = load_artifact(folder, version.sha256)
        if artifact.spec.config.task != TASK:
            raise BadConfig(
                f"model {version.id} is of the task {artifact.spec.config.task}; a cascade is of the task {TASK}, "
                "whose models give one probability that says how sure they are"
            )
        return text_logits(artifact, texts, device, progress)


def _choose(
    rows: CascadeRows, student: TextLogits, teacher: TextLogits, keep: float, bound: str
) -> tuple[Point, Temperatures, list[Point]]:
    """Return the chosen point of the curve, the temperatures of both parts, and the curve."""
    count, targets = len(rows.choosing), rows.choosing.rows.targets
    of_student, of_teacher = (found.probabilities(rows.labels)[:count] for found in (student, teacher))
    curve = cascade_curve(targets, of_student, of_teacher, SEED)
    point = choose_threshold(curve, keep, bound)
    scaled_student, scaled_teacher = (
        found.in_order(rows.labels)[:count] / found.spec.temperature for found in (student, teacher)
    )
    fitted = fit_temperatures(targets, scaled_student, scaled_teacher, highest(of_student) < point.threshold)
    own = student.spec.temperature, teacher.spec.temperature
    return point, Temperatures(own[0] * fitted.student, own[1] * fitted.teacher), curve


class _Measured:
    """The figures of both models and of the cascade on the test rows, and the rows of the tables."""

    def __init__(self, rows: CascadeRows, student: TextLogits, teacher: TextLogits, spec: CascadeSpec) -> None:
        self.test: LabelledTexts = rows.test
        self.labels = teacher.spec.labels
        self.spec: Spec = teacher.spec
        order = [rows.labels.index(label) for label in self.labels]
        self.targets = np.ascontiguousarray(rows.test.rows.targets[:, order])
        first = len(rows.choosing)
        self._student, self._teacher = (found.probabilities(self.labels)[first:] for found in (student, teacher))
        self.passed = highest(self._student) < spec.threshold if len(self.test) else np.zeros(0, bool)
        logits = np.where(
            self.passed[:, None], teacher.in_order(self.labels)[first:], student.in_order(self.labels)[first:]
        )
        self.logits = np.ascontiguousarray(logits, np.float32)
        temperatures = np.where(self.passed, spec.teacher.temperature, spec.student.temperature)
        self.temperatures = torch.from_numpy(temperatures.astype(np.float32)[:, None])
        self.probabilities: Floats = to_probabilities(torch.from_numpy(self.logits), TASK, self.temperatures).numpy()
        self.unknown_shares = student.unknown_shares[first:]

    def figures(self) -> tuple[Figures, Figures, Figures]:
        """Those of the student and the teacher without intervals."""
        if not len(self.test):
            return {}, {}, {}
        student, teacher = (metrics(self.targets, found, self.labels, TASK) for found in (self._student, self._teacher))
        config = self.spec.config
        return student, model_figures(self.targets, self.logits, self.temperatures, self.labels, config), teacher

    def stored_rows(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Rows of the confusion matrix and of the test predictions."""
        if not len(self.test):
            return [], []
        rows = prediction_rows(self.test.rows, self.probabilities, self.spec)
        tested = [{**row, "unknown_share": share} for row, share in zip(rows, self.unknown_shares, strict=True)]
        return confusion_rows(self.targets, self.probabilities, self.spec), tested


def _register(
    database: Database, store: Store, name: str, spec: CascadeSpec, rows: CascadeRows, measured: _Measured
) -> MadeCascade:
    """Store the artifact, then insert its rows in one transaction."""
    student, cascade, teacher = measured.figures()
    try:
        sha256 = store.publish(name, lambda folder: save_cascade(folder, spec))
    except CannotSave as error:
        raise CannotSave(f"{store} cannot take the cascade ({error.__cause__}); free disk space, try again") from error
    version = ModelVersion(
        base_model=f"cascade of models {spec.student.model_version} and {spec.teacher.model_version}",
        artifact_url=store.url_of(name),
        sha256=sha256,
        labels=measured.labels,
        cleaner_version=measured.spec.cleaner_version,
    )
    try:
        with database.begin() as session:
            figures = [{"metric": metric, "label": label, "value": v} for (metric, label), v in cascade.items()]
            registry.add_version(session, version, figures, *measured.stored_rows())
            registry.add_cascade(session, _row(version.id, spec))
    except Exception as error:
        # A commit whose answer was lost may have taken place, and then the row needs its artifact.
        if not is_away(error):
            with suppress(StoreUnavailable):
                store.remove_named(name)
        raise
    share = float(measured.passed.mean()) if len(rows.test) else 0.0
    return MadeCascade(version, spec, rows, student, cascade, teacher, share)


def _row(version_id: int, spec: CascadeSpec) -> Cascade:
    return Cascade(
        model_version_id=version_id,
        student_id=spec.student.model_version,
        teacher_id=spec.teacher.model_version,
        threshold=spec.threshold,
        planned_share=spec.planned_share,
        keep=spec.keep,
        bound=spec.bound,
        rows=spec.rows,
        curve=spec.curve,
    )
