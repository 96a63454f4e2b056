"""Celery consumer that pauses before it reconnects."""

import time

from celery.worker.consumer import Consumer

PAUSE_SECONDS = 1.0


class DelayedRetryConsumer(Consumer):  # type: ignore[misc]
    """Sleeps after a connection error.

    Celery retries at once, and a broker whose memory is full refuses every attempt, which would flood the log.
    """

    def on_connection_error_before_connected(self, exc: Exception) -> None:
        super().on_connection_error_before_connected(exc)
        time.sleep(PAUSE_SECONDS)

    def on_connection_error_after_connected(self, exc: Exception) -> None:
        super().on_connection_error_after_connected(exc)
        time.sleep(PAUSE_SECONDS)
