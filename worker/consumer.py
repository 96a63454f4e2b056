"""Celery's connection to the broker, in no hurry: it pauses before it tries again, and the log stays readable."""

import time

from celery.worker.consumer import Consumer

PAUSE_SECONDS = 1.0


class PatientConsumer(Consumer):  # type: ignore[misc]
    """Celery tries again at once what a broker refuses, and a broker whose memory is full refuses for long."""

    def on_connection_error_before_connected(self, exc: Exception) -> None:
        super().on_connection_error_before_connected(exc)
        time.sleep(PAUSE_SECONDS)

    def on_connection_error_after_connected(self, exc: Exception) -> None:
        super().on_connection_error_after_connected(exc)
        time.sleep(PAUSE_SECONDS)
