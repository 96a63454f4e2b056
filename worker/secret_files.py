"""Passwords and secrets in files, such as container secrets."""

from pathlib import Path
from urllib.parse import quote, urlsplit, urlunsplit

from db.errors import shown
from worker.errors import BadSettings


def read_secret(file: Path, variable: str) -> str:
    """The content of a file that an environment variable names. Raises `BadSettings` when it cannot be read."""
    try:
        return file.read_text(encoding="utf-8").rstrip("\r\n")
    except (OSError, ValueError) as error:
        raise BadSettings(f"{variable} is {shown(str(file))}: it cannot be read ({type(error).__name__})") from error


def with_password(url: str, password: str) -> str:
    """Add a password to a URL that names a user and has none."""
    parts = urlsplit(url)
    user, at, host = parts.netloc.rpartition("@")
    if ":" in user or not at:
        return url
    return urlunsplit(parts._replace(netloc=f"{user}:{quote(password, safe='')}@{host}"))
