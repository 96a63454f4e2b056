"""What a job is made from, wherever it was put: its dataset and, if that is no hub's, its base model."""

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from db.errors import plain
from training.dataset import find_dataset
from training.encoders import Encoder, resolve_encoder
from training.errors import BadArtifact, BadDataset, ModelUnavailable
from training.paths import file_sha256
from training.sealed import seal
from training.storage import Store, is_remote
from training.table_file import ending_of

ENCODER_FILES = ("*.json", "*.txt", "*.model", "*.safetensors", "pytorch_model*.bin")
DIGEST_CHARS = 16
ENCODERS = "encoders"


def keep_dataset(store: Store, path: Path) -> str:
    """A copy of a dataset in the store, under its digest. Returns the path or URL a job names it by."""
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
def dataset_at_hand(name: str, sha256: str | None, store: Store, roots: Sequence[Path]) -> Iterator[Path]:
    """The dataset of a job, as a file of this machine.

    Raises `BadDataset` when it lies neither in the store nor below `roots`, or is not the one that was submitted.
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


def keep_encoder(store: Store, folder: Path) -> str:
    """A copy of a local base model in the store, under its digest. Returns the path or URL a job names it by."""
    place = None if store.remote else store.folder / ENCODERS
    if place is not None:  # drafted beside its place, so that it is copied once
        place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".tweetscore-", dir=place) as drafts:
        draft, sealed = Path(drafts) / "draft", Path(drafts) / folder.name
        draft.mkdir()
        for path in {path for pattern in ENCODER_FILES for path in folder.glob(pattern)}:
            shutil.copyfile(path, draft / path.name)
        name = f"{ENCODERS}/{folder.name}-{seal(draft, sealed)}"
        if store.remote is not None:
            if not store.remote.has(name):
                store.remote.upload(sealed, name)
            return store.url_of(name)
        if not (store.folder / name).exists():
            sealed.rename(store.folder / name)
    return str(store.folder / name)


@contextmanager
def encoder_at_hand(name: str, revision: str | None, store: Store, roots: Sequence[Path]) -> Iterator[Encoder]:
    """The base model of a job on this machine's disk. Raises `ModelUnavailable`, or `StoreAway` when its store does
    not answer."""
    if store.remote is None or not is_remote(name):
        yield resolve_encoder(name, revision, roots)
        return
    with ExitStack() as held:
        try:  # of the fetch alone: a damaged checkpoint, met while the encoder is held, is none of its faults
            folder = held.enter_context(store.fetched(name, name.rpartition("-")[2]))
        except BadArtifact as error:
            raise ModelUnavailable(f"base model: {error}") from error
        yield Encoder(name, folder)
