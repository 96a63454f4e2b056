"""Storage of models, datasets and checkpoints: a local folder, or any URL that fsspec opens.

Folders are sealed (see `sealed_folder.py`). SHA256SUMS is uploaded last, so a partial upload does not count as a
folder. Downloads are verified against their digests before they enter the local cache (see `cache.py`).
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from shutil import rmtree
from typing import Any
from urllib.parse import unquote, urlsplit

from fsspec.core import url_to_fs

from db.errors import TweetscoreError, plain, public_url
from training.errors import BadArtifact, StoreUnavailable
from training.store.cache import Cache
from training.store.paths import file_sha256, folder_from_url
from training.store.sealed_folder import SUMS, read_sums, verify


class Store:
    """Named folders and files below a local folder or a URL.

    `folder` is the local folder: the store itself, or the cache of a remote store.
    """

    def __init__(self, url: str | Path, cache: Cache) -> None:
        text = str(url).rstrip("/") or "/"
        self.remote = RemoteStore(text) if is_remote(text) else None
        self.folder = cache.folder if self.remote else local_path(text)
        self._cache = cache

    def __str__(self) -> str:
        return public_url(self.remote.url) if self.remote else str(self.folder)

    def url_of(self, name: str) -> str:
        return f"{self.remote.url}/{name}" if self.remote else (self.folder / name).absolute().as_uri()

    def place(self, url: str, sha256: str) -> Path:
        """Return the local path of a stored folder. In a remote store it exists only after `fetched`.

        Raises `BadArtifact` when the URL points outside the store. URLs come from a database table and their contents
        are loaded, so they must not lead elsewhere.
        """
        if self.remote is None:
            return folder_from_url(url, self.folder)
        self.remote.name_of(url)
        return self.folder / sha256

    @contextmanager
    def fetched(self, url: str, sha256: str) -> Iterator[Path]:
        """Provide a stored folder as a local folder until the block ends; remote folders are downloaded first.

        Raises `BadArtifact` when the remote folder is missing or its digest differs, and `StoreUnavailable` when the
        store does not answer.
        """
        place, remote = self.place(url, sha256), self.remote
        if remote is None:
            yield place
            return
        name = remote.name_of(url)
        with self._cache.entry(
            sha256,
            size=lambda: remote.size(name),
            fill=lambda draft: remote.download(name, draft, sha256),
            check=lambda copy: verify(copy, sha256),
        ) as place:
            yield place

    def publish(self, name: str, write: Callable[[Path], str]) -> str:
        """Store the sealed folder that `write(path)` creates under `name`.

        `write` returns the folder's sha256, which is returned here. Raises `StoreUnavailable`, and any error of
        `write`.
        """
        if self.remote is None:
            return write(self.folder / name)
        with self._cache.outgoing(name) as folder:
            sha256 = write(folder)
            self.remote.upload(folder, name)
            self._cache.adopt(folder, sha256)
        return sha256

    def names(self, prefix: str) -> list[str]:
        """Return the names that begin with `prefix`, including unfinished folders and drafts."""
        if self.remote is None:
            return [path.name for pattern in (f"{prefix}*", f".{prefix}*.draft") for path in self.folder.glob(pattern)]
        return [name for name in self.remote.names(whole=False) if name.startswith(prefix)]

    def remove(self, url: str, sha256: str) -> None:
        """Remove a folder and the engines stored next to it. A missing folder is not an error.

        Raises `BadArtifact` when the URL names the store itself, and `StoreUnavailable`.
        """
        place = self.place(url, sha256)
        if place == self.folder.resolve():
            raise BadArtifact(
                "the model's URL is the model store itself, which holds other models; correct its artifact_url"
            )
        for path in (place, place.with_name(f"{place.name}.engines")):
            rmtree(path, ignore_errors=True)
        if self.remote is not None:
            self.remote.remove(self.remote.name_of(url))

    def remove_named(self, name: str) -> None:
        """Remove the folder `name`. A missing folder is not an error."""
        if self.remote is None:
            rmtree(self.folder / name, ignore_errors=True)
        else:
            self.remote.remove(name)

    @contextmanager
    def fetched_file(self, url: str, sha256: str) -> Iterator[Path]:
        """Like `fetched`, for a single file of a remote store."""
        assert self.remote is not None  # noqa: S101 - local files need no download
        remote, name = self.remote, self.remote.name_of(url)

        def check(copy: Path) -> None:
            if not (copy / name).is_file() or file_sha256(copy / name) != sha256:
                raise BadArtifact(f"{name} is missing or damaged (sha256 differs); submit it again")

        with self._cache.entry(
            sha256, lambda: remote.size(name), lambda draft: remote.download_file(name, draft / name), check
        ) as folder:
            yield folder / name


class RemoteStore:
    """Sealed folders and files below a URL. Errors of the storage backend are raised as `StoreUnavailable`."""

    def __init__(self, url: str) -> None:
        self.url = url

    @cached_property
    def _opened(self) -> tuple[Any, str]:
        with self._converting_errors():
            fs, root = url_to_fs(self.url)
            return fs, root.rstrip("/")

    def name_of(self, url: str) -> str:
        """Return the name that a URL has in this store. Raises `BadArtifact` when the URL lies outside the store."""
        name = url.removeprefix(f"{self.url}/")
        if name == url or any(part in ("", ".", "..") for part in name.split("/")):
            raise BadArtifact(
                f"{plain(public_url(url))} lies outside {public_url(self.url)}; move it there, or set "
                "TWEETSCORE_MODEL_STORE or TWEETSCORE_DATASET_STORE"
            )
        return name

    def names(self, whole: bool = True) -> list[str]:
        """Return the sorted names of folders; with `whole`, only complete ones (those with SHA256SUMS)."""
        fs, root = self._opened
        with self._converting_errors():
            fs.invalidate_cache()
            if not fs.exists(root):
                return []
            found = fs.glob(f"{root}/*/{SUMS}") if whole else fs.glob(f"{root}/*/*")
        return sorted({path.removeprefix(f"{root}/").split("/")[0] for path in found})

    def has(self, name: str) -> bool:
        """Return whether a complete sealed folder exists."""
        fs, root = self._opened
        with self._converting_errors():
            fs.invalidate_cache()
            return bool(fs.exists(f"{root}/{name}/{SUMS}"))

    def size(self, name: str) -> int:
        """Return the size of a folder or file in bytes."""
        fs, root = self._opened
        with self._converting_errors():
            fs.invalidate_cache()
            return sum(entry["size"] or 0 for entry in fs.find(f"{root}/{name}", detail=True).values())

    def upload(self, folder: Path, name: str) -> None:
        """Upload a sealed folder, SHA256SUMS last."""
        last = folder / SUMS
        for path in [*(path for path in sorted(folder.iterdir()) if path != last), last]:
            self.upload_file(path, f"{name}/{path.name}")

    def upload_file(self, path: Path, name: str) -> None:
        fs, root = self._opened
        with self._converting_errors():
            try:
                fs.put_file(str(path), f"{root}/{name}")
            except FileNotFoundError as error:  # raised by storage with real folders
                if not fs.exists(root):
                    raise StoreUnavailable(
                        f"{public_url(self.url)} does not exist; create it, then try again"
                    ) from error
                fs.makedirs(f"{root}/{name}".rpartition("/")[0], exist_ok=True)
                fs.put_file(str(path), f"{root}/{name}")

    def download(self, name: str, target: Path, sha256: str | None = None) -> None:
        """Download a sealed folder into `target`. Files that an earlier attempt downloaded completely are kept.

        Raises `BadArtifact` when the folder is missing or its digest is not `sha256`.
        """
        fs, root = self._opened
        with self._converting_errors(name):
            sums = fs.cat_file(f"{root}/{name}/{SUMS}")
        if sha256 is not None and hashlib.sha256(sums).hexdigest() != sha256:
            raise BadArtifact(f"{name} is not the artifact that was registered (sha256 differs); train or restore it")
        target.mkdir(parents=True, exist_ok=True)
        (target / SUMS).write_bytes(sums)
        for digest, file in read_sums(target):
            if not (target / file).is_file() or file_sha256(target / file) != digest:
                self.download_file(f"{name}/{file}", target / file)

    def download_file(self, name: str, target: Path) -> None:
        fs, root = self._opened
        target.parent.mkdir(parents=True, exist_ok=True)
        with self._converting_errors(name):
            fs.get_file(f"{root}/{name}", str(target))

    def remove(self, name: str) -> None:
        """Remove a folder, or everything when `name` is empty.

        SHA256SUMS is removed first, so a partly removed folder does not count as complete.
        """
        fs, root = self._opened
        place = f"{root}/{name}".rstrip("/")
        with self._converting_errors():
            fs.invalidate_cache()
            for path in (f"{place}/{SUMS}", place):
                try:
                    fs.rm(path, recursive=True)
                except FileNotFoundError:
                    continue

    @contextmanager
    def _converting_errors(self, name: str | None = None) -> Iterator[None]:
        """Convert backend errors to `StoreUnavailable`. With `name`, a missing file is a `BadArtifact`."""
        try:
            yield
        except TweetscoreError:
            raise
        except FileNotFoundError as error:
            if name is None:
                raise
            raise BadArtifact(f"{plain(name)} is not in {public_url(self.url)}; train or restore it") from error
        except ImportError as error:
            scheme = self.url.partition("://")[0]
            raise StoreUnavailable(
                f"{scheme}:// needs a package: {plain(error)}; `pip install 'tweetscore[s3]'`"
            ) from error
        except Exception as error:  # every fsspec backend has its own exceptions
            raise StoreUnavailable(
                f"{public_url(self.url)} does not answer ({type(error).__name__}); check that it is running and that "
                "its credentials are in the environment"
            ) from error


def is_remote(place: str) -> bool:
    """Return whether a path or URL is a URL other than `file://`."""
    return "://" in place and not place.startswith("file://")


def local_path(place: str) -> Path:
    """Return the folder named by a path or a `file://` URL."""
    return Path(unquote(urlsplit(place).path)) if place.startswith("file://") else Path(place)
