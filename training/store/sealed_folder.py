"""Sealed folders: written in full, listed in SHA256SUMS, then renamed into place. Models and checkpoints use them."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from training import failpoint
from training.errors import BadArtifact, CannotSave
from training.store.paths import file_sha256, sync_folder

SUMS = "SHA256SUMS"


@contextmanager
def new_sealed_folder(folder: Path) -> Iterator[Path]:
    """Provide a draft folder; seal it and rename it to `folder` when the block succeeds, else remove it.

    Raises `CannotSave` when a file cannot be written.
    """
    draft = folder.with_name(f".{folder.name}.draft")
    try:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        yield draft
        seal(draft, folder)
    except (OSError, SafetensorError, RuntimeError) as error:  # torch raises RuntimeError
        shutil.rmtree(draft, ignore_errors=True)
        raise CannotSave(
            f"{folder} could not be written ({str(error).splitlines()[0]}); free disk space, then resume from the "
            "newest checkpoint with `tweetscore jobs retry`"
        ) from error


def seal(draft: Path, folder: Path) -> str:
    """Write SHA256SUMS into `draft`, fsync, and rename it to `folder`. Returns the sha256 of SHA256SUMS."""
    failpoint.passing("draft", [folder.name])
    lines = [f"{file_sha256(path)}  {path.name}\n" for path in sorted(draft.iterdir()) if path.name != SUMS]
    (draft / SUMS).write_text("".join(lines), encoding="utf-8")
    digest = file_sha256(draft / SUMS)
    sync_folder(draft)
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(draft, folder)
    _sync_entry(folder.parent)
    return digest


def _sync_entry(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def verify(folder: Path, sha256: str | None = None) -> None:
    """Check every file against SHA256SUMS, and SHA256SUMS against `sha256`. Raises `BadArtifact` on a difference."""
    sums = folder / SUMS
    if not sums.is_file():
        raise BadArtifact(f"{folder} has no {SUMS}: it is incomplete or not an artifact; train or restore it")
    if sha256 is not None and file_sha256(sums) != sha256:
        raise BadArtifact(f"{folder} is not the artifact that was registered (sha256 differs); train or restore it")
    for digest, name in read_sums(folder):
        path = folder / name
        if not path.is_file() or file_sha256(path) != digest:
            raise BadArtifact(f"{path} is missing or damaged (sha256 differs); train or restore the model")


def read_sums(folder: Path) -> list[tuple[str, str]]:
    """Return (sha256, file name) for each line of SHA256SUMS. Raises `BadArtifact` for a name outside the folder."""
    rows = [line.partition("  ") for line in (folder / SUMS).read_bytes().decode(errors="replace").splitlines()]
    if any(not name or name in (".", "..") or "/" in name for _, _, name in rows):
        raise BadArtifact(f"{folder / SUMS} lists a name that is no file of its folder; train or restore the model")
    return [(digest, name) for digest, _, name in rows]
