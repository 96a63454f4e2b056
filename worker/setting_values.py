"""Checks of single values of the settings. Each raises `ValueError` with what is allowed."""

from pathlib import Path
from urllib.parse import urlsplit

from worker.errors import StreamError


def expanded(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise ValueError("it names the home of a user that does not exist") from error


def redis_server(url: str) -> str:
    """The URL of a Redis server, of Sentinels or of a cluster."""
    from worker.stream.redis_client import check_url  # the embedded server needs no check, and redis-py loads slowly

    try:
        check_url(url)
    except StreamError as error:
        raise ValueError(str(error)) from error
    return url


def web_address(url: str, path: str | None = None) -> str:
    """An http(s) address without a user, with this path if one is given."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username is not None:
        raise ValueError("it must begin with https:// or http:// and name a host, without a user")
    if path is not None and parts.path != path:
        raise ValueError(f"it must end with {path} right after the host, as in https://host{path}")
    return url
