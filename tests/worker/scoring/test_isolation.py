"""A window fails: a text that causes it is buried alone; a broken device or database buries no record."""

import contextlib
import threading
from typing import Any

import pytest
import torch
from sqlalchemy import text

from db.models import DeadLetter, ScoringWindow
from tests.conftest import PATIENCE_SECONDS, wait_until
from tests.support.bench import Bench, Killed, wire
from tests.support.world import on_postgresql
from training.model.artifact import Artifact
from worker.errors import DeviceFull
from worker.scoring.scores import Scores
from worker.scoring.scoring_model import ScoringModel

POISON = "この文は計算を壊す"


class Fragile(ScoringModel):
    """Fails on one text."""

    fault: type[BaseException] = RuntimeError

    def forward(self, rows: Any) -> Scores:
        if self.tokenise([POISON])[0] in list(rows):
            raise self.fault("the device says no")
        return super().forward(rows)


class Deadly(Fragile):
    fault = Killed


class BrokenDevice(ScoringModel):
    def forward(self, rows: Any) -> Scores:
        raise RuntimeError("the device is broken")


class Diverged(ScoringModel):
    """NaN weights: the device raises no error."""

    def __init__(self, version_id: int, artifact: Artifact, *given: Any) -> None:
        super().__init__(version_id, artifact, *given)
        for weights in artifact.model.network.classifier.parameters():
            torch.nn.init.constant_(weights, float("nan"))


# --- a text causes the failure


def test_text_that_fails_is_buried_alone(bench: Bench) -> None:
    champion = bench.holding(Fragile)
    bench.stream.publish([wire(0), wire("poison", POISON), b"no tweet", wire(1)])
    assert bench.worker(champion).drain() == 2
    assert set(bench.scored()) == {"0", "1"}
    reasons = {row["payload"]: row["reason"] for row in bench.rows(DeadLetter)}
    assert set(reasons) == {wire("poison", POISON), b"no tweet"}
    assert "failed (RuntimeError) 3 times" in reasons[wire("poison", POISON)]
    assert bench.stream.depth().idle


def test_few_forwards_find_the_record_that_fails_among_many(lite: Bench) -> None:
    champion = lite.holding(Fragile)
    lite.stream.publish([wire(i, POISON if i == 77 else f"今日は嬉しい{i}") for i in range(60, 124)])
    assert lite.worker(champion).drain() == 63
    assert [row["payload"] for row in lite.dead()] == [wire(77, POISON)]
    # The halves that do not contain it, of 32 to 8 records, and those beside it one by one.
    assert [row["tweets"] for row in lite.rows(ScoringWindow) if row["tweets"] > 1] == [16, 8, 32]
    assert len(lite.rows(ScoringWindow)) == 3 + 8


def test_record_that_kills_its_worker_is_scored_alone_and_buried_the_fourth_time(lite: Bench) -> None:
    champion = lite.holding(Deadly)
    lite.stream.publish([wire(0), wire("poison", POISON), wire(1), wire(2)])
    deaths: list[list[int]] = []

    def drained() -> bool:
        try:
            lite.worker(champion, min_idle_seconds=0.05).drain()
        except Killed:
            deaths.append(lite.deliveries())
        return lite.stream.depth().idle

    wait_until(drained)
    # Twice within the window; then alone, after the record before it and ahead of those behind it.
    assert deaths == [[1] * 4, [2] * 4, [3] * 3, [4] * 3, [5] * 3]
    assert set(lite.scored()) == {"0", "1", "2"}
    (letter,) = lite.rows(DeadLetter)
    assert letter["payload"] == wire("poison", POISON)
    assert "ended the worker 3 times" in letter["reason"]
    assert letter["attempts"] == 6
    assert lite.raw.hlen(f"{lite.stream.key}:suspects") == 0


def test_a_text_that_fits_no_memory_is_buried_and_the_others_are_scored_in_smaller_batches(lite: Bench) -> None:
    class Cramped(ScoringModel):
        """Its device has room for 40 tokens."""

        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            inner = self.engine

            class Small:
                name, batches = inner.name, inner.batches

                def run(self, batches: Any) -> Any:
                    if any(batch.tokens > 40 for batch in batches):
                        raise DeviceFull("no room")
                    return inner.run(batches)

            self.engine = Small()

    champion = lite.holding(Cramped)
    long = wire("long", "雨が降って悲しい" * 30)
    lite.stream.publish([wire(i, f"今日は嬉しい{i}") for i in range(20)] + [long] + [wire(i) for i in range(20, 30)])
    assert lite.worker(champion).drain() == 30
    assert set(lite.scored()) == {str(i) for i in range(30)}
    [letter] = lite.rows(DeadLetter)
    assert letter["payload"] == long
    assert "failed (DeviceFull) 3 times" in letter["reason"]
    assert 8 < champion.model.token_budget <= 40, "what the others need, not what the long text would"
    lite.stream.publish([wire(i, f"今日も嬉しい{i}") for i in range(30, 60)])
    assert lite.worker(champion).drain() == 30
    assert champion.model.token_budget <= 40
    assert lite.stream.depth().idle


# --- a device or a database causes the failure


@pytest.mark.parametrize("kind", [BrokenDevice, Diverged])
def test_broken_device_buries_nobody(bench: Bench, kind: type[ScoringModel]) -> None:
    broken = bench.holding(kind)
    bench.stream.publish([wire(i) for i in range(3)])

    def failed() -> bool:
        with contextlib.suppress(Exception):
            bench.worker(broken, min_idle_seconds=0.02).drain()
        return bench.rows(DeadLetter) != [] or max(bench.deliveries(), default=0) > 6

    wait_until(failed)
    assert bench.rows(DeadLetter) == []
    assert bench.stream.depth().pending == 3
    bench.recovers()
    assert bench.rows(DeadLetter) == []
    assert set(bench.scored()) == {"0", "1", "2"}


@on_postgresql
def test_database_that_refuses_to_write_is_waited_for_and_buries_nobody(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    """As PostgreSQL does for a while after a failover."""
    bench.promote()
    bench.stream.publish([wire(i) for i in range(3)])
    name = bench.database.engine.url.database
    with bench.database.begin() as session:
        session.execute(text(f"ALTER DATABASE {name} SET default_transaction_read_only = on"))
    bench.database.close()

    drained = threading.Thread(target=bench.worker().drain)
    drained.start()
    wait_until(lambda: "the database does not answer, trying again" in caplog.text)
    assert bench.scored() == {}
    assert bench.deliveries() == [1, 1, 1]
    with bench.database.begin() as session:
        session.execute(text("SET TRANSACTION READ WRITE"))
        session.execute(text(f"ALTER DATABASE {name} RESET default_transaction_read_only"))
    bench.database.close()  # connections made before keep the old default
    drained.join(PATIENCE_SECONDS)
    assert not drained.is_alive()
    bench.recovers()
    assert bench.rows(DeadLetter) == []
    assert set(bench.scored()) == {"0", "1", "2"}
