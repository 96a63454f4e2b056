"""Metrics and logs of a worker, read as Prometheus and a log collector read them."""

import io
import logging
import socket
import time
from datetime import UTC, datetime, timedelta

import pytest
from structlog.contextvars import bound_contextvars

from db.models import DeadLetter, ScoringWindow
from tests.conftest import PATIENCE_SECONDS, wait_until
from tests.support.bench import Bench, wire
from tests.support.commands import worker
from tests.support.scraped import log_lines, looked, metrics_port, scraped
from tests.support.world import World, on_postgresql
from worker.process import logging_setup, metrics_endpoint
from worker.process.metrics_endpoint import WorkerCollector
from worker.stream.redis_client import CLIENT_TIMEOUT_SECONDS, connect_briefly
from worker.stream.stream import Stream


@on_postgresql
def test_a_scorer_tells_what_it_did_and_what_waits(world: World) -> None:
    world.stream.publish([wire(i, f"雨が降る{i}") for i in range(30)] + [b"not JSON"])
    with worker(world.given, "score", metrics_port=0) as scorer:
        world.drained()
        scorer.says("metrics on")
        port = metrics_port(scorer)
        wait_until(lambda: scraped(port).get(("worker", "scoring,idle")) == 1)
        found = scraped(port)
        rows = world.rows(ScoringWindow)
        said = log_lines(scorer.said())
    assert found["tweets_total", ""] == world.predictions() == 30
    assert found["buried_total", ""] == found["dead_letters", ""] == world.count(DeadLetter) == 1
    assert found["windows_total", ""] == len(rows)
    assert found["tokens_total", ""] == sum(row["tokens"] for row in rows)
    assert found["padded_tokens_total", ""] == sum(row["padded_tokens"] for row in rows)
    assert found["padding_ratio", ""] == pytest.approx(rows[-1]["padded_tokens"] / rows[-1]["tokens"])
    for stage in ("read", "tokenise", "forward", "store"):
        assert found["stage_seconds_count", stage] == len(rows)
        assert found["stage_seconds_sum", stage] == pytest.approx(sum(row[f"{stage}_ms"] for row in rows) / 1000)
    assert found["model_version", ""] == rows[-1]["model_version_id"]
    assert found["engine", "torch-float32"] == 1
    waiting = ("stream_lag", "stream_pending", "stream_length", "oldest_unscored_seconds")
    assert [found[name, ""] for name in waiting] == [0, 0, 0, 0]
    assert (found["broker_up", ""], found["database_up", ""]) == (1, 1)
    assert {label for name, label in found if name == "jobs"} == {
        "queued", "running", "succeeded", "failed", "cancelled",
    }  # fmt: skip
    assert found["lease_losses_total", ""] == 0
    # Its log is JSON, since it goes to a file.
    assert any(line["event"].startswith("scored 30 tweets") and line["level"] == "info" for line in said)
    assert any(line.get("model_version") == rows[-1]["model_version_id"] for line in said)


def test_the_oldest_record_is_the_first_unread_or_the_first_not_acknowledged(bench: Bench) -> None:
    stream = bench.stream
    assert stream.oldest() is None
    at = datetime.now(UTC).replace(microsecond=0) - timedelta(hours=1)
    for second in range(4):
        bench.raw.xadd(stream.key, {"tweet": wire(second)}, f"{round(at.timestamp() + second) * 1000}-1")
    assert stream.oldest() == at  # there is no group yet
    stream.ensure_group()
    assert stream.oldest() == at
    records = stream.read(2, None)
    assert stream.oldest() == at  # read, and not acknowledged
    stream.ack([records[0].id])
    assert stream.oldest() == at + timedelta(seconds=1)
    stream.ack([records[1].id])
    assert stream.oldest() == at + timedelta(seconds=2)  # the first unread record
    found = looked(WorkerCollector("scoring", lambda: "idle", lambda: None, stream, bench.database))
    assert found["oldest_unscored_seconds", ""] == pytest.approx(3598, abs=PATIENCE_SECONDS)
    assert (found["stream_lag", ""], found["stream_pending", ""], found["model_version", ""]) == (2, 0, 0)
    stream.ack([record.id for record in stream.read(5, None)])
    assert stream.oldest() is None


def test_a_broker_that_is_silent_keeps_nobody_waiting_and_is_said_to_be_away(lite: Bench) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"redis://127.0.0.1:{silent.getsockname()[1]}/0"
        collector = WorkerCollector(
            "scoring", lambda: "idle", lambda: 7, Stream(connect_briefly(url), "tweets", "g"), lite.database
        )
        for _ in range(2):
            began = time.monotonic()
            found = looked(collector)
            assert time.monotonic() - began < CLIENT_TIMEOUT_SECONDS
            assert (found["broker_up", ""], found["database_up", ""]) == (0, 1)
            assert ("stream_lag", "") not in found
            assert found["dead_letters", ""] == 0


def test_workers_of_one_machine_take_one_port_after_the_other() -> None:
    first = metrics_endpoint.serve("127.0.0.1", 0, [])
    second = metrics_endpoint.serve("127.0.0.1", first, [])
    assert first < second < first + metrics_endpoint.PORTS_TRIED
    assert scraped(first)["lease_losses_total", ""] == scraped(second)["lease_losses_total", ""]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("output", [io.StringIO, Terminal])
def test_a_line_holds_what_is_bound_and_no_words_of_a_tweet(output: type[io.StringIO]) -> None:
    text, words = output(), "最高の一日"
    logger, handler = logging.Logger("worker.test"), logging_setup.handler(text)
    handler.addFilter(logging_setup.redact)
    logger.addHandler(handler)
    with bound_contextvars(window="5-0", model_version=3):
        try:
            raise ValueError(words)
        except ValueError:
            logger.exception("a window of %d records failed", 2)
    said = text.getvalue()
    assert words not in said
    assert "a window of 2 records failed" in said
    if output is Terminal:
        assert "window" in said
        assert "5-0" in said
        return
    [line] = log_lines(said)
    assert {name: line[name] for name in ("level", "logger", "window", "model_version")} == {
        "level": "error", "logger": "worker.test", "window": "5-0", "model_version": 3,
    }  # fmt: skip
    assert line["exception"].endswith("ValueError")
    assert datetime.fromisoformat(line["timestamp"]).tzinfo is not None
