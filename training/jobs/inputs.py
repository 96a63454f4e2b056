"""Inputs of a job: copy its dataset and local base model into the input store, and fetch them for training."""

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from db.errors import plain
from training.data.dataset import find_dataset
from training.data.table_file import ending_of
from training.errors import BadArtifact, BadDataset, ModelUnavailable
from training.model.base_model import BaseModelFolder, resolve_base_model
from training.store.paths import file_sha256
from training.store.sealed_folder import seal
from training.store.store import Store, is_remote

BASE_MODEL_FILES = ("*.json", "*.txt", "*.model", "*.safetensors", "pytorch_model*.bin")
DIGEST_CHARS = 16
BASE_MODELS_FOLDER = "encoders"


def save_dataset(store: Store, path: Path) -> str:
    """Copy a dataset into the store, named by its digest. Returns the path or URL to put into the job."""
    name = f"{file_sha256(path)[:DIGEST_CHARS]}{ending_of(path)}"
    if store.remote is not None:
        store.remote.upload_file(path, name)
        return store.url_of(name)
    target = store.folder / name
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = target.with_name(f".{name}.{os.getpid()}")
        shutil.copyfile(path, draft)
        draft.rename(target)
    return str(target)


@contextmanager
def fetched_dataset(name: str, sha256: str | None, store: Store, roots: Sequence[Path]) -> Iterator[Path]:
    """Provide a job's dataset as a local file until the block ends.

    Raises `BadDataset` when it is neither in the store nor below `roots`, or its sha256 is not that of the submitted
    file, and `StoreUnavailable`.
    """
    if store.remote is not None and sha256 is not None and is_remote(name):
        with ExitStack() as held:
            try:
                path = held.enter_context(store.fetched_file(name, sha256))
            except BadArtifact as error:
                raise BadDataset(str(error)) from error
            yield path
            return
    path = find_dataset(name, roots)
    if sha256 is not None and file_sha256(path) != sha256:
        raise BadDataset(f"dataset {plain(name)} changed after the job was submitted; submit it again")
    yield path


def save_base_model(store: Store, folder: Path) -> str:
    """Copy a local base model into the store, named by its digest. Returns the path or URL to put into the job."""
    place = None if store.remote else store.folder / BASE_MODELS_FOLDER
    if place is not None:  # the draft is on the same file system, so the last step is a rename instead of a copy
        place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".tweetscore-", dir=place) as drafts:
        draft, sealed = Path(drafts) / "draft", Path(drafts) / folder.name
        draft.mkdir()
        for path in {path for pattern in BASE_MODEL_FILES for path in folder.glob(pattern)}:
            shutil.copyfile(path, draft / path.name)
        name = f"{BASE_MODELS_FOLDER}/{folder.name}-{seal(draft, sealed)}"
        if store.remote is not None:
            if not store.remote.has(name):
                store.remote.upload(sealed, name)
            return store.url_of(name)
        if not (store.folder / name).exists():
            sealed.rename(store.folder / name)
    return str(store.folder / name)


@contextmanager
def fetched_base_model(
    name: str, revision: str | None, store: Store, roots: Sequence[Path]
) -> Iterator[BaseModelFolder]:
    """Provide a job's base model as a local folder until the block ends.

    Raises `ModelUnavailable`, and `StoreUnavailable` when the store does not answer.
    """
    if store.remote is None or not is_remote(name):
        yield resolve_base_model(name, revision, roots)
        return
    with ExitStack() as held:
        try:  # only around the fetch: a `BadArtifact` raised inside the caller's block is not about the base model
            folder = held.enter_context(store.fetched(name, name.rpartition("-")[2]))
        except BadArtifact as error:
            raise ModelUnavailable(f"base model: {error}") from error
        yield BaseModelFolder(name, folder)
