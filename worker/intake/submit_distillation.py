"""Enqueue jobs that train a student on the probabilities of a teacher."""

from typing import Any

from db import jobs, registry
from db.models import TrainingJob
from db.session import Database
from training.jobs.inputs import fetched_dataset
from worker.connections import training_context
from worker.errors import BadRequest
from worker.intake.submit_job import submit_training
from worker.settings import Settings

# Fields of the teacher's job on which the split depends, or how labels and texts are read.
FROM_TEACHER = ("task", "labels", "polarity", "cleaner", "split", "train_size", "valid_size", "seed")


def submit_distillation(
    settings: Settings,
    database: Database,
    teacher: int,
    dataset: str | None = None,
    preset: str | None = None,
    /,
    **options: Any,
) -> TrainingJob:
    """Enqueue a training job whose teacher is a model version. Without `dataset`, it gets that of the teacher's job.

    The fields of `FROM_TEACHER` are those of the teacher's job unless `options` has them, for another dataset without
    `labels`. With the same dataset the test rows are then those of the teacher, which it was not trained on.

    Raises `NotFound` without such a model, `BadRequest` when it needs a dataset, and what `submit_training` raises.
    """
    with database.read() as session:
        version = registry.usable(session, teacher)
        job = jobs.find(session, version.job_id) if version.job_id is not None else None
    taught = {name: job.config[name] for name in FROM_TEACHER if name in job.config} if job is not None else {}
    if dataset is not None:
        taught.pop("labels", None)
        return submit_training(settings, database, dataset, preset, **{**taught, "teacher": teacher, **options})
    if job is None:
        raise BadRequest(f"model {teacher} was not trained by a job; name labelled rows with --dataset")
    context = training_context(settings)
    with fetched_dataset(job.dataset, job.dataset_sha256, context.input_store, context.read_roots) as path:
        options = {**taught, "teacher": teacher, **options}
        return submit_training(settings, database, path, preset, labels_until=job.labels_until, **options)
