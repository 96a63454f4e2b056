"""The embedded server: private, durable, one a home, adopted when its owner was killed, and gone when it should be."""

import os
import signal
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import redis

from tests.conftest import wait_until
from tests.support.servers import (
    contents,
    fill,
    is_running,
    log_file,
    orphan,
    server_pid,
    short_home,
)
from worker.errors import ServerFailed
from worker.stream import embedded_valkey, server_supervisor
from worker.stream.redis_client import connect
from worker.stream.stream import Depth, Stream


@pytest.fixture
def home() -> Iterator[Path]:
    with short_home() as folder:
        yield folder


# --- who may talk to it


def test_server_listens_for_its_owner_alone_and_on_no_port(home: Path) -> None:
    with embedded_valkey.owned(home) as server:
        pid = server_pid(server)
        assert server.socket == home / "valkey" / "valkey.sock"
        assert stat.S_ISSOCK(server.socket.stat().st_mode)
        assert stat.S_IMODE(server.socket.stat().st_mode) == 0o700
        assert stat.S_IMODE(server.socket.parent.stat().st_mode) == 0o700
        assert psutil.Process(pid).net_connections(kind="inet") == []
        with redis.Redis.from_url(server.url) as client:
            wanted = {"port": "0", "appendonly": "yes", "maxmemory-policy": "noeviction"}
            assert {name: client.config_get(name)[name] for name in wanted} == wanted
    assert not is_running(pid)
    assert not server.socket.exists()


@pytest.mark.parametrize("name", ["with a space", "日本語", "l" * 120, 'a "quote" and a \\'])
def test_any_home_path_holds_a_server_and_its_data(home: Path, name: str) -> None:
    odd = home / name
    with embedded_valkey.owned(odd) as server:
        assert len(os.fsencode(server.socket)) <= embedded_valkey.LONGEST_SOCKET_PATH
        assert stat.S_IMODE(server.socket.stat().st_mode) == 0o700
        assert stat.S_IMODE(server.socket.parent.stat().st_mode) == 0o700
        assert embedded_valkey.find(odd) == server
        assert embedded_valkey.find(home / "another") is None
        fill(server)
        assert log_file(odd).stat().st_size > 0
    assert not server.socket.exists()


def test_socket_folder_that_leads_elsewhere_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder that every user may write to, another user may have put a link where the sockets belong."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / f"tweetscore-{os.getuid()}").symlink_to(tmp_path / "elsewhere")
    monkeypatch.setattr(embedded_valkey, "SHORT_FOLDER", tmp_path)
    with (
        pytest.raises(ServerFailed, match="belongs to another user or is a link; set TWEETSCORE_HOME"),
        embedded_valkey.owned(tmp_path / "with a space"),
    ):
        pass
    assert list((tmp_path / "elsewhere").iterdir()) == []


# --- what survives


def test_client_goes_on_when_the_server_comes_back(home: Path) -> None:
    with embedded_valkey.owned(home) as server:
        client = connect(server.url)
        stream = Stream(client, "tweets", "scorers")
        stream.publish([b"before"])
    with embedded_valkey.owned(home), client:
        stream.publish([b"after"])
        assert stream.length() == 2


# --- one a home


def test_server_started_for_one_command_ends_with_it(home: Path) -> None:
    assert embedded_valkey.find(home) is None
    with embedded_valkey.running(home) as server:
        pid = server_pid(server)
    assert not is_running(pid)
    assert embedded_valkey.find(home) is None


def test_server_starts_beside_the_traces_of_a_killed_owner_and_server(home: Path) -> None:
    with orphan(home) as pid:
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not is_running(pid))
    assert embedded_valkey.socket_path(home).exists(), "the traces this is about"
    with embedded_valkey.owned(home) as server:
        assert server_pid(server) != pid
        assert contents(server)[1] == Depth(length=20, lag=15, pending=4)


@pytest.mark.parametrize("action", ["stop", "look at a dead socket"])
def test_nobody_waits_for_a_server_that_is_gone(home: Path, action: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_supervisor, "FIRST_PAUSE_SECONDS", 600.0)
    with embedded_valkey.owned(home) as server:
        if action == "look at a dead socket":
            os.kill(server_pid(server), signal.SIGKILL)
            began = time.monotonic()
            wait_until(lambda: embedded_valkey.find(home) is None)
            assert time.monotonic() - began < 10
        began = time.monotonic()
    assert time.monotonic() - began < 10
