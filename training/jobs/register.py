"""Register a model: store its artifact first, then insert its row, so that a row never names a missing artifact."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from db import jobs, registry
from db.models import ModelVersion
from db.session import Database
from training import failpoint
from training.data.columns import VALUE
from training.data.dataset import Split
from training.data.numbers import TargetScale
from training.errors import StoreUnavailable
from training.evaluation.decisions import Floats, choose, confidence, label_text
from training.evaluation.metrics import confusion
from training.jobs.unregistered_artifacts import artifact_name
from training.model.artifact import Reference, Spec, save_artifact
from training.model.classifier import Classifier
from training.reporting.model_card import write_card
from training.reporting.training_result import TrainingResult
from training.store.store import Store


def register_model(
    database: Database,
    store: Store,
    model: Classifier,
    tokenizer: PreTrainedTokenizerBase,
    reference: Reference,
    result: TrainingResult,
    retry: Callable[[Callable[[], int]], int] = lambda transaction: transaction(),
) -> int:
    """Store the artifact, then insert the model version and finish its job in one transaction. Returns the version id.

    `retry` runs the transaction and may repeat it. Raises `LeaseLost`, and removes the artifact, when another worker
    has claimed the job. When the answer to the commit is lost, the artifact stays; `unregistered_artifacts`
    removes it later if it was not registered.
    """
    name = artifact_name(result.job_id, result.fencing_token)

    def write(folder: Path) -> str:
        return save_artifact(folder, model, tokenizer, result.spec, reference, lambda draft: write_card(draft, result))

    registration = _Registration(database, result, store.url_of(name), store.publish(name, write))
    try:
        failpoint.passing("artifact")
        version_id = retry(registration.commit)
    except BaseException:
        if not registration.in_doubt:
            with suppress(StoreUnavailable):  # report the error that prevented the registration instead
                store.remove_named(name)
        raise
    failpoint.passing("registered")
    # Remove artifacts of earlier starts of this job. Their fencing tokens are stale, so they can never be registered.
    with suppress(StoreUnavailable):
        for stale in store.names(f"job-{result.job_id}-"):
            if stale.removesuffix(".engines") != name:
                store.remove_named(stale)
    return version_id


class _Registration:
    """The transaction that registers an artifact. `in_doubt` is True when a commit was sent without an answer."""

    def __init__(self, database: Database, result: TrainingResult, artifact_url: str, sha256: str) -> None:
        self.in_doubt = False
        self._database = database
        self._result = result
        self._url = artifact_url
        self._sha256 = sha256

    def commit(self) -> int:
        """Commit the registration and return the version id, also when an earlier commit succeeded unanswered."""
        job_id, token = self._result.job_id, self._result.fencing_token
        with self._database.begin() as session:
            if self.in_doubt:
                jobs.lock(session, job_id)  # fails while the earlier commit may still be running
                existing = registry.of_job(session, job_id)
                if existing is not None and existing.artifact_url == self._url:
                    return existing.id
                self.in_doubt = False
            jobs.finish(session, job_id, token, "succeeded")
            version = self._version()
            figures = self._result.figures.items()
            registry.add_version(
                session,
                version,
                [{"metric": metric, "label": label, "value": value} for (metric, label), value in figures],
                _confusion_rows(self._result),
                _test_rows(self._result),
                _out_of_fold_rows(self._result),
            )
            self.in_doubt = True
        return version.id

    def _version(self) -> ModelVersion:
        spec = self._result.spec
        return ModelVersion(
            job_id=self._result.job_id,
            base_model=spec.base_model,
            base_revision=spec.base_revision,
            artifact_url=self._url,
            sha256=self._sha256,
            labels=spec.labels,
            cleaner_version=spec.cleaner_version,
            temperature=spec.temperature,
        )


def _confusion_rows(result: TrainingResult) -> list[dict[str, Any]]:
    config = result.spec.config
    if not config.one_label:
        return []  # a confusion matrix needs one label per row
    return confusion_rows(result.data.test.targets, result.probabilities, result.spec)


def confusion_rows(targets: Floats, probabilities: Floats, spec: Spec) -> list[dict[str, Any]]:
    """Return rows of `confusion_cells` for rows of one label each."""
    counts = confusion(targets, probabilities, spec.labels, spec.config.task)
    return [{"actual": actual, "predicted": predicted, "count": n} for (actual, predicted), n in counts.items()]


def _test_rows(result: TrainingResult) -> list[dict[str, Any]]:
    rows = prediction_rows(result.data.test, result.probabilities, result.spec)
    shares = result.unknown_shares if result.unknown_shares is not None else [None] * len(rows)
    return [{**row, "unknown_share": share} for row, share in zip(rows, shares, strict=True)]


def _out_of_fold_rows(result: TrainingResult) -> list[dict[str, Any]]:
    found = result.out_of_fold
    if found is None:
        return []
    rows = prediction_rows(found.rows, found.probabilities, result.spec)
    return [{**row, "fold": fold} for row, fold in zip(rows, found.folds.tolist(), strict=True)]


def prediction_rows(rows: Split, probabilities: Floats, spec: Spec) -> list[dict[str, Any]]:
    """Return rows of `test_predictions`, without the share of unknown tokens."""
    if spec.scale is not None:
        return _value_rows(rows, spec.scale, probabilities)
    chosen = choose(probabilities, spec.config.task)
    confidences = confidence(probabilities, chosen, spec.config.task)
    return [
        {
            "row_number": rows.row_numbers[i],
            "text": rows.texts[i],
            "actual": label_text(rows.targets[i], spec.labels),
            "predicted": label_text(chosen[i], spec.labels),
            "probability": float(confidences[i]),
            "probabilities": dict(zip(spec.labels, map(float, probabilities[i]), strict=True)),
        }
        for i in range(len(rows))
    ]


def _value_rows(test: Split, scale: TargetScale, outputs: Floats) -> list[dict[str, Any]]:
    """The rows of a continuous model: `actual` and `predicted` are numbers."""
    actual, predicted = (scale.values(array)[:, 0] for array in (test.targets, outputs))
    return [
        {
            "row_number": test.row_numbers[i],
            "text": test.texts[i],
            "actual": scale.text(actual[i]),
            "predicted": scale.text(predicted[i]),
            "probability": 1.0,
            "probabilities": {VALUE: float(predicted[i])},
        }
        for i in range(len(test))
    ]
