"""Where models, datasets and checkpoints are kept: a folder of this machine, or a URL that fsspec opens.

Folders are sealed (`artifact.py`) and go up with their SHA256SUMS last, so that one whose writer died was never there.
What comes down is proven by its digests before it has a name here; see `cache.py`.
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
from training.cache import Cache
from training.errors import BadArtifact, StoreAway
from training.paths import file_sha256, folder_of
from training.sealed import SUMS, read_sums, verify


class Store:
    """Things by name, below a folder or URL; `folder` is where this machine has them, as they are or as copies."""

    def __init__(self, url: str | Path, cache: Cache) -> None:
        text = str(url).rstrip("/") or "/"
        self.remote = Remote(text) if is_remote(text) else None
        self.folder = cache.folder if self.remote else local_path(text)
        self._cache = cache

    def __str__(self) -> str:
        return public_url(self.remote.url) if self.remote else str(self.folder)

    def url_of(self, name: str) -> str:
        return f"{self.remote.url}/{name}" if self.remote else (self.folder / name).absolute().as_uri()

    def place(self, url: str, sha256: str) -> Path:
        """Where this machine has the folder behind a URL, once it is fetched; raises `BadArtifact` for one elsewhere.

        The URL comes from a table, and what lies there is loaded: it must not lead out of the store.
        """
        if self.remote is None:
            return folder_of(url, self.folder)
        self.remote.name_of(url)
        return self.folder / sha256

    @contextmanager
    def fetched(self, url: str, sha256: str) -> Iterator[Path]:
        """The folder behind a URL, on this machine for as long as the block runs.

        Raises `BadArtifact` when it is not there or not what was registered, `StoreAway` when nobody answers.
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
        """Let `write` make a sealed folder where it is told, and keep it under `name`. Returns what `write` returns,
        which is the folder's digest. Raises `StoreAway`, or what `write` does."""
        if self.remote is None:
            return write(self.folder / name)
        with self._cache.outgoing(name) as folder:
            sha256 = write(folder)
            self.remote.upload(folder, name)
            self._cache.adopt(folder, sha256)
        return sha256

    def names(self, prefix: str) -> list[str]:
        """What there is, begun and left included."""
        if self.remote is None:
            return [path.name for pattern in (f"{prefix}*", f".{prefix}*.draft") for path in self.folder.glob(pattern)]
        return [name for name in self.remote.names(whole=False) if name.startswith(prefix)]

    def remove(self, url: str, sha256: str) -> None:
        """Remove a folder and the engines kept beside it; what is gone already is gone."""
        place = self.place(url, sha256)
        if place == self.folder.resolve():
            raise BadArtifact("the model lies at the model store itself, which holds others; it is not removed")
        for path in (place, place.with_name(f"{place.name}.engines")):
            rmtree(path, ignore_errors=True)
        if self.remote is not None:
            self.remote.remove(self.remote.name_of(url))

    def remove_named(self, name: str) -> None:
        if self.remote is None:
            rmtree(self.folder / name, ignore_errors=True)
        else:
            self.remote.remove(name)

    @contextmanager
    def fetched_file(self, url: str, sha256: str) -> Iterator[Path]:
        """A single file of a remote store, as `fetched`."""
        assert self.remote is not None  # noqa: S101 - a file of this machine needs no fetching
        remote, name = self.remote, self.remote.name_of(url)

        def check(copy: Path) -> None:
            if not (copy / name).is_file() or file_sha256(copy / name) != sha256:
                raise BadArtifact(f"{name} is missing or damaged (sha256 differs); submit it again")

        with self._cache.entry(
            sha256, lambda: remote.size(name), lambda draft: remote.download_file(name, draft / name), check
        ) as folder:
            yield folder / name


class Remote:
    """Sealed folders and files below a URL. Every fault of the storage, however it names it, is a `StoreAway`."""

    def __init__(self, url: str) -> None:
        self.url = url

    @cached_property
    def _opened(self) -> tuple[Any, str]:
        with self._speaking():
            fs, root = url_to_fs(self.url)
            return fs, root.rstrip("/")

    def name_of(self, url: str) -> str:
        """The name of what lies at a URL; raises `BadArtifact` when that is not here."""
        name = url.removeprefix(f"{self.url}/")
        if name == url or any(part in ("", ".", "..") for part in name.split("/")):
            raise BadArtifact(
                f"{plain(public_url(url))} lies outside {public_url(self.url)}; move it there, or set "
                "TWEETSCORE_MODEL_STORE or TWEETSCORE_DATASET_STORE"
            )
        return name

    def names(self, whole: bool = True) -> list[str]:
        """Folders, in order; the whole ones alone, or those without their digests too."""
        fs, root = self._opened
        with self._speaking():
            fs.invalidate_cache()
            if not fs.exists(root):
                return []
            found = fs.glob(f"{root}/*/{SUMS}") if whole else fs.glob(f"{root}/*/*")
        return sorted({path.removeprefix(f"{root}/").split("/")[0] for path in found})

    def has(self, name: str) -> bool:
        """Whether a sealed folder is there whole."""
        fs, root = self._opened
        with self._speaking():
            fs.invalidate_cache()
            return bool(fs.exists(f"{root}/{name}/{SUMS}"))

    def size(self, name: str) -> int:
        """Bytes of a folder or file."""
        fs, root = self._opened
        with self._speaking():
            fs.invalidate_cache()
            return sum(entry["size"] or 0 for entry in fs.find(f"{root}/{name}", detail=True).values())

    def upload(self, folder: Path, name: str) -> None:
        last = folder / SUMS
        for path in [*(path for path in sorted(folder.iterdir()) if path != last), last]:
            self.upload_file(path, f"{name}/{path.name}")

    def upload_file(self, path: Path, name: str) -> None:
        fs, root = self._opened
        with self._speaking():
            try:
                fs.put_file(str(path), f"{root}/{name}")
            except FileNotFoundError as error:  # of storages that have folders
                if not fs.exists(root):
                    raise StoreAway(f"there is no {public_url(self.url)}; make it, then try again") from error
                fs.makedirs(f"{root}/{name}".rpartition("/")[0], exist_ok=True)
                fs.put_file(str(path), f"{root}/{name}")

    def download(self, name: str, target: Path, sha256: str | None = None) -> None:
        """A sealed folder into `target`. What an earlier try left there whole is not fetched again."""
        fs, root = self._opened
        with self._speaking(name):
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
        with self._speaking(name):
            fs.get_file(f"{root}/{name}", str(target))

    def remove(self, name: str) -> None:
        """Remove a folder, or all with an empty name. The digests first: a folder that is half removed is none."""
        fs, root = self._opened
        place = f"{root}/{name}".rstrip("/")
        with self._speaking():
            fs.invalidate_cache()
            for path in (f"{place}/{SUMS}", place):
                try:
                    fs.rm(path, recursive=True)
                except FileNotFoundError:
                    continue

    @contextmanager
    def _speaking(self, name: str | None = None) -> Iterator[None]:
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
            raise StoreAway(f"{scheme}:// needs a package: {plain(error)}; `pip install 'tweetscore[s3]'`") from error
        except Exception as error:  # every storage has errors of its own
            raise StoreAway(
                f"{public_url(self.url)} does not answer ({type(error).__name__}); is it up, and are its credentials "
                "in the environment?"
            ) from error


def is_remote(place: str) -> bool:
    return "://" in place and not place.startswith("file://")


def local_path(place: str) -> Path:
    """The folder that a path or a `file://` URL names."""
    return Path(unquote(urlsplit(place).path)) if place.startswith("file://") else Path(place)
