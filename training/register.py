"""Artifact into the model store, then its row: in this order, so that a row never names what is not there."""

from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from db import jobs, registry
from db.models import ModelVersion
from db.session import Database
from training import failpoint
from training.artifact import Reference, save_artifact
from training.card import write_card
from training.decide import certainty, choose, label_text
from training.errors import StoreAway
from training.evaluate import confusion
from training.model import Classifier
from training.outcome import Outcome
from training.storage import Store


def register_model(
    database: Database,
    store: Store,
    model: Classifier,
    tokenizer: PreTrainedTokenizerBase,
    reference: Reference,
    outcome: Outcome,
) -> int:
    """Store the model and finish its job in one transaction. Returns the version id.

    Raises `LeaseLost`, and leaves no artifact, when somebody claimed the job with a newer fencing token.
    """
    job_id, token, spec = outcome.job_id, outcome.fencing_token, outcome.spec
    # The token is part of the name: a stale trainer that wakes late cannot write over its successor's artifact.
    name = f"job-{job_id}-{token}"

    def write(folder: Path) -> str:
        return save_artifact(folder, model, tokenizer, spec, reference, lambda draft: write_card(draft, outcome))

    sha256 = store.publish(name, write)
    try:
        failpoint.passing("artifact")
        with database.begin() as session:
            jobs.finish(session, job_id, token, "succeeded")
            version = ModelVersion(
                job_id=job_id,
                base_model=spec.base_model,
                base_revision=spec.base_revision,
                artifact_url=store.url_of(name),
                sha256=sha256,
                labels=spec.labels,
                cleaner_version=spec.cleaner_version,
                temperature=spec.temperature,
            )
            registry.add_version(
                session,
                version,
                [
                    {"metric": metric, "label": label, "value": value}
                    for (metric, label), value in outcome.figures.items()
                ],
                _confusion_rows(outcome),
                _prediction_rows(outcome),
            )
    except BaseException:
        with suppress(StoreAway):  # what keeps it from being registered is the error to tell
            store.remove_named(name)
        raise
    failpoint.passing("registered")
    # What a trainer that was killed here left behind; no row names it, and its token can register nothing any more.
    with suppress(StoreAway):
        for orphan in store.names(f"job-{job_id}-"):
            if orphan.removesuffix(".engines") != name:
                store.remove_named(orphan)
    return version.id


def _confusion_rows(outcome: Outcome) -> list[dict[str, Any]]:
    if outcome.spec.config.task == "multi_label":
        return []  # no row has one actual and one predicted label
    counts = confusion(outcome.data.test.targets, outcome.probabilities, outcome.spec.labels)
    return [{"actual": actual, "predicted": predicted, "count": n} for (actual, predicted), n in counts.items()]


def _prediction_rows(outcome: Outcome) -> list[dict[str, Any]]:
    spec, test, probabilities = outcome.spec, outcome.data.test, outcome.probabilities
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
