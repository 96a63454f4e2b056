"""`/metrics` of a worker, for Prometheus: what it did, and what it sees waiting when it is asked."""

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from errno import EADDRINUSE

from prometheus_client import REGISTRY, Counter, Gauge, Histogram, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from db import jobs, predictions
from db.models import JOB_STATES
from db.session import Database
from training import lease  # noqa: F401 - its counter belongs to what every worker shows
from worker.errors import BadSettings
from worker.stream import Stream
from worker.window import STAGES, Window

log = logging.getLogger(__name__)

# From under a millisecond, which reading takes, to what a window of long texts takes on a slow CPU.
BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
PORTS_TRIED = 32
# A server that is away must not keep whoever scrapes; what did not answer is left out.
ANSWER_SECONDS = 3.0

windows = Counter("tweetscore_windows", "windows committed")
tweets = Counter("tweetscore_tweets", "tweets scored and committed")
buried = Counter("tweetscore_buried", "records put into dead_letters")
tokens = Counter("tweetscore_tokens", "tokens of the texts scored")
padded_tokens = Counter("tweetscore_padded_tokens", "tokens the device saw, padding included")
padding = Gauge("tweetscore_padding_ratio", "padded tokens over tokens of the last window, 1 is none")
stages = Histogram("tweetscore_stage_seconds", "seconds a window spent in a stage", ["stage"], buckets=BUCKETS)
for stage in STAGES:
    stages.labels(stage)  # there from the start, so that a rate can be taken


def count(window: Window) -> None:
    """A window was committed."""
    windows.inc()
    tweets.inc(len(window.tweets))
    buried.inc(len(window.dead))
    for stage in STAGES:
        stages.labels(stage).observe(window.ms[f"{stage}_ms"] / 1000)
    if window.scores is not None and window.scores.tokens:
        tokens.inc(window.scores.tokens)
        padded_tokens.inc(window.scores.padded_tokens)
        padding.set(window.scores.padded_tokens / window.scores.tokens)


class Looks(Collector):
    """What one lane sees waiting, looked up when Prometheus asks."""

    def __init__(
        self, kind: str, state: Callable[[], str], model_version: Callable[[], int | None], stream: Stream,
        database: Database, engine: Callable[[], str | None] = lambda: None,
    ) -> None:  # fmt: skip
        self._kind = kind
        self._state = state
        self._model_version = model_version
        self._stream = stream
        self._database = database
        self._engine = engine
        self._threads = ThreadPoolExecutor(2, "metrics")
        self._asked: dict[str, Future[list[Metric]]] = {}

    def describe(self) -> Iterable[Metric]:
        return ()  # registering must ask nobody

    def collect(self) -> Iterator[Metric]:
        worker = GaugeMetricFamily("tweetscore_worker", "1 for what this worker is at", labels=["kind", "state"])
        worker.add_metric([self._kind, self._state()], 1)
        yield worker
        if self._kind == "scoring":
            version = self._model_version() or 0
            yield _gauge("tweetscore_model_version", "model version that scores here, 0 before there is one", version)
            engine = GaugeMetricFamily("tweetscore_engine", "1 for what runs that model here", labels=["engine"])
            if (name := self._engine()) is not None:
                engine.add_metric([name], 1)
            yield engine
        for name, look in (("broker", self._of_stream), ("database", self._of_database)):
            if (asked := self._asked.get(name)) is None or asked.done():
                self._asked[name] = self._threads.submit(look)
        until = time.monotonic() + ANSWER_SECONDS
        for name, asked in self._asked.items():
            found: list[Metric] = []
            try:
                found = asked.result(max(0.0, until - time.monotonic()))
            except Exception as error:
                log.debug("metrics of the %s: %s", name, error)
            yield _gauge(f"tweetscore_{name}_up", f"1 while the {name} answers this worker", float(bool(found)))
            yield from found

    def _of_stream(self) -> list[Metric]:
        depth, oldest, vanished = self._stream.depth(), self._stream.oldest(), self._stream.vanished()
        age = 0.0 if oldest is None else max(0.0, time.time() - oldest.timestamp())
        found: list[Metric] = [
            _gauge("tweetscore_stream_length", "records in the stream", depth.length),
            _gauge("tweetscore_stream_pending", "records read and not yet acknowledged", depth.pending),
            _gauge("tweetscore_oldest_unscored_seconds", "age of the oldest record that waits for its score", age),
            # Counted beside the stream, so that every worker tells the same; a new one may begin with those it found.
            CounterMetricFamily(
                "tweetscore_records_vanished",
                "records erased from the stream before they were scored",
                value=vanished.records,
            ),
            _gauge("tweetscore_records_vanished_at_seconds", "when that was last noticed, 0 for never", vanished.at),
        ]
        if depth.lag is not None:
            found.append(_gauge("tweetscore_stream_lag", "records no worker has read yet", depth.lag))
        return found

    def _of_database(self) -> list[Metric]:
        with self._database.read() as session:
            counted, dead = jobs.counts(session), predictions.dead_count(session)
        states = GaugeMetricFamily("tweetscore_jobs", "training jobs by state", labels=["state"])
        for state in JOB_STATES:
            states.add_metric([state], counted.get(state, 0))
        return [states, _gauge("tweetscore_dead_letters", "records in dead_letters", dead)]


def _gauge(name: str, documentation: str, value: float) -> Metric:
    return GaugeMetricFamily(name, documentation, value=value)


def serve(host: str, port: int, looks: Iterable[Looks]) -> int:
    """Answer on the first free port from `port` on, 0 for any; returns it. Raises `BadSettings` when none is."""
    for one in looks:
        REGISTRY.register(one)
    for number in range(port, port + (PORTS_TRIED if port else 1)):
        try:
            server, _ = start_http_server(number, host)
        except OSError as error:
            if error.errno == EADDRINUSE:
                continue
            raise BadSettings(
                f"TWEETSCORE_METRICS_HOST is {host!r}, port {number}: {error.strerror}; take another"
            ) from error
        log.info("metrics on http://%s:%d/metrics", host, server.server_port)
        return int(server.server_port)
    raise BadSettings(f"TWEETSCORE_METRICS_PORT is {port}: it and the {PORTS_TRIED - 1} after it are taken")
