"""Path checks for names from untrusted input, file digests, and fsync."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit

from training.errors import BadArtifact


def inside_roots(name: str, roots: Sequence[Path]) -> Path | None:
    """Return the path of `name`, with symlinks and `..` resolved, when it is inside one of `roots`; else None."""
    try:
        path = Path(name).expanduser().resolve()
    except (ValueError, OSError, RuntimeError, TypeError):
        return None  # a NUL, a symlink loop, an unknown ~user, not a string
    return path if any(path.is_relative_to(root.expanduser().resolve()) for root in roots) else None


def real_path(name: str | Path) -> Path | None:
    """Return the resolved path of an untrusted name, or None when it cannot be a path."""
    try:
        return Path(name).expanduser().resolve()
    except (ValueError, OSError, RuntimeError):
        return None  # a NUL, a symlink loop, an unknown ~user


def is_file(path: Path) -> bool:
    """Return whether a file exists; False for a name that is too long."""
    try:
        return path.is_file()
    except OSError:
        return False


def is_folder(path: Path) -> bool:
    """Return whether a folder exists; False for a name that is too long."""
    try:
        return path.is_dir()
    except OSError:
        return False


def folder_from_url(url: str, store: Path) -> Path:
    """Return the folder that a `file://` URL names inside the local model store.

    Raises `BadArtifact` for other schemes and for paths outside the store, through `..` or a symlink: URLs come from a
    database table and their contents are loaded.
    """
    parts = urlsplit(url)
    if parts.scheme != "file" or parts.netloc:
        raise BadArtifact(
            f"the model is at {parts.scheme}://, which is not this worker's store; set TWEETSCORE_MODEL_STORE to it"
        )
    folder = inside_roots(unquote(parts.path), [store])
    if folder is None:
        raise BadArtifact(
            f"the model lies outside the model store {store}; move it there, or set TWEETSCORE_MODEL_STORE"
        )
    return folder


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file as 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_folder(folder: Path) -> None:
    """Fsync every file below `folder` and the folder itself, so that a rename cannot reach the disk before them."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
