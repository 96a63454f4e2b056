"""Bring a restored database and the stream together: which tweets the stream has to deliver again, and how.

A backup holds the rows that were committed before it was made. Records that were acknowledged later are scored again if
the stream still holds them, see `TWEETSCORE_STREAM_KEEP_HOURS`; rows that exist already absorb what is scored twice.
"""

from contextlib import closing
from datetime import UTC, datetime, timedelta

from db.base import utc_now
from worker.connections import depth_reader, open_stream, stream_url
from worker.errors import StreamError
from worker.settings import Settings
from worker.stream.sharded_stream import TweetStream

# Clocks of this machine and of the stream's server may differ by so much.
MARGIN = timedelta(minutes=1)
BEGINNING = datetime.fromtimestamp(0, UTC)


def replay_since(settings: Settings) -> datetime | None:
    """From when on a backup that begins now may lack tweets: since the oldest record that is not acknowledged was
    received, or since now. None when the stream cannot be asked."""
    try:
        if depth_reader(settings)() is None:
            return None
        with closing(open_stream(settings, stream_url(settings), brief=True)) as stream:
            oldest = stream.oldest()
    except StreamError:
        return None
    return (oldest or utc_now()) - MARGIN


def replay(stream: TweetStream, since: datetime | None) -> datetime | None:
    """Let workers score the records that were received at `since` or later again, or all that the stream holds. Returns
    when the first of them was received; None without any."""
    return stream.rewind(since or BEGINNING)
