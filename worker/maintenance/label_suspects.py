"""`tweetscore data check --suspects`: the rows of a labelled file whose labels are probably wrong."""

import csv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from db import jobs, registry
from db.errors import plain
from db.models import ModelVersion, OutOfFoldPrediction, TrainingJob
from db.session import Database
from training.config import TrainConfig
from training.data.columns import MULTI_LABEL_SEPARATOR
from training.data.dataset import Rows, read_rows
from training.data.targets import labels_of_row
from training.errors import BadDataset
from training.evaluation.decisions import Floats, choose, label_text
from training.evaluation.label_errors import label_probabilities, rank_label_errors, require_cleanlab
from training.store.paths import file_sha256
from training.text.cleaning import same_text_key
from worker.errors import BadRequest
from worker.intake.submit_job import local_copy
from worker.maintenance.export import cell
from worker.scoring.scoring_model import open_model, serving_from
from worker.scoring.window import USUAL_WINDOW_TWEETS
from worker.settings import Settings

COLUMNS = ("row", "given", "suggested", "corrected", "text")


@dataclass(frozen=True)
class Suspect:
    """A row of the file, its label, the label that the model suggests, and the probability of each."""

    row: int
    given: str
    suggested: str
    given_probability: float
    suggested_probability: float
    text: str


@dataclass(frozen=True)
class Suspects:
    """The rows that are probably mislabelled, the most probable first, out of `rows` that were compared.

    `out_of_fold` tells whether the probabilities are those of a cross-validation. `notes` are sentences on them.
    """

    file: str
    model_version_id: int
    rows: int
    out_of_fold: bool
    notes: list[str]
    found: list[Suspect]


@dataclass(frozen=True)
class _Scored:
    """Row numbers, `targets` (N, K) and `probabilities` (N, K) of labelled rows."""

    labels: list[str]
    task: str
    row_numbers: list[int]
    targets: Floats
    probabilities: Floats


def find_suspects(
    settings: Settings,
    database: Database,
    file: str,
    version_id: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Suspects:
    """Compare the labels of a file with a model, or with the cross-validation of the job that read this file.

    `progress` takes the rows that were scored, and all rows. Raises `BadDataset` or `BadSource` for the file,
    `NotFound` without such a model, `BadArtifact` or `StoreUnavailable` when it cannot be loaded, and
    `LabelCheckUnavailable` without the package.
    """
    require_cleanlab()  # before the rows are scored
    with local_copy(file) as path:
        name, sha256, rows = path.name, file_sha256(path), read_rows(path)
    with database.read() as session:
        version = registry.get(session, version_id)
        if len(version.labels) < 2:
            raise BadRequest(f"model {version_id} has no labels to compare; name a model that was trained on labels")
        job = jobs.find(session, version.job_id) if version.job_id is not None else None
        its_file = job is not None and job.dataset_sha256 == sha256
        predicted = registry.out_of_fold(session, version_id) if its_file else []
        if not predicted:
            registry.usable(session, version_id)
    if job is not None and predicted:
        scored = _from_cross_validation(version, job, predicted)
        notes = [
            f"probabilities of the cross-validation of job {job.id}: each row was scored by a model that was not "
            "trained on it"
        ]
    else:
        scored = _from_model(settings, version, rows, progress)
        notes = [f"probabilities of model {version_id}"]
        if its_file:
            notes.append(
                "the model was trained on rows of this file and has learned their labels, so it hides errors; train "
                "with --folds 5 and check with that model"
            )
    return Suspects(name, version_id, len(scored.targets), bool(predicted), notes, _ranked(scored, rows))


def _from_cross_validation(version: ModelVersion, job: TrainingJob, predicted: list[OutOfFoldPrediction]) -> _Scored:
    task = job.config["task"]
    names = [row.actual.split(MULTI_LABEL_SEPARATOR) if task == "multi_label" else [row.actual] for row in predicted]
    return _Scored(
        version.labels,
        task,
        [row.row_number for row in predicted],
        np.array([[label in given for label in version.labels] for given in names], np.float32),
        np.array([[row.probabilities[label] for label in version.labels] for row in predicted], np.float32),
    )


def _from_model(settings: Settings, version: ModelVersion, rows: Rows, progress: Callable[[int, int], None]) -> _Scored:
    """Score the rows that have a text. Copies of a text are kept, since their labels may differ."""
    kept = [i for i, text in enumerate(rows.texts) if same_text_key(text)]
    if not kept:
        raise BadDataset("every text of the file is blank; give a file with labels and texts")
    probabilities = []
    with open_model(version, serving_from(settings)) as model:
        spec = model.current().spec
        config = _with_labels(spec.config, spec.labels)
        names = [labels_of_row(rows.labels[i], rows.row_numbers[i], config) for i in kept]
        size = min(settings.window_tweets, USUAL_WINDOW_TWEETS)  # shows progress soon
        for start in range(0, len(kept), size):
            window = kept[start : start + size]
            serving = model.current()
            probabilities.append(serving.forward(serving.tokenise([rows.texts[i] for i in window])).probabilities)
            progress(start + len(window), len(kept))
    return _Scored(
        spec.labels,
        config.task,
        [rows.row_numbers[i] for i in kept],
        np.array([[label in given for label in spec.labels] for given in names], np.float32),
        np.concatenate(probabilities),
    )


def _with_labels(config: TrainConfig, labels: list[str]) -> TrainConfig:
    """Return the configuration with which a row may have the labels of the model, or those that it was trained on."""
    return config.model_copy(update={"labels": {label: label for label in labels} | (config.labels or {})})


def _ranked(scored: _Scored, rows: Rows) -> list[Suspect]:
    targets, probabilities, task = scored.targets, scored.probabilities, scored.task
    # The most probable label, to which cleanlab compares the given one; `choose` decides otherwise for ordinal labels.
    chosen = choose(probabilities, task if task == "multi_label" else "single_label")
    given = label_probabilities(targets, probabilities, task)
    suggested = label_probabilities(chosen.astype(np.float32), probabilities, task)
    texts = dict(zip(rows.row_numbers, rows.texts, strict=True))
    return [
        Suspect(
            scored.row_numbers[i],
            label_text(targets[i].astype(np.int64), scored.labels),
            label_text(chosen[i], scored.labels),
            float(given[i]),
            float(suggested[i]),
            texts[scored.row_numbers[i]],
        )
        for i in rank_label_errors(targets, probabilities, task)
    ]


def write_suspects(place: str, suspects: list[Suspect]) -> None:
    """Write a CSV file to correct labels in, with an empty column `corrected`.

    An apostrophe is put before cells that a spreadsheet would run as a formula. Raises `BadRequest`.
    """
    try:
        # With a byte-order mark, by which spreadsheets recognise UTF-8.
        with Path(place).open("w", encoding="utf-8-sig", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            writer.writerows([map(cell, (s.row, s.given, s.suggested, "", s.text)) for s in suspects])
    except OSError as error:
        raise BadRequest(f"{plain(place)} cannot be written ({error.strerror}); name another file") from error
