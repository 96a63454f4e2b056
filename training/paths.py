"""Which files a name from outside may reach, and files that are whole or not there at all."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit

from training.errors import BadArtifact


def inside_roots(name: str, roots: Sequence[Path]) -> Path | None:
    """The real path behind `name` when it lies inside one of `roots`, symlinks and `..` resolved; else None."""
    try:
        path = Path(name).expanduser().resolve()
    except (ValueError, OSError, RuntimeError, TypeError):
        return None  # a NUL, a loop of links, an unknown user, no string at all
    return path if any(path.is_relative_to(root.expanduser().resolve()) for root in roots) else None


def real_path(name: str | Path) -> Path | None:
    """The path behind a name that anybody wrote, None when no file can have such a name."""
    try:
        return Path(name).expanduser().resolve()
    except (ValueError, OSError, RuntimeError):
        return None  # a NUL, a loop of links, an unknown user


def is_file(path: Path) -> bool:
    """Whether a file is there; a name too long for one names none."""
    try:
        return path.is_file()
    except OSError:
        return False


def is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:
        return False


def folder_of(url: str, store: Path) -> Path:
    """The folder of the model store behind a `file://` URL; raises `BadArtifact` for any other.

    The URL comes from a table, and what lies there is loaded: it must not lead elsewhere, by `..` or by a link.
    """
    parts = urlsplit(url)
    if parts.scheme != "file" or parts.netloc:
        raise BadArtifact(f"the model lies at {parts.scheme}://, which this machine does not read")
    folder = inside_roots(unquote(parts.path), [store])
    if folder is None:
        raise BadArtifact(
            f"the model lies outside the model store {store}; move it there, or set TWEETSCORE_MODEL_STORE"
        )
    return folder


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_folder(folder: Path) -> None:
    """Push every file below `folder`, and the folder itself, to the disk: a rename must not outrun its contents."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
