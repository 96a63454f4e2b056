"""Evaluate a model version on a labelled file: read -> load the artifact -> score -> compute -> store the figures."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from db import registry
from db.errors import listed
from db.models import Evaluation, ModelVersion
from db.session import Database
from training.config import make_config
from training.data.dataset import Rows, read_rows
from training.data.evaluation_rows import EvaluationRows, evaluation_rows
from training.evaluation.cascade import TASK
from training.evaluation.metrics import Figures, model_figures
from training.loop.cascade_logits import cascade_logits
from training.loop.predict import predict
from training.model.artifact import Artifact, load_artifact
from training.model.cascade import CascadeSpec, is_cascade, load_cascade
from training.model.devices import pick_device
from training.store.paths import file_sha256
from training.store.store import Store
from training.text.tokenizer import TextEncoder
from worker.connections import model_store, open_sql
from worker.intake.cascade_rows import job_of
from worker.intake.submit_job import local_copy
from worker.settings import Settings, load_settings


@dataclass(frozen=True)
class Evaluated:
    """A stored evaluation, its figures, the counts of its rows (`EvaluationRows`), and sentences on its limits."""

    version: ModelVersion
    evaluation: Evaluation
    figures: Figures
    report: dict[str, Any]
    notes: list[str]


def evaluate_model(
    settings: Settings,
    database: Database,
    version_id: int,
    dataset: str,
    labels: dict[str, str] | None = None,
    progress: Callable[[], None] = lambda: None,
) -> Evaluated:
    """Score every row of a labelled file with a model and store the figures; those of the same file are replaced.

    `labels` maps labels of the file to labels of the model. `progress` is called after each batch. Raises `NotFound`
    without such a model, `BadDataset` or `BadSource` for the file, `BadConfig` for the labels, and `BadArtifact` or
    `StoreUnavailable` when the model cannot be loaded.
    """
    with database.read() as session:
        version = registry.usable(session, version_id)
        jobs_of = [job_of(session, model) for model in registry.made_of(session, version)]
    with local_copy(dataset) as path:
        name, sha256, rows = path.name, file_sha256(path), read_rows(path)
    read, figures = _measured(model_store(settings), version, rows, labels, pick_device(settings.device), progress)
    evaluation = Evaluation(model_version_id=version_id, dataset=name, dataset_sha256=sha256, rows=len(read.rows))
    with database.begin() as session:
        metrics = [{"metric": metric, "label": label, "value": value} for (metric, label), value in figures.items()]
        registry.add_evaluation(session, evaluation, metrics)
    trained_on_it = any(job is not None and job.dataset_sha256 == sha256 for job in jobs_of)
    return Evaluated(version, evaluation, figures, read.report, _notes(read.report, trained_on_it))


def evaluate_with_settings(version_id: int, dataset: str, labels: dict[str, str] | None = None) -> dict[str, float]:
    """Evaluate with the settings of the environment. Returns the metrics of all rows, without those of each label."""
    settings = load_settings()
    database = open_sql(settings)
    try:
        figures = evaluate_model(settings, database, version_id, dataset, labels).figures
    finally:
        database.close()
    return {metric: value for (metric, label), value in figures.items() if not label}


def _measured(
    store: Store,
    version: ModelVersion,
    rows: Rows,
    labels: dict[str, str] | None,
    device: torch.device,
    progress: Callable[[], None],
) -> tuple[EvaluationRows, Figures]:
    """Return the rows that can be scored, and the figures that a job computes on its test rows."""
    with store.fetched(version.artifact_url, version.sha256) as folder:
        if is_cascade(folder):
            spec = load_cascade(folder, version.sha256)
            return _cascade_figures(store, version, spec, rows, labels, device, progress)
        artifact = load_artifact(folder, version.sha256)
    read = evaluation_rows(rows, artifact.spec.labels, artifact.spec.config, labels, artifact.spec.scale)
    return read, _figures(artifact, read, device, progress)


def _cascade_figures(
    store: Store,
    version: ModelVersion,
    spec: CascadeSpec,
    rows: Rows,
    labels: dict[str, str] | None,
    device: torch.device,
    progress: Callable[[], None],
) -> tuple[EvaluationRows, Figures]:
    config = make_config("guide", task=TASK)
    read = evaluation_rows(rows, version.labels, config, labels)
    texts = dict(zip(rows.row_numbers, rows.texts, strict=True))
    given = [texts[number] for number in read.rows.row_numbers]
    found = cascade_logits(store, spec, version.artifact_url, given, device, progress)
    return read, model_figures(read.rows.targets, found.logits, found.temperatures, version.labels, config)


def _figures(artifact: Artifact, read: EvaluationRows, device: torch.device, progress: Callable[[], None]) -> Figures:
    spec, config, rows = artifact.spec, artifact.spec.config, read.rows
    logits = predict(
        artifact.model.to(device),
        TextEncoder(artifact.tokenizer)(rows.texts, config.max_length),
        rows.targets,
        config,
        config.test_batch_size,
        artifact.tokenizer.pad_token_id,
        device,
        progress,
    ).logits
    return model_figures(rows.targets, logits, spec.temperature, spec.labels, config, spec.scale)


def _notes(report: dict[str, Any], trained_on_it: bool) -> list[str]:
    notes = []
    if trained_on_it:
        notes.append("the model was trained on rows of this file, so these figures are better than on new tweets")
    if absent := [label for label, count in report["labels"].items() if not count]:
        notes.append(f"no row has the label {listed(absent)}; its F1 counts as 0 in macro-F1")
    return notes
