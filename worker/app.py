"""The Celery application and its configuration: JSON messages, and one queue each for training and scoring."""

import logging
import ssl
from functools import lru_cache
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from celery import Celery
from kombu.exceptions import KombuError
from redis import RedisError

from worker.connections import stream_url
from worker.errors import BadSettings
from worker.settings import Settings, load_settings
from worker.stream.redis_client import CLIENT_TIMEOUT_SECONDS

log = logging.getLogger(__name__)

TRAINING = "training"
SCORING = "scoring"
# The task whose message, without data, starts work on a queue.
NUDGES = {SCORING: "worker.tasks.score", TRAINING: "worker.tasks.train"}
# How long the result backend keeps the result of a job. The job's row in SQL is not deleted.
RESULT_SECONDS = 7 * 86_400


def make_app(settings: Settings) -> Celery:
    return _make_app(stream_url(settings), settings.result_url)


def client_app(settings: Settings) -> Celery:
    """The application of a program that only sends messages: one for each broker and process.

    Every application that sends adds to a pool of producers that all of this process share, and Celery never empties
    it. A program that made one for each call would grow with every call.
    """
    return _client_app(stream_url(settings), settings.result_url)


def _make_app(url: str, result_url: str | None) -> Celery:
    app = Celery("tweetscore", include=["worker.tasks"])
    app.conf.update(celery_config(url, result_url))
    return app


_client_app = lru_cache(_make_app)


def celery_config(url: str, result_url: str | None = None) -> dict[str, Any]:
    """Celery's configuration.

    `url` is the broker's URL for redis-py; results are stored at `result_url`, else on the broker.
    """
    results = result_url or url
    return {
        "broker_url": broker_url(url),
        "broker_use_ssl": broker_ssl(url),
        "result_backend": broker_url(results),
        "redis_backend_use_ssl": broker_ssl(results),
        "result_expires": RESULT_SECONDS,
        "redis_socket_connect_timeout": 5,
        "redis_socket_timeout": CLIENT_TIMEOUT_SECONDS,
        # Nudges have no result. The tasks whose result is used override this.
        "task_ignore_result": True,
        "task_serializer": "json",
        "accept_content": ["json"],
        "task_routes": {
            "worker.tasks.train": {"queue": TRAINING},
            "worker.tasks.adapt": {"queue": TRAINING},
            "worker.tasks.cancel": {"queue": TRAINING},
            "worker.tasks.score": {"queue": SCORING},
        },
        # A message is a nudge, so it is acknowledged early: losing it loses no work.
        "task_acks_late": False,
        "worker_prefetch_multiplier": 1,
        "worker_direct": True,
        "broker_connection_retry_on_startup": True,
        "broker_connection_max_retries": None,
        # A broker whose memory is full refuses to declare queues until scoring has freed memory: retry, do not exit.
        "broker_channel_error_retry": True,
        "worker_consumer": "worker.process.celery_consumer:DelayedRetryConsumer",
        "worker_hijack_root_logger": False,
        "worker_redirect_stdouts": False,
        "worker_send_task_events": True,
        # Fail soon when the broker is unavailable: the data of a nudge is already stored.
        "task_publish_retry_policy": {"max_retries": 2, "interval_start": 0, "interval_step": 0.2, "interval_max": 0.5},
        "broker_transport_options": {"socket_connect_timeout": 5, "socket_keepalive": True},
        "timezone": "UTC",
    }


def broker_url(url: str) -> str:
    """Convert a redis-py URL to Celery's form: `redis+socket://` for a Unix socket, with the database as an option."""
    if url.startswith("rediss://"):
        return url.partition("?")[0]  # the query holds TLS options, see `broker_ssl`
    if not url.startswith("unix://"):
        return url
    path, _, query = url.removeprefix("unix://").partition("?")
    database = next((part.removeprefix("db=") for part in query.split("&") if part.startswith("db=")), "0")
    return f"redis+socket://{path}?virtual_host={database}"


def broker_ssl(url: str) -> dict[str, Any] | None:
    """Convert redis-py's TLS options to Celery's. Certificates are verified unless the URL disables that."""
    if not url.startswith("rediss://"):
        return None
    given = dict(parse_qsl(urlsplit(url).query))
    wanted = given.pop("ssl_cert_reqs", "required")
    needs = {"none": ssl.CERT_NONE, "optional": ssl.CERT_OPTIONAL, "required": ssl.CERT_REQUIRED}
    if wanted not in needs:
        raise BadSettings(f"REDIS_URL: ssl_cert_reqs is {wanted!r}; use required, optional or none")
    options: dict[str, Any] = {name: value for name, value in given.items() if name.startswith("ssl_")}
    if "ssl_check_hostname" in options:
        options["ssl_check_hostname"] = options["ssl_check_hostname"].lower() in ("1", "true", "yes")
    return {"ssl_cert_reqs": needs[wanted], **options}


def nudge(app: Celery, queue: str) -> bool:
    """Send a Celery message that starts work. Returns whether the broker accepted it; workers also poll for work."""
    try:
        app.send_task(NUDGES[queue], queue=queue, ignore_result=True)
    except (KombuError, RedisError, OSError) as error:  # kombu does not wrap errors that the server returns
        log.info("no nudge was sent, the broker does not accept it: %s", type(error).__name__)
        return False
    return True


app = make_app(load_settings())
