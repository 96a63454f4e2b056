"""Artifact into the model store, then its row: in this order, so that a row never names what is not there."""

import shutil
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from db import jobs, registry
from db.models import ModelVersion
from db.session import Database
from training import failpoint
from training.artifact import Reference, Spec, save_artifact
from training.data import Split
from training.evaluate import Floats, certainty, choose, confusion, label_text
from training.model import Classifier

Figures = dict[tuple[str, str], float]


def register_model(
    database: Database,
    job_id: int,
    token: int,
    store: Path,
    model: Classifier,
    tokenizer: PreTrainedTokenizerBase,
    spec: Spec,
    reference: Reference,
    figures: Figures,
    test: Split,
    probabilities: Floats,
) -> int:
    """Store the model and finish its job in one transaction. Returns the version id.

    Raises `LeaseLost`, and leaves no artifact, when somebody claimed the job with a newer fencing token.
    """
    # The token is part of the name: a stale trainer that wakes late cannot write over its successor's artifact.
    folder = store / f"job-{job_id}-{token}"
    sha256 = save_artifact(folder, model, tokenizer, spec, reference)
    try:
        failpoint.passing("artifact")
        with database.begin() as session:
            jobs.finish(session, job_id, token, "succeeded")
            version = ModelVersion(
                job_id=job_id,
                base_model=spec.base_model,
                base_revision=spec.base_revision,
                artifact_url=folder.as_uri(),
                sha256=sha256,
                labels=spec.labels,
                cleaner_version=spec.cleaner_version,
                temperature=spec.temperature,
            )
            registry.add_version(
                session,
                version,
                [{"metric": metric, "label": label, "value": value} for (metric, label), value in figures.items()],
                _confusion_rows(spec, test, probabilities),
                prediction_rows(spec, test, probabilities),
            )
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    failpoint.passing("registered")
    # What a trainer that was killed here left behind; no row names it, and its token can register nothing any more.
    for orphan in [*store.glob(f"job-{job_id}-*"), *store.glob(f".job-{job_id}-*.draft")]:
        if orphan != folder and orphan.name.removesuffix(".engines") != folder.name:
            shutil.rmtree(orphan, ignore_errors=True)
    return version.id


def _confusion_rows(spec: Spec, test: Split, probabilities: Floats) -> list[dict[str, Any]]:
    if spec.config.task == "multi_label":
        return []  # no row has one actual and one predicted label
    counts = confusion(test.targets, probabilities, spec.labels)
    return [{"actual": actual, "predicted": predicted, "count": n} for (actual, predicted), n in counts.items()]


def prediction_rows(spec: Spec, test: Split, probabilities: Floats) -> list[dict[str, Any]]:
    chosen = choose(probabilities, spec.config.task)
    sure = certainty(probabilities, chosen, spec.config.task)
    return [
        {
            "row_number": test.row_numbers[i],
            "text": test.texts[i],
            "actual": label_text(test.targets[i], spec.labels),
            "predicted": label_text(chosen[i], spec.labels),
            "probability": float(sure[i]),
            "probabilities": dict(zip(spec.labels, map(float, probabilities[i]), strict=True)),
        }
        for i in range(len(test))
    ]
