"""`worker.publish` in a program that runs for a long time."""

import gc
import uuid

import pytest

import worker
from worker.stream import embedded_valkey

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
