"""`/metrics` of a worker for Prometheus: metrics of the process, depth of the stream, counts of rows, live quality."""

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from errno import EADDRINUSE

from prometheus_client import REGISTRY, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from db import jobs, predictions
from db.models import JOB_STATES
from db.session import Database
from training.jobs import lease  # noqa: F401 - registers its counter, which every worker exports
from worker.errors import BadSettings
from worker.process.quality_metrics import QualityMetrics
from worker.scoring import metrics  # noqa: F401 - registers the metrics of scoring
from worker.stream.sharded_stream import TweetStream

log = logging.getLogger(__name__)

PORTS_TRIED = 32
# A server that does not answer must not block a scrape: its metrics are omitted.
ANSWER_SECONDS = 3.0


class WorkerCollector(Collector):
    """The state of one worker, the depth of the stream and counts of rows, queried at each scrape.

    A scoring worker adds the gauges of live quality, which are measured less often.
    """

    def __init__(
        self, kind: str, state: Callable[[], str], model_version: Callable[[], int | None], stream: TweetStream,
        database: Database, engine: Callable[[], str | None] = lambda: None,
    ) -> None:  # fmt: skip
        self._kind = kind
        self._state = state
        self._model_version = model_version
        self._stream = stream
        self._database = database
        self._engine = engine
        self._quality = QualityMetrics(database)
        self._threads = ThreadPoolExecutor(2, "metrics")
        self._pending: dict[str, Future[list[Metric]]] = {}

    def describe(self) -> Iterable[Metric]:
        return ()  # so that registering queries nothing

    def collect(self) -> Iterator[Metric]:
        worker = GaugeMetricFamily("tweetscore_worker", "1 for the state of this worker", labels=["kind", "state"])
        worker.add_metric([self._kind, self._state()], 1)
        yield worker
        if self._kind == "scoring":
            version = self._model_version() or 0
            yield _gauge("tweetscore_model_version", "model version that this worker scores with, 0 for none", version)
            engine = GaugeMetricFamily("tweetscore_engine", "1 for the engine of that model", labels=["engine"])
            if (name := self._engine()) is not None:
                engine.add_metric([name], 1)
            yield engine
            yield from self._quality.collect()
        for name, query in (("broker", self._stream_metrics), ("database", self._database_metrics)):
            if (pending := self._pending.get(name)) is None or pending.done():
                self._pending[name] = self._threads.submit(query)
        until = time.monotonic() + ANSWER_SECONDS
        for name, pending in self._pending.items():
            found: list[Metric] = []
            try:
                found = pending.result(max(0.0, until - time.monotonic()))
            except Exception as error:
                log.debug("metrics of the %s: %s", name, error)
            yield _gauge(f"tweetscore_{name}_up", f"1 while the {name} answers this worker", float(bool(found)))
            yield from found

    def _stream_metrics(self) -> list[Metric]:
        depth, oldest, vanished = self._stream.depth(), self._stream.oldest(), self._stream.vanished()
        age = 0.0 if oldest is None else max(0.0, time.time() - oldest.timestamp())
        found: list[Metric] = [
            _gauge("tweetscore_stream_length", "records in the stream", depth.length),
            _gauge("tweetscore_stream_pending", "records read and not yet acknowledged", depth.pending),
            _gauge("tweetscore_oldest_unscored_seconds", "age of the oldest record without a score", age),
            # The count is stored next to the stream, so every worker exports the same value.
            CounterMetricFamily(
                "tweetscore_records_vanished",
                "records erased from the stream before they were scored",
                value=vanished.records,
            ),
            _gauge(
                "tweetscore_records_vanished_at_seconds",
                "time at which erased records were last detected, 0 for never",
                vanished.at,
            ),
        ]
        if depth.lag is not None:
            found.append(_gauge("tweetscore_stream_lag", "records that no worker has read yet", depth.lag))
        return found

    def _database_metrics(self) -> list[Metric]:
        with self._database.read() as session:
            counted, dead = jobs.counts(session), predictions.dead_count(session)
        states = GaugeMetricFamily("tweetscore_jobs", "training jobs by state", labels=["state"])
        for state in JOB_STATES:
            states.add_metric([state], counted.get(state, 0))
        return [states, _gauge("tweetscore_dead_letters", "records in dead_letters", dead)]


def _gauge(name: str, documentation: str, value: float) -> Metric:
    return GaugeMetricFamily(name, documentation, value=value)


def serve(host: str, port: int, collectors: Iterable[WorkerCollector]) -> int:
    """Serve `/metrics` on the first free port from `port` on; 0 selects any port. Returns the port.

    Raises `BadSettings` when all are in use.
    """
    for collector in collectors:
        REGISTRY.register(collector)
    for number in range(port, port + (PORTS_TRIED if port else 1)):
        try:
            server, _ = start_http_server(number, host)
        except OSError as error:
            if error.errno == EADDRINUSE:
                continue
            raise BadSettings(
                f"TWEETSCORE_METRICS_HOST is {host!r}, port {number}: {error.strerror}; choose another"
            ) from error
        log.info("metrics on http://%s:%d/metrics", host, server.server_port)
        return int(server.server_port)
    raise BadSettings(
        f"TWEETSCORE_METRICS_PORT is {port}: it and the next {PORTS_TRIED - 1} ports are in use; choose another"
    )
