"""Sealed folders: every file with its digest, whole or not there at all. Models and checkpoints are such."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from training import failpoint
from training.errors import BadArtifact, CannotSave
from training.paths import file_sha256, sync_folder

SUMS = "SHA256SUMS"


@contextmanager
def drafted(folder: Path) -> Iterator[Path]:
    """A folder to write to, which becomes `folder` when all went well and is gone when not.

    Raises `CannotSave` when something could not be written.
    """
    draft = folder.with_name(f".{folder.name}.draft")
    try:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        yield draft
        seal(draft, folder)
    except (OSError, SafetensorError, RuntimeError) as error:  # the last is torch's
        shutil.rmtree(draft, ignore_errors=True)
        raise CannotSave(
            f"{folder} could not be written ({str(error).splitlines()[0]}); make room for it, then "
            "`tweetscore jobs retry` goes on from the newest checkpoint"
        ) from error


def seal(draft: Path, folder: Path) -> str:
    """Digest every file of `draft`, push all to the disk, rename it to `folder`. Returns the digest of the digests."""
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
    """Raises `BadArtifact` unless every file is there with its digest, and all of them have this one."""
    sums = folder / SUMS
    if not sums.is_file():
        raise BadArtifact(f"{folder} has no {SUMS}; it was never finished or is no artifact")
    if sha256 is not None and file_sha256(sums) != sha256:
        raise BadArtifact(f"{folder} is not the artifact that was registered (sha256 differs); train or restore it")
    for digest, name in read_sums(folder):
        path = folder / name
        if not path.is_file() or file_sha256(path) != digest:
            raise BadArtifact(f"{path} is missing or damaged (sha256 differs); train or restore the model")


def read_sums(folder: Path) -> list[tuple[str, str]]:
    """(digest, file name) of everything in a sealed folder; raises `BadArtifact` for a name that leads out of it."""
    rows = [line.partition("  ") for line in (folder / SUMS).read_bytes().decode(errors="replace").splitlines()]
    if any(not name or name in (".", "..") or "/" in name for _, _, name in rows):
        raise BadArtifact(f"{folder / SUMS} names what is no file of its folder; train or restore the model")
    return [(digest, name) for digest, _, name in rows]
