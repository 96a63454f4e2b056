"""Validate and enqueue training jobs.

Submitting copies the dataset into the dataset store under its digest, so a job does not depend on a file that may
change.
"""

import json
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from db import jobs, predictions, registry
from db.errors import TweetscoreError, plain, shown
from db.models import TrainingJob, utc_now
from db.session import Database
from training.config import AdaptConfig, TrainConfig, make_adapt_config, make_config
from training.data.dataset import read_rows, split_rows
from training.data.table_file import download
from training.errors import BadDataset, ModelUnavailable
from training.jobs.inputs import save_base_model, save_dataset
from training.jobs.stored_tweets import FEWEST_TEXTS, LANGUAGE, require_texts
from training.jobs.unlabelled.teacher import find_teacher
from training.model.base_model import adapted_id, check_dictionary, check_hub_name, looks_local
from training.store.paths import file_sha256, is_file, is_folder, real_path
from training.store.store import is_remote
from worker.app import TRAINING, client_app, nudge
from worker.connections import input_store, open_sql
from worker.intake.request_queue import ADAPT, Request
from worker.settings import Settings, load_settings

# The dataset of jobs that adapt a base model.
STORED_TWEETS = "stored tweets"


def submit_training(
    settings: Settings,
    database: Database,
    dataset: str | Path,
    preset: str | None = None,
    /,
    *,
    labels_until: datetime | None = None,
    **options: Any,
) -> TrainingJob:
    """Enqueue a job on any dataset and base model that this process can read. A URL is downloaded first.

    `options` are fields of `TrainConfig`. `labels_until` is set when labels of stored tweets, given until then, are
    among the rows. Raises `BadConfig`, `BadDataset`, `BadSource` or `ModelUnavailable`, and stores nothing, when the
    job cannot succeed.
    """
    with local_copy(str(dataset)) as path:
        config = job_config(settings, preset, options)
        rows = split_rows(read_rows(path), config)  # raises if it cannot be split, before a worker loads a model
        if config.teacher is not None:
            with database.read() as session:
                find_teacher(session, config.teacher, rows.labels)
        config = config.model_copy(update={"base_model": usable_base_model(settings, database, config.base_model)})
        dataset, sha256 = save_dataset(input_store(settings), path), file_sha256(path)
        with database.begin() as session:
            return jobs.submit(
                session,
                request_id=uuid.uuid4().hex,
                dataset=dataset,
                dataset_sha256=sha256,
                config=config.model_dump(mode="json"),
                data_report=rows.report,
                labels_until=labels_until,
            )


def submit_adapt(settings: Settings, database: Database, **options: Any) -> TrainingJob:
    """Enqueue a job that adapts a base model to the tweets that are stored now. `options` are fields of `AdaptConfig`.

    Raises `BadConfig`, `BadDataset`, `NotFound` or `ModelUnavailable`, and stores nothing, when the job cannot succeed.
    """
    config = adapt_config(settings, options)
    with database.read() as session:
        require_texts(len(predictions.newest_texts(session, LANGUAGE, utc_now(), None, FEWEST_TEXTS)))
    config = config.model_copy(update={"base_model": usable_base_model(settings, database, config.base_model)})
    with database.begin() as session:
        return jobs.submit(
            session,
            request_id=uuid.uuid4().hex,
            kind="adapt",
            dataset=STORED_TWEETS,
            dataset_sha256=None,
            config=config.model_dump(mode="json"),
        )


def submit_and_nudge(dataset: str, preset: str | None = None, **options: Any) -> int:
    """Queue a job with the settings of the environment, nudge a training worker and return the job's id."""
    settings = load_settings()
    database = open_sql(settings)
    try:
        job = submit_training(settings, database, dataset, preset, **options)
    finally:
        database.close()
    nudge(client_app(settings), TRAINING)
    return job.id


@contextmanager
def local_copy(dataset: str) -> Iterator[Path]:
    """Provide a dataset as a local file until the block ends; a URL is downloaded.

    Raises `BadDataset` for a name that cannot be a path, and `BadSource` when the download fails.
    """
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


def accept_request(
    settings: Settings, database: Database, request: Request, ended: tuple[str, str] | None = None
) -> TrainingJob:
    """Store the job that a Celery message requests, in one transaction. An existing job of the request is unchanged.

    Validates only what needs no file; the worker that runs the job validates the dataset. An invalid request is stored
    as a failed job, so that its sender can read the reason. `ended` is passed to `jobs.submit`. Raises SQLAlchemy's
    errors while the database does not answer.
    """
    given, dataset, config = request.arguments, "", {}
    adapts = request.task == ADAPT
    try:
        dataset = STORED_TWEETS if adapts else _storable_name(given.pop("dataset", None))
        config = given
        if adapts:
            config = adapt_config(settings, given).model_dump(mode="json")
        else:
            config = job_config(settings, given.pop("preset", None), given).model_dump(mode="json")
    except TweetscoreError as error:
        ended = ended or ("failed", str(error))
    with database.begin() as session:
        return jobs.submit(
            session,
            request_id=request.id,
            kind="adapt" if adapts else "train",
            dataset=dataset or shown(request.arguments.get("dataset")),
            dataset_sha256=None,
            config=_storable(config),
            message=request.message,
            ended=ended,
        )


def _storable_name(dataset: object) -> str:
    """Return the dataset's name unchanged; raises `BadDataset` when a database cannot store it."""
    name = str(dataset)
    try:
        name.encode("utf-8")
    except UnicodeError as error:
        raise BadDataset(f"dataset {shown(name)} is not a file name: it is not valid UTF-8") from error
    if "\x00" in name:
        raise BadDataset(f"dataset {shown(name)} is not a file name: it contains a NUL character")
    return name


def _storable(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options unchanged or, when a database cannot store them as JSON, a printable form."""
    try:
        written = json.dumps(options, ensure_ascii=False, allow_nan=False)
        written.encode("utf-8")
    except (ValueError, TypeError, RecursionError):
        return {"refused": shown(options)}
    return {"refused": shown(options)} if "\\u0000" in written else options


def job_config(settings: Settings, preset: str | None, options: dict[str, Any]) -> TrainConfig:
    return make_config(preset or settings.preset, **{"base_model": settings.base_model, **options})


def adapt_config(settings: Settings, options: dict[str, Any]) -> AdaptConfig:
    return make_adapt_config(**{"base_model": settings.base_model, **options})


def usable_base_model(settings: Settings, database: Database, name: str) -> str:
    """Like `prepare_base_model`, also for `adapted:ID`; raises `NotFound` when this database has no such base model."""
    adapted = adapted_id(name)
    if adapted is None:
        return prepare_base_model(settings, name)
    with database.read() as session:
        registry.base_model(session, adapted)
    return name


def prepare_base_model(settings: Settings, name: str) -> str:
    """Copy a local base model into the store under its digest and return its new name. Other names are unchanged."""
    inputs, folder = input_store(settings), real_path(name)
    if is_remote(name) and inputs.remote is not None:
        inputs.remote.name_of(name)
        return name
    if not looks_local(name) and (folder is None or not is_folder(folder)):
        check_hub_name(name)
        if settings.embedded:
            check_dictionary(name)
        return name
    if folder is None or not is_file(folder / "config.json"):
        raise ModelUnavailable(f"base model folder {shown(name)} has no config.json; save a model there first")
    if settings.embedded:  # workers elsewhere may have packages that this process lacks
        check_dictionary(name, folder)
    return save_base_model(inputs, folder)
