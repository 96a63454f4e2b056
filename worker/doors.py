"""Publishing and submitting with a nudge: what `import worker` and the command line share."""

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from celery import Celery
from kombu.exceptions import KombuError
from redis import RedisError

from worker.app import SCORING, TRAINING, make_app
from worker.errors import StreamAway, StreamFull
from worker.intake import submit_training as queue_job
from worker.runtime import broker, open_sql, open_stream, returns
from worker.settings import Settings, load_settings
from worker.stream import FULL_WAIT_SECONDS, Stream
from worker.tweet_record import parse_object
from worker.x_api import flat_tweets

log = logging.getLogger(__name__)

FLUSH_TWEETS = 1_000
TASKS = {SCORING: "worker.tasks.score", TRAINING: "worker.tasks.train"}


def nudge(app: Celery, queue: str) -> bool:
    """Say that there is something to do. Returns whether the broker heard; workers also look for themselves."""
    try:
        app.send_task(TASKS[queue], queue=queue, ignore_result=True)
    except (KombuError, RedisError, OSError) as error:  # kombu lets a refusal of the server's through as it is
        log.info("no nudge, the broker does not take it: %s", type(error).__name__)
        return False
    return True


def submit_training(dataset: str, preset: str | None = None, **options: Any) -> int:
    settings = load_settings()
    database = open_sql(settings)
    try:
        job = queue_job(settings, database, dataset, preset, **options)
    finally:
        database.close()
    nudge(make_app(settings), TRAINING)
    return job.id


def publish(tweets: Iterable[Mapping[str, Any]]) -> int:
    settings = load_settings()
    payloads = [parse_object(flat).payload() for tweet in tweets for flat in flat_tweets(dict(tweet))]
    with broker(settings) as url:
        stream, app = open_stream(settings, url), make_app(settings)
        for start in range(0, len(payloads), FLUSH_TWEETS):
            send(stream, payloads[start : start + FLUSH_TWEETS], settings, log.warning)
            nudge(app, SCORING)
    return len(payloads)


def send(stream: Stream, payloads: Sequence[bytes], settings: Settings, say: Callable[[str], None]) -> None:
    """Append records when there is room: past the high-water mark, or with the server full, wait and `say` so.

    A server that is away and comes back gets them again: those that it had taken are there twice then, and have one row
    all the same.
    """
    while True:
        try:
            stream.wait_for_room(
                settings.high_water, lambda length: say(f"waiting, the stream holds {length:,} records")
            )
            stream.publish(payloads)
            return
        except StreamFull as error:
            say(f"waiting: {error}")
            payloads = error.rest
        except StreamAway:
            if not returns(settings, say):
                raise
        time.sleep(FULL_WAIT_SECONDS)
