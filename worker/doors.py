"""Publishing and submitting with a nudge: what `import worker` and the command line share."""

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from celery import Celery
from kombu.exceptions import OperationalError

from worker.app import SCORING, TRAINING, make_app
from worker.intake import submit_training as queue_job
from worker.records import parse_object
from worker.runtime import broker, open_sql, open_stream
from worker.settings import load_settings

log = logging.getLogger(__name__)

TASKS = {SCORING: "worker.tasks.score", TRAINING: "worker.tasks.train"}


def nudge(app: Celery, queue: str) -> bool:
    """Say that there is something to do. Returns whether the broker heard; workers also look for themselves."""
    try:
        app.send_task(TASKS[queue], queue=queue, ignore_result=True)
    except (OperationalError, OSError) as error:
        log.info("no nudge, the broker does not answer: %s", type(error).__name__)
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
    payloads = [parse_object(dict(tweet)).payload() for tweet in tweets]
    with broker(settings) as url:
        stream = open_stream(settings, url)
        stream.wait_for_room(
            settings.high_water, lambda length: log.warning("the stream holds %d records, waiting", length)
        )
        stream.publish(payloads)
        nudge(make_app(settings), SCORING)
    return len(payloads)
