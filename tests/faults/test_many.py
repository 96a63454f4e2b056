"""Many scorers on one stream: each gets a share, no tweet is scored twice, and scorers may join and leave."""

import signal
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack

import pytest

from db.models import ScoringWindow
from tests.conftest import wait_until
from tests.support.actors import Actor
from tests.support.bench import wire
from tests.support.world import World, on_postgresql, on_sqlite

pytestmark = pytest.mark.slow
# Several seconds of work: with less, one scorer waits for the database most of the time.
TWEETS = 24_000


def shares(world: World) -> Counter[str]:
    """Worker -> tweets it scored."""
    found: Counter[str] = Counter()
    for row in world.rows(ScoringWindow):
        found[row["worker"]] += row["tweets"]
    return found


def publish(world: World, first: int, count: int) -> None:
    world.stream.publish([wire(i, f"雨が降る{i}") for i in range(first, first + count)])


@on_postgresql
def test_four_scorers_have_fair_shares_and_do_nothing_twice(world: World, report: Callable[[str], None]) -> None:
    with ExitStack() as stack:
        actors = [stack.enter_context(world.worker(window_tweets=64, min_idle_seconds=30)) for _ in range(4)]
        wait_until(lambda: all("is the champion now" in actor.said() for actor in actors))
        publish(world, 0, TWEETS)
        world.drained()
    assert world.predictions() == world.passes() == TWEETS
    found = shares(world)
    assert len(found) == 4
    # A fair share is a quarter. The kernel decides which process runs, so the limits are wide.
    report(f"shares of four scorers: {', '.join(f'{n / TWEETS:.0%}' for n in sorted(found.values()))}")
    assert min(found.values()) > TWEETS / 40, found
    assert max(found.values()) < TWEETS * 0.6, found
    assert world.dead() == []


@on_sqlite
def test_scorers_that_join_and_leave_under_load_lose_nothing_and_do_nothing_twice(world: World) -> None:
    given = {"window_tweets": 64, "min_idle_seconds": 30}
    with ExitStack() as stack:
        actors: list[Actor] = [stack.enter_context(world.worker(**given)) for _ in range(2)]
        for portion in range(4):
            publish(world, portion * 1_000, 1_000)
            wait_until(lambda portion=portion: world.predictions() > portion * 1_000)
            actors.append(stack.enter_context(world.worker(**given)))
            leaving = actors.pop(0)
            leaving.send(signal.SIGTERM)
            assert leaving.ended() == 0
        world.drained()
    # They shut down cleanly, so no other worker had to claim their records.
    assert world.predictions() == world.passes() == 4_000
    assert world.dead() == []
