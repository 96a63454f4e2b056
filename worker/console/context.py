"""What every page of the console gets: the settings, what the visitor may do, and ways to read and to write.

Pages read through `frame`, with the read-only role. What writes goes through the functions that the command line calls,
with `database()`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import streamlit as st

from db.querying import frames
from db.session import Database
from worker.connections import open_sql
from worker.settings import Access, Settings

if TYPE_CHECKING:
    import pandas as pd

# Each allows what the ones before it allow.
ACCESS = ("look", "label", "operate")
# Answers this old are shown again instead of asking the database: a page draws several times a second while it is used.
FRESH_SECONDS, SLOW_FRESH_SECONDS = 2.0, 60.0


@dataclass(frozen=True)
class Console:
    settings: Settings
    access: Access
    visitor: str  # the annotator's name unless the visitor enters another one

    def may(self, access: Access) -> bool:
        return ACCESS.index(access) <= ACCESS.index(self.access)

    def frame(self, sql: str, parameters: Mapping[str, Any] | None = None) -> "pd.DataFrame":
        """The rows of one SELECT; `:name` in it stands for a parameter. Raises `DatabaseError`."""
        return _frame(self.settings.query_url, sql, dict(parameters or {}))

    def slow_frame(self, sql: str, parameters: Mapping[str, Any] | None = None) -> "pd.DataFrame":
        """The same for a query that takes about a second on a million tweets; its answer is shown for a minute."""
        return _slow_frame(self.settings.query_url, sql, dict(parameters or {}))

    def database(self) -> Database:
        """The database for writing, shared by all visitors. Raises `DatabaseError`."""
        return _database(self.settings.sql_url, self.settings)


def forget() -> None:
    """Drop the answers that are shown again, because something was written."""
    _frame.clear()
    _slow_frame.clear()


@st.cache_data(ttl=FRESH_SECONDS, show_spinner=False, max_entries=500)
def _frame(url: str, sql: str, parameters: dict[str, Any]) -> "pd.DataFrame":
    return frames.whole(url, sql, parameters)


@st.cache_data(ttl=SLOW_FRESH_SECONDS, show_spinner=False, max_entries=50)
def _slow_frame(url: str, sql: str, parameters: dict[str, Any]) -> "pd.DataFrame":
    return frames.whole(url, sql, parameters)


@st.cache_resource(show_spinner=False)
def _database(url: str, _settings: Settings) -> Database:  # the underscore keeps the settings out of the key
    return open_sql(_settings)
