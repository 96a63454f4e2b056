"""Publish tweets to the stream and nudge a scoring worker. Used by `import worker` and the command line."""

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from worker.app import SCORING, client_app, nudge
from worker.connections import broker, client_stream, wait_for_broker
from worker.errors import StreamAway, StreamFull
from worker.intake.x_api import flat_tweets
from worker.settings import Settings, load_settings
from worker.stream.server_status import FULL_WAIT_SECONDS
from worker.stream.sharded_stream import TweetStream
from worker.stream.tweet_record import parse_object

log = logging.getLogger(__name__)

FLUSH_TWEETS = 1_000


def publish(tweets: Iterable[Mapping[str, Any]]) -> int:
    settings = load_settings()
    payloads = [parse_object(flat).payload() for tweet in tweets for flat in flat_tweets(dict(tweet))]
    with broker(settings) as url:
        stream, app = client_stream(settings, url), client_app(settings)
        for start in range(0, len(payloads), FLUSH_TWEETS):
            send(stream, payloads[start : start + FLUSH_TWEETS], settings, log.warning)
            nudge(app, SCORING)
    return len(payloads)


def send(stream: TweetStream, payloads: Sequence[bytes], settings: Settings, notify: Callable[[str], None]) -> None:
    """Append records. Above the high-water mark, and while the server is full or unavailable, wait and call `notify`.

    After an outage the records are sent again. Those that the server had already appended are then twice in the stream;
    each tweet still gets one row.
    """
    while True:
        try:
            stream.wait_for_room(
                settings.high_water, lambda length: notify(f"waiting, the stream holds {length:,} records")
            )
            stream.publish(payloads)
            return
        except StreamFull as error:
            notify(f"waiting: {error}")
            payloads = error.rest
        except StreamAway:
            if not wait_for_broker(settings, notify):
                raise
        time.sleep(FULL_WAIT_SECONDS)
