"""The Celery application: JSON only, two queues, nothing kept on the broker that cannot be lost."""

from typing import Any

from celery import Celery

from worker.runtime import stream_url
from worker.settings import Settings, load_settings

TRAINING = "training"
SCORING = "scoring"


def make_app(settings: Settings) -> Celery:
    app = Celery("tweetscore", include=["worker.tasks"])
    app.conf.update(celery_config(stream_url(settings)))
    return app


def celery_config(url: str) -> dict[str, Any]:
    return {
        "broker_url": broker_url(url),
        "task_ignore_result": True,
        "task_serializer": "json",
        "accept_content": ["json"],
        "task_routes": {"worker.tasks.train": {"queue": TRAINING}, "worker.tasks.score": {"queue": SCORING}},
        "task_default_queue": SCORING,
        # A message is a nudge: taken at once, and none the worse for getting lost.
        "task_acks_late": False,
        "worker_prefetch_multiplier": 1,
        "worker_direct": True,
        "broker_connection_retry_on_startup": True,
        "broker_connection_max_retries": None,
        "worker_hijack_root_logger": False,
        "worker_redirect_stdouts": False,
        "worker_send_task_events": True,
        # A publisher that cannot reach the broker says so soon: its data is safe where it lies.
        "task_publish_retry_policy": {"max_retries": 2, "interval_start": 0, "interval_step": 0.2, "interval_max": 0.5},
        "broker_transport_options": {"socket_connect_timeout": 5, "socket_keepalive": True},
        "timezone": "UTC",
    }


def broker_url(url: str) -> str:
    """redis-py's URL as Celery spells it: a Unix socket is `redis+socket://`, its database an option."""
    if not url.startswith("unix://"):
        return url
    path, _, query = url.removeprefix("unix://").partition("?")
    database = next((part.removeprefix("db=") for part in query.split("&") if part.startswith("db=")), "0")
    return f"redis+socket://{path}?virtual_host={database}"


app = make_app(load_settings())
