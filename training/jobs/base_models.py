"""Base models of jobs: fetch one by its name, and store and register one that a job has adapted.

A name is the starter, a hub repository, a folder or URL, or `adapted:ID` for an adapted base model of this database.
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from db import jobs, registry
from db.models import BaseModel
from db.session import Database
from training.errors import CannotSave
from training.jobs.context import TrainingContext
from training.jobs.inputs import fetched_base_model, save_base_model
from training.jobs.lease import Lease
from training.model.base_model import BaseModelFolder, adapted_id, current_hub_name
from training.store.store import Store


@contextmanager
def fetch_base_model(
    database: Database, context: TrainingContext, name: str, revision: str | None, lease: Lease
) -> Iterator[BaseModelFolder]:
    """Provide a base model until the block ends. An adapted one keeps its name `adapted:ID`.

    A hub repository is taken at `revision`, else at the one that earlier models of this database used. Raises
    `NotFound`, and what `fetched_base_model` raises.
    """
    adapted = adapted_id(name)

    def place_and_revision() -> tuple[str, str | None]:
        with database.read() as session:
            if adapted is not None:
                return registry.base_model(session, adapted).url, None
            return name, revision or registry.revision_used(session, current_hub_name(name))

    place, used = lease.retry_while_database_away(place_and_revision)
    with fetched_base_model(place, used, context.input_store, context.read_roots) as base:
        yield base if adapted is None else BaseModelFolder(name, base.folder)


def store_adapted(store: Store, job_id: int, write: Callable[[Path], None]) -> str:
    """Store the folder that `write(path)` fills, like the base models of users. Returns its path or URL.

    It is named by the digest of its files. So a job that is run again finds it, and a folder that is stored but never
    registered, because the worker was killed in between, is not removed: another start of the job may have registered
    the same one. Raises `CannotSave` and `StoreUnavailable`.
    """
    try:
        with tempfile.TemporaryDirectory(prefix="tweetscore-") as drafts:
            folder = Path(drafts) / f"adapted-{job_id}"
            folder.mkdir()
            write(folder)
            return save_base_model(store, folder)
    except OSError as error:
        raise CannotSave(
            f"the adapted base model of job {job_id} could not be written ({error}); free disk space, then resume it "
            f"with `tweetscore jobs retry {job_id}`"
        ) from error


def register_adapted(database: Database, row: BaseModel, token: int, lease: Lease) -> int:
    """Insert the row of an adapted base model and finish its job, in one transaction. Returns the row's id.

    Raises `LeaseLost` when another worker has claimed the job.
    """
    in_doubt = False

    def commit() -> int:
        nonlocal in_doubt
        with database.begin() as session:
            if in_doubt:  # a commit was sent without an answer
                jobs.lock(session, row.job_id)  # fails while the earlier commit may still be running
                existing = registry.base_model_of_job(session, row.job_id)
                if existing is not None and existing.url == row.url:
                    return existing.id
                in_doubt = False
            jobs.finish(session, row.job_id, token, "succeeded")
            added = session.merge(row)
            session.flush()
            in_doubt = True
        return added.id

    return lease.retry_while_database_away(commit)
