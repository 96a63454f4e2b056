"""The labelled rows that a cascade is chosen and tested on: those on which neither of its models was trained."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from sqlalchemy.orm import Session

from db import jobs
from db.models import ModelVersion, TrainingJob
from training.config import TrainConfig, make_config
from training.data.dataset import Dataset, Rows, Split, read_rows, split_rows
from training.data.evaluation_rows import evaluation_rows
from training.data.sample import LABELLED
from training.errors import BadConfig, BadDataset
from training.jobs.inputs import fetched_dataset
from training.store.paths import file_sha256
from training.text.cleaning import same_text_key
from worker.connections import training_context
from worker.errors import BadRequest
from worker.intake.submit_job import local_copy
from worker.settings import Settings

# With fewer rows no threshold means anything.
FEWEST_ROWS = 50


@dataclass(frozen=True)
class LabelledTexts:
    """Rows with their texts as in the file, before cleaning."""

    rows: Split
    texts: list[str]

    def __len__(self) -> int:
        return len(self.texts)

    def without(self, keys: set[str]) -> "LabelledTexts":
        """Return the rows whose text has none of these keys, see `same_text_key`."""
        kept = [i for i, text in enumerate(self.texts) if same_text_key(text) not in keys]
        rows = Split(
            [self.rows.texts[i] for i in kept], self.rows.targets[kept], [self.rows.row_numbers[i] for i in kept]
        )
        return LabelledTexts(rows, [self.texts[i] for i in kept])


@dataclass
class CascadeRows:
    """`labels` are the order of the targets. `name` says where the rows to choose on are from. `test` may be empty.

    `notes` are sentences on the limits of the rows.
    """

    labels: list[str]
    name: str
    choosing: LabelledTexts
    test: LabelledTexts
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Trained:
    """The dataset of a model's job, split again as it was, its raw rows and the keys of what the model learned."""

    job: TrainingJob
    rows: Rows
    data: Dataset
    keys: set[str]

    def part(self, split: Split) -> LabelledTexts:
        texts = dict(zip(self.rows.row_numbers, self.rows.texts, strict=True))
        return LabelledTexts(replace(split, keys=[]), [texts[number] for number in split.row_numbers])


def job_of(session: Session, version: ModelVersion) -> TrainingJob | None:
    return jobs.find(session, version.job_id) if version.job_id is not None else None


def cascade_rows(
    settings: Settings,
    versions: tuple[ModelVersion, ModelVersion],
    jobs_of: tuple[TrainingJob | None, TrainingJob | None],
    file: str | None,
    names: dict[str, str] | None,
) -> CascadeRows:
    """Return the rows for a student and a teacher.

    The rows to choose on are those of `file`, else the validation rows of the teacher's job. `names` maps labels of the
    file to labels of the models. Rows to test on are the test rows of the teacher's job. Raises `BadRequest` when there
    are no rows, `BadDataset` when there are too few, and `BadConfig` for labels.
    """
    student, teacher = versions
    notes: list[str] = []
    learned = [_trained(settings, version, job, notes) for version, job in zip(versions, jobs_of, strict=True)]
    taught = learned[1]
    if file is None and names is not None:
        raise BadConfig("--labels names labels of a file; give the file with --rows, or leave it out")
    if file is None and taught is None:
        raise BadRequest(
            f"there are no validation rows of model {teacher.id}, the teacher: {notes[-1]}; give labelled rows that "
            "neither model was trained on with --rows FILE"
        )
    trained_on = set().union(*(found.keys for found in learned if found is not None))
    if file is not None:
        config = taught.job.config if taught else {}
        labels, name, given = _file_rows(file, teacher.labels, make_config("guide", **config), names)
    else:
        assert taught is not None  # noqa: S101 - raised above
        labels, name = taught.data.labels, f"the validation rows of job {taught.job.id}"
        given = taught.part(taught.data.valid)
    choosing = given.without(trained_on)
    if dropped := len(given) - len(choosing):
        notes.append(
            f"{dropped:,} of {len(given):,} rows are left out: model {student.id} or {teacher.id} learned them"
        )
    _check_enough(choosing, labels, name)
    test = LabelledTexts(Split([], np.zeros((0, len(labels)), np.float32), []), [])
    if taught is not None and taught.data.labels == labels:
        chosen_on = {same_text_key(text) for text in choosing.texts}
        test = taught.part(taught.data.test).without(trained_on | chosen_on)
    return CascadeRows(labels, name, choosing, test, notes)


def _trained(settings: Settings, version: ModelVersion, job: TrainingJob | None, notes: list[str]) -> Trained | None:
    """Return what a model was trained on; None, with a note, where that is not known."""
    if job is None:
        notes.append(f"what model {version.id} was trained on is not known, since no job trained it")
        return None
    config, context = make_config("guide", **job.config), training_context(settings)
    try:
        with fetched_dataset(job.dataset, job.dataset_sha256, context.input_store, context.read_roots) as path:
            rows = read_rows(path)
    except BadDataset as error:
        notes.append(f"what model {version.id} was trained on is not known ({error})")
        return None
    data = split_rows(rows, config)
    keys = set(data.train.keys)
    if (job.data_report or {}).get("sample_rows"):
        own = {key for part in (data.train, data.valid, data.test) for key in part.keys}
        keys |= {same_text_key(text) for text in read_rows(LABELLED).texts} - own
    return Trained(job, rows, data, keys)


def _file_rows(
    file: str, labels: Sequence[str], config: TrainConfig, names: dict[str, str] | None
) -> tuple[list[str], str, LabelledTexts]:
    with local_copy(file) as path:
        rows, name, digest = read_rows(path), path.name, file_sha256(path)
    read = evaluation_rows(rows, list(labels), config, names)
    texts = dict(zip(rows.row_numbers, rows.texts, strict=True))
    found = LabelledTexts(read.rows, [texts[number] for number in read.rows.row_numbers])
    return list(labels), f"{name} (sha256 {digest[:8]})", found


def _check_enough(choosing: LabelledTexts, labels: Sequence[str], name: str) -> None:
    absent = [label for label, rows in zip(labels, choosing.rows.targets.sum(axis=0), strict=True) if not rows]
    if len(choosing) < FEWEST_ROWS or absent:
        lacking = f", and none of the label {absent[0]}" if absent else ""
        raise BadDataset(
            f"{name}: {len(choosing)} rows that neither model learned{lacking}; a threshold needs at least "
            f"{FEWEST_ROWS}, of every label: give more with --rows FILE"
        )
