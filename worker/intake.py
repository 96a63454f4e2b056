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
from db.errors import TweetscoreError, plain, shown
from db.models import TrainingJob
from db.session import Database
from training.config import TrainConfig, make_config
from training.data import read_rows, split_rows
from training.encoders import check_hub_name, looks_local
from training.errors import BadDataset, ModelUnavailable
from training.inputs import store_base_model, store_dataset
from training.paths import file_sha256, is_file, is_folder, real_path
from training.sources import download
from training.storage import is_remote
from worker.inbox import Request
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
        dataset, sha256 = store_dataset(settings.inputs, path), file_sha256(path)
        with database.begin() as session:
            return jobs.submit(
                session,
                request_id=uuid.uuid4().hex,
                dataset=dataset,
                dataset_sha256=sha256,
                config=config.model_dump(mode="json"),
            )


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


def accept_request(
    settings: Settings, database: Database, request: Request, ended: tuple[str, str] | None = None
) -> TrainingJob:
    """The job of a message that asks for one, in one small transaction; a job that is there already stays as it is.

    Only what needs no file is looked at here: the job's route opens the dataset, and says what is wrong with it. A
    request that can be no job is one that failed, so that its sender finds the reason where all jobs are. `ended` as
    `jobs.submit` takes it. Raises SQLAlchemy's errors while the database does not answer.
    """
    given, dataset, config = request.arguments, "", {}
    try:
        dataset = _storable_name(given.pop("dataset", None))
        config = given
        config = job_config(settings, given.pop("preset", None), given).model_dump(mode="json")
    except TweetscoreError as error:
        ended = ended or ("failed", str(error))
    with database.begin() as session:
        return jobs.submit(
            session,
            request_id=request.id,
            dataset=dataset or shown(request.arguments.get("dataset")),
            dataset_sha256=None,
            config=_storable(config),
            message=request.kept,
            ended=ended,
        )


def _storable_name(dataset: object) -> str:
    """A dataset's name as it came; raises `BadDataset` for what no database stores."""
    name = str(dataset)
    try:
        name.encode("utf-8")
    except UnicodeError as error:
        raise BadDataset(f"dataset {shown(name)} is no name of a file: it is no text") from error
    if "\x00" in name:
        raise BadDataset(f"dataset {shown(name)} is no name of a file: it holds a NUL character")
    return name


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
    return store_base_model(inputs, folder)
