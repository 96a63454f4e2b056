"""Metrics as Prometheus reads them, over HTTP from a worker or directly from a collector; and lines of JSON logs."""

import json
import re
import urllib.request
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from tests.conftest import PATIENCE_SECONDS
from tests.support.commands import Command
from worker.process.metrics_endpoint import WorkerCollector


def parsed(text: str) -> dict[tuple[str, str], float]:
    """(name, its label values) -> value."""
    return {
        (sample.name.removeprefix("tweetscore_"), ",".join(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def scraped(port: int) -> dict[tuple[str, str], float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=PATIENCE_SECONDS) as answer:
        return parsed(answer.read().decode())


def looked(collector: WorkerCollector) -> dict[tuple[str, str], float]:
    registry = CollectorRegistry()
    registry.register(collector)
    return parsed(generate_latest(registry).decode())


def metrics_port(worker: Command) -> int:
    """The port that a worker with `metrics_port=0` took."""
    return int(re.search(r"http://127\.0\.0\.1:(\d+)/metrics", worker.said())[1])  # type: ignore[index]


def log_lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]
