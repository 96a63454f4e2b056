"""Artifact into the model store, then its row: in this order, so that a row never names what is not there."""

from collections.abc import Callable
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
from training.orphans import artifact_name
from training.outcome import Outcome
from training.storage import Store


def register_model(
    database: Database,
    store: Store,
    model: Classifier,
    tokenizer: PreTrainedTokenizerBase,
    reference: Reference,
    outcome: Outcome,
    patiently: Callable[[Callable[[], int]], int] = lambda once: once(),
) -> int:
    """Store the model and finish its job in one transaction, which `patiently` tries. Returns the version id.

    Raises `LeaseLost`, and leaves no artifact, when somebody claimed the job with a newer fencing token. An artifact of
    which nobody can tell whether it is registered stays, for `orphans`.
    """
    name = artifact_name(outcome.job_id, outcome.fencing_token)

    def write(folder: Path) -> str:
        return save_artifact(
            folder, model, tokenizer, outcome.spec, reference, lambda draft: write_card(draft, outcome)
        )

    entry = _Entry(database, outcome, store.url_of(name), store.publish(name, write))
    try:
        failpoint.passing("artifact")
        version_id = patiently(entry.make)
    except BaseException:
        if not entry.doubtful:
            with suppress(StoreAway):  # what keeps it from being registered is the error to tell
                store.remove_named(name)
        raise
    failpoint.passing("registered")
    # What a trainer that was killed here left behind; no row names it, and its token can register nothing any more.
    with suppress(StoreAway):
        for orphan in store.names(f"job-{outcome.job_id}-"):
            if orphan.removesuffix(".engines") != name:
                store.remove_named(orphan)
    return version_id


class _Entry:
    """The row of an artifact, to be made. `doubtful` while a commit was sent and nobody knows what became of it."""

    def __init__(self, database: Database, outcome: Outcome, artifact_url: str, sha256: str) -> None:
        self.doubtful = False
        self._database = database
        self._outcome = outcome
        self._url = artifact_url
        self._sha256 = sha256

    def make(self) -> int:
        """Returns the version id, also when an earlier try made it whose answer was lost."""
        job_id, token = self._outcome.job_id, self._outcome.fencing_token
        with self._database.begin() as session:
            if self.doubtful:
                jobs.lock(session, job_id)  # fails while the commit may still be under way
                made = registry.of_job(session, job_id)
                if made is not None and made.artifact_url == self._url:
                    return made.id
                self.doubtful = False
            jobs.finish(session, job_id, token, "succeeded")
            version = self._version()
            figures = self._outcome.figures.items()
            registry.add_version(
                session,
                version,
                [{"metric": metric, "label": label, "value": value} for (metric, label), value in figures],
                _confusion_rows(self._outcome),
                _prediction_rows(self._outcome),
            )
            self.doubtful = True
        return version.id

    def _version(self) -> ModelVersion:
        spec = self._outcome.spec
        return ModelVersion(
            job_id=self._outcome.job_id,
            base_model=spec.base_model,
            base_revision=spec.base_revision,
            artifact_url=self._url,
            sha256=self._sha256,
            labels=spec.labels,
            cleaner_version=spec.cleaner_version,
            temperature=spec.temperature,
        )


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
