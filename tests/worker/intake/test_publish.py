"""`worker.publish` in a program that runs for a long time."""

import gc
import uuid

import pytest

import worker
from worker.stream import embedded_valkey
from worker.stream.redis_client import connect

CALLS = 100


def test_a_program_that_publishes_for_years_keeps_nothing_of_a_call(
    server: embedded_valkey.Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REDIS_URL", server.url)
    monkeypatch.setenv("TWEETSCORE_STREAM_KEY", f"tweets-{uuid.uuid4().hex}")

    def objects_after(calls: int) -> int:
        for number in range(calls):
            worker.publish([{"id": str(number), "text": "最高の一日"}])
        gc.collect()
        return len(gc.get_objects())

    before = objects_after(3)
    assert objects_after(CALLS) - before < CALLS  # not one object a call


def test_a_program_connects_once_for_all_of_its_calls_and_again_after_a_restart(
    server: embedded_valkey.Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REDIS_URL", server.url)
    monkeypatch.setenv("TWEETSCORE_STREAM_KEY", key := f"tweets-{uuid.uuid4().hex}")
    with connect(server.url) as client:

        def connections_of(calls: int) -> int:
            before = client.info("stats")["total_connections_received"]
            for number in range(calls):
                worker.publish([{"id": str(number), "text": "最高の一日"}])
            return int(client.info("stats")["total_connections_received"] - before)

        connections_of(1)
        assert connections_of(20) == 0
        client.client_kill_filter(skipme=True, _type="normal")
        assert connections_of(1) >= 1
        assert client.xlen(key) == 22
