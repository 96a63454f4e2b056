"""The doors: training jobs and tweets from the command line, from Python, and from a plain Celery client.

A job never depends on a file that may change: submitting takes a copy, named by its digest, into the dataset store.
"""

import json
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from db import jobs
from db.errors import plain, shown
from db.models import TrainingJob, utc_now
from db.session import Database
from training.config import TrainConfig, make_config
from training.data import find_dataset, read_rows, split_rows
from training.encoders import check_hub_name, looks_local
from training.errors import BadDataset, ModelUnavailable
from training.inputs import keep_dataset, keep_encoder
from training.paths import file_sha256, is_file, is_folder, real_path
from training.sources import download
from training.storage import is_remote
from worker.settings import Settings


def submit_training(
    settings: Settings, database: Database, dataset: str | Path, preset: str | None = None, /, **options: Any
) -> TrainingJob:
    """Queue a job on any dataset and base model this process can read.

    A URL is fetched first. Raises `BadConfig`, `BadDataset`, `BadSource` or `ModelUnavailable`, and leaves nothing
    behind, when the job could only fail.
    """
    with _at_hand(str(dataset)) as path:
        config = job_config(settings, preset, options)
        split_rows(read_rows(path), config)  # what cannot be split is refused before a worker loads a model for it
        config = config.model_copy(update={"base_model": take_encoder(settings, config.base_model)})
        dataset, sha256 = keep_dataset(settings.inputs, path), file_sha256(path)
        return _queue(database, dataset, sha256, config, uuid.uuid4().hex)


@contextmanager
def _at_hand(dataset: str) -> Iterator[Path]:
    if "://" in dataset:
        with tempfile.TemporaryDirectory(prefix="tweetscore-") as folder:
            fetched = Path(folder) / (Path(urlsplit(dataset).path).name or "dataset")
            download(dataset, fetched)
            yield fetched
        return
    path = real_path(dataset)
    if path is None:
        raise BadDataset(
            f"there is no file {plain(dataset)}; name a CSV, TSV, JSONL or Parquet file with labels and texts"
        )
    yield path


def submit_job(
    settings: Settings, database: Database, dataset: str, preset: str | None, options: dict[str, Any], request_id: str
) -> TrainingJob:
    """Queue a job for somebody who only sent a message: its dataset must lie where the worker may read.

    Raises `BadConfig` or `BadDataset` before anything is written.
    """
    config = job_config(settings, preset, options)
    path = find_dataset(dataset, settings.workshop().read_roots)
    split_rows(read_rows(path), config)
    return _queue(database, str(path), file_sha256(path), config, request_id)


def _queue(database: Database, dataset: str, sha256: str, config: TrainConfig, request_id: str) -> TrainingJob:
    with database.begin() as session:
        return jobs.submit(
            session,
            request_id=request_id,
            dataset=dataset,
            dataset_sha256=sha256,
            config=config.model_dump(mode="json"),
        )


def record_refusal(
    database: Database, dataset: str, options: dict[str, Any], reason: str, request_id: str
) -> TrainingJob:
    """A job that failed before it was one, so that its sender finds the reason where all jobs are."""
    with database.begin() as session:
        job = jobs.submit(
            session,
            request_id=request_id,
            dataset=dataset if dataset.isprintable() else shown(dataset),
            dataset_sha256=None,
            config=_storable(options),
        )
        if job.state == "queued":
            job.state, job.error, job.finished_at = "failed", reason, utc_now()
        return job


def _storable(options: dict[str, Any]) -> dict[str, Any]:
    """The options as they came, or, where no database takes them as JSON, what can be shown of them."""
    try:
        written = json.dumps(options, ensure_ascii=False, allow_nan=False)
        written.encode("utf-8")
    except (ValueError, TypeError, RecursionError):
        return {"refused": shown(options)}
    return {"refused": shown(options)} if "\\u0000" in written else options


def job_config(settings: Settings, preset: str | None, options: dict[str, Any]) -> TrainConfig:
    return make_config(preset or settings.preset, **{"base_model": settings.base_model, **options})


def take_encoder(settings: Settings, name: str) -> str:
    """A local base model copied into the store under its digest; any other name as it is."""
    inputs, folder = settings.inputs, real_path(name)
    if is_remote(name) and inputs.remote is not None:
        inputs.remote.name_of(name)
        return name
    if not looks_local(name) and (folder is None or not is_folder(folder)):
        check_hub_name(name)
        return name
    if folder is None or not is_file(folder / "config.json"):
        raise ModelUnavailable(f"base model folder {shown(name)} has no config.json; save a model there first")
    return keep_encoder(inputs, folder)
