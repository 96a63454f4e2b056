"""The challenger scores a share of the tweets after the champion, and gives way to it."""

import os
import threading

import pytest

from tests.conftest import PATIENCE_SECONDS, wait_until
from tests.support.bench import DRAINED, Bench, draining, wire
from tests.support.rows import assign
from tests.support.shadows import WINDOW_TWEETS, counts, scored_by, shadowed, two_models
from worker.scoring import shadow as shadow_module
from worker.scoring.shadow import QUEUED_WINDOWS, QUIET_RECORDS, Shadow, in_share


def test_challenger_scores_its_share_of_the_same_tweets_in_every_worker_and_none_once_it_is_champion(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shadow_module, "CHECK_SECONDS", 0.0)
    versions = two_models(bench)
    tweets = [wire(i) for i in range(300)]
    expected = {str(i) for i in range(300) if in_share(str(i), 0.4)}
    assert 80 < len(expected) < 160
    for _ in range(2):  # the second worker gets the same tweets again
        with shadowed(bench, 0.4) as worker, counts("tweets", len(expected)):
            bench.stream.publish(tweets)
            assert worker.drain() == 300
    assert scored_by(bench, versions.challenger) == expected
    assert scored_by(bench, versions.champion) == {str(i) for i in range(300)}
    assert bench.stream.depth() == DRAINED

    with shadowed(bench, 1.0) as worker:
        assign(bench.database, versions.challenger)
        with counts("tweets", 0):
            bench.stream.publish([wire("promoted")])
            worker.drain()
        assign(bench.database, versions.champion, "challenger")  # followed from the next window on
        with counts("tweets", 1):
            bench.stream.publish([wire("swapped")])
            worker.drain()
    assert "promoted" in scored_by(bench, versions.challenger)
    assert "promoted" not in scored_by(bench, versions.champion)
    assert "swapped" in scored_by(bench, versions.challenger) & scored_by(bench, versions.champion)


def test_challenger_waits_while_the_champion_is_busy_and_drops_tweets_while_more_wait_than_a_window_holds(
    lite: Bench,
) -> None:
    versions = two_models(lite)
    waiting, asked = [WINDOW_TWEETS + 1], [0]

    def backlog() -> int:
        asked.append(waiting[0])
        return waiting[0]

    with shadowed(lite, backlog=backlog) as worker:
        with counts("dropped", 20, reason="busy"):
            lite.stream.publish([wire(f"busy {i}") for i in range(20)])
            assert worker.drain() == 20
        waiting[0] = WINDOW_TWEETS
        with counts("tweets", 5):
            lite.stream.publish([wire(f"free {i}") for i in range(5)])
            assert worker.drain() == 5
            wait_until(lambda: asked[-2:] == [WINDOW_TWEETS, WINDOW_TWEETS])  # it waits for the champion
            assert scored_by(lite, versions.challenger) == set()
            waiting[0] = QUIET_RECORDS
    assert scored_by(lite, versions.challenger) == {f"free {i}" for i in range(5)}
    assert len(scored_by(lite, versions.champion)) == 25


def test_a_challenger_that_stands_still_holds_nothing_up_and_its_queue_stays_short(lite: Bench) -> None:
    versions, begun, go = two_models(lite), threading.Event(), threading.Event()

    def stands_still() -> int:
        begun.set()
        assert go.wait(PATIENCE_SECONDS)
        return 0

    windows = QUEUED_WINDOWS + 3
    with shadowed(lite, backlog=stands_still) as worker:
        with draining(worker):
            lite.stream.publish([wire("first")])
            assert begun.wait(PATIENCE_SECONDS)
        with counts("dropped", windows - QUEUED_WINDOWS, reason="busy"):
            for number in range(windows):
                lite.stream.publish([wire(number)])
                assert worker.drain() == 1
        assert lite.stream.depth() == DRAINED
        assert len(scored_by(lite, versions.champion)) == windows + 1
        assert scored_by(lite, versions.challenger) == set()
        with counts("tweets", QUEUED_WINDOWS + 1):
            go.set()
    assert scored_by(lite, versions.challenger) == {"first", *map(str, range(QUEUED_WINDOWS))}


def test_a_stop_drops_what_the_challenger_has_queued(lite: Bench) -> None:
    versions = two_models(lite)
    begun, go = threading.Event(), threading.Event()

    def stops_meanwhile() -> int:
        begun.set()
        assert go.wait(PATIENCE_SECONDS)
        return 0

    with shadowed(lite, backlog=stops_meanwhile) as worker:
        for number in range(3):
            lite.stream.publish([wire(number)])
            assert worker.drain() == 1
            assert begun.wait(PATIENCE_SECONDS)
        shadow: Shadow = worker.after_commit.__self__  # type: ignore[attr-defined]
        shadow._stopping.set()
        go.set()
        wait_until(lambda: not shadow._thread.is_alive())
    assert scored_by(lite, versions.challenger) == set()
    assert len(scored_by(lite, versions.champion)) == 3


def test_a_challenger_computes_with_a_lower_priority_than_the_champion(lite: Bench) -> None:
    two_models(lite)
    with shadowed(lite) as worker:
        with counts("tweets", 1):
            lite.stream.publish([wire(1)])
            worker.drain()
        shadow: Shadow = worker.after_commit.__self__  # type: ignore[attr-defined]
        thread = shadow._computing.submit(threading.get_native_id).result()
        champion = os.getpriority(os.PRIO_PROCESS, 0)
        assert os.getpriority(os.PRIO_PROCESS, thread) == min(19, champion + shadow_module.NICENESS)


def test_without_a_share_no_challenger_is_loaded(lite: Bench) -> None:
    versions = two_models(lite)
    with counts("tweets", 0), counts("dropped", 0, reason="busy"), shadowed(lite, share=0.0) as worker:
        lite.stream.publish([wire(1)])
        assert worker.drain() == 1
        shadow: Shadow = worker.after_commit.__self__  # type: ignore[attr-defined]
        assert shadow.challenger.version_id is None
    assert scored_by(lite, versions.challenger) == set()


def test_a_larger_share_contains_a_smaller_one() -> None:
    ids = [str(i) for i in range(2_000)]
    tenth, half = ({id_ for id_ in ids if in_share(id_, share)} for share in (0.1, 0.5))
    assert tenth < half
    assert 140 < len(tenth) < 260
    assert all(in_share(id_, 1.0) and not in_share(id_, 0.0) for id_ in ids)
