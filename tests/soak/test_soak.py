"""An hour of steady load while parts are killed: `pytest -m soak`; `pytest --help` lists its options."""

import fcntl
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import psycopg
import pytest

from tests.soak.plan import Plan
from tests.soak.soak import Soak, make_world
from tests.support.outages import breakable
from tests.support.servers import short_home

DEFAULT_MINUTES = {"postgresql": 60.0, "sqlite": 10.0}


@pytest.fixture
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Wait for other soaks, also those of other runs: two at once would measure each other."""
    with (tmp_path_factory.getbasetemp().parent / "soak.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.mark.soak
@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("kind", ["postgresql", "sqlite"])
def test_a_soak_loses_no_tweet_scores_none_twice_and_its_memory_stays_flat(
    kind: str, tmp_path: Path, report: Callable[[str], None], request: pytest.FixtureRequest
) -> None:
    minutes, rate, folder = (request.config.getoption(f"--soak-{name}") for name in ("minutes", "rate", "folder"))
    plan = Plan(minutes or DEFAULT_MINUTES[kind])
    table = Path(folder or tmp_path).absolute() / f"soak-{kind}.md"
    table.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        home = stack.enter_context(short_home())
        url, _ = breakable(kind, home.parent, stack)
        world = make_world(home, url, plan)
        stack.callback(world.database.close)
        soak = Soak(world, plan, _server_of(url) if kind == "postgresql" else None, rate, table)
        try:
            soak.run()
        finally:
            if table.exists():
                print(f"{table}\n{table.read_text(encoding='utf-8')}")
        assert soak.faults == []
    report(f"soak: {table}\n{table.read_text(encoding='utf-8')}")


def _server_of(url: str) -> int:
    """The process id of the server that serves this PostgreSQL database."""
    with psycopg.connect(url) as connection:
        found = psutil.Process(connection.info.backend_pid).parent()
    assert found is not None
    return found.pid
