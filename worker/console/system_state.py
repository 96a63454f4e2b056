"""The machine and the database as the page Health shows them, asked at most every few seconds for all visitors."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import streamlit as st
from sqlalchemy import make_url

from db import compatibility, registry
from db.errors import TweetscoreError
from worker.connections import model_store
from worker.console import queries
from worker.console.context import Console
from worker.engines.engine_choice import Choice, saved_choices
from worker.settings import Settings

REFRESH_SECONDS = 30.0


@dataclass(frozen=True)
class Disk:
    """Bytes of the volume of the home, and of the database; None where the size is not known."""

    free: int
    total: int
    database: int | None


@dataclass(frozen=True)
class Schema:
    """The database's schema and this release's. `misfit` is why they do not fit together."""

    found: str | None
    newest: str
    misfit: str | None


def disk(console: Console) -> Disk:
    usage = shutil.disk_usage(console.settings.home)
    return Disk(usage.free, usage.total, _database_bytes(console))


def _database_bytes(console: Console) -> int | None:
    if queries.is_sqlite(console):
        file = Path(make_url(console.settings.sql_url).database or "")
        return sum(part.stat().st_size for part in (file, file.with_name(f"{file.name}-wal")) if part.is_file())
    try:
        return int(console.frame("SELECT pg_database_size(current_database()) AS bytes")["bytes"].iloc[0])
    except TweetscoreError:  # a role without the right to connect to it
        return None


def schema(console: Console) -> Schema:
    found = compatibility.find(console.database())
    return Schema(found.revision, compatibility.newest_revision(), found.misfit)


def engines(console: Console) -> list[Choice]:
    """The engines that were tried for the champion, or for both models of a cascade: one choice per kind of machine."""
    with console.database().read() as session:
        version_id = registry.assigned(session, registry.CHAMPION)
        if version_id is None:
            return []
        models = registry.made_of(session, registry.get(session, version_id))
        places = [(model.artifact_url, model.sha256) for model in models]
    return [choice for place in places for choice in _choices(console.settings, *place)]


@st.cache_data(ttl=REFRESH_SECONDS, show_spinner=False)
def _choices(_settings: Settings, url: str, sha256: str) -> list[Choice]:
    try:
        return saved_choices(model_store(_settings).place(url, sha256), _settings.engines)
    except TweetscoreError:  # a store that this machine cannot reach
        return []


def size(count: int | None) -> str | None:
    """Bytes for people."""
    if count is None:
        return None
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit in ("B", "kB") else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"
