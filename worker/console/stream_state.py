"""What the stream's server reports, with short timeouts, and at most every two seconds for all visitors."""

from dataclasses import dataclass
from datetime import UTC, datetime

import streamlit as st

from worker.connections import no_stream, open_stream, stream_url
from worker.console.context import FRESH_SECONDS
from worker.errors import StreamError
from worker.settings import Settings
from worker.stream.server_status import Consumer
from worker.stream.stream import Depth


@dataclass(frozen=True)
class StreamState:
    """`problem` is set when the server does not answer; then the rest is empty. `oldest` is UTC."""

    depth: Depth | None = None
    oldest: datetime | None = None
    consumers: tuple[Consumer, ...] = ()
    problem: str | None = None

    @property
    def lag_seconds(self) -> float | None:
        """Age of the oldest record that is not scored; 0 when all are, None when unknown."""
        if self.depth is None:
            return None
        return 0.0 if self.oldest is None else max(0.0, (datetime.now(UTC) - self.oldest).total_seconds())


def read(settings: Settings) -> StreamState:
    places = settings.stream_urls or (stream_url(settings),)
    return _read(settings, places, settings.stream_key, settings.group)


@st.cache_data(ttl=FRESH_SECONDS, show_spinner=False)
def _read(_settings: Settings, places: tuple[str, ...], key: str, group: str) -> StreamState:
    if reason := no_stream(_settings):
        return StreamState(problem=reason)
    stream = open_stream(_settings, places[0], brief=True)
    try:
        return StreamState(stream.depth(), stream.oldest(), tuple(stream.consumers()))
    except StreamError as error:
        return StreamState(problem=str(error))
    finally:
        stream.close()


def duration(seconds: float | None) -> str | None:
    """A duration for people: `3 s`, `12 min`, `5 h`, `2 d`."""
    if seconds is None:
        return None
    for unit, length in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def ago(at: datetime) -> str:
    return duration(max(0.0, (datetime.now(UTC) - at).total_seconds())) or ""
