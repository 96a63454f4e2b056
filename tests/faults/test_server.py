"""Faults of the embedded server: stopped, killed, its file damaged, owned twice, orphaned."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

from tests.conftest import wait_until
from tests.support.servers import contents, fill, is_running, log_file, orphan, owner_process, server_pid, short_home
from worker.errors import ServerFailed, ServerRunning
from worker.stream import embedded_valkey
from worker.stream.stream import Depth


@pytest.fixture
def home() -> Iterator[Path]:
    with short_home() as folder:
        yield folder


def test_09_stream_group_pending_list_and_counts_survive_a_server_that_is_stopped(home: Path) -> None:
    with embedded_valkey.owned(home) as server:
        fill(server)
        before = contents(server)
        pid = server_pid(server)
    assert not is_running(pid)
    assert before[1] == Depth(length=20, lag=15, pending=4)
    with embedded_valkey.owned(home) as server:
        assert contents(server) == before


def test_10_stream_group_pending_list_and_counts_survive_a_server_that_is_killed(home: Path) -> None:
    with embedded_valkey.owned(home) as server:
        fill(server)
        before = contents(server)
        pid = server_pid(server)
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not is_running(pid))
        wait_until(lambda: embedded_valkey.find(home))
        assert server_pid(server) != pid, "its owner restarted it"
        assert contents(server) == before
    assert before[1] == Depth(length=20, lag=15, pending=4)
    with embedded_valkey.owned(home) as server:
        assert contents(server) == before


def test_11_a_log_with_its_tail_cut_off_starts_without_the_last_record_and_it_is_said(
    home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with embedded_valkey.owned(home) as server, redis.Redis.from_url(server.url) as client:
        for i in range(20):
            client.xadd("tweets", {"tweet": f"record {i}"})
        whole = client.xrange("tweets")
    os.truncate(log_file(home), log_file(home).stat().st_size - 30)
    with embedded_valkey.owned(home) as server, redis.Redis.from_url(server.url) as client:
        assert client.xrange("tweets") == whole[:-1]
    assert "the last records before the crash are lost" in caplog.text
    caplog.clear()
    with embedded_valkey.owned(home):
        assert caplog.text == "", "the log is repaired now"


def test_12_a_log_damaged_in_the_middle_is_refused_in_the_servers_words(home: Path) -> None:
    with embedded_valkey.owned(home) as server:
        fill(server, 200)
        before = contents(server)
    path = log_file(home)
    whole = path.read_bytes()
    middle = len(whole) // 2
    path.write_bytes(whole[:middle] + b"\xff" * 60 + whole[middle + 60 :])
    with pytest.raises(ServerFailed, match=r"(?i)bad file format.*append only file.*\(log: .*valkey\.log\)"):
        embedded_valkey.owned(home).__enter__()
    assert embedded_valkey.find(home) is None
    path.write_bytes(whole)
    with embedded_valkey.owned(home) as server:
        assert contents(server) == before


def test_13_a_second_server_on_a_home_is_refused_while_the_first_lives(home: Path) -> None:
    with owner_process(home) as owner:
        server = embedded_valkey.find(home)
        assert server is not None
        fill(server)
        before = contents(server)
        with pytest.raises(ServerRunning, match=rf"already runs on {home} \(owner: process {owner.pid}\)"):
            embedded_valkey.owned(home).__enter__()
        with embedded_valkey.running(home) as shared:
            assert shared == server
        assert contents(server) == before, "a process that shares a server leaves it running"
        pid = server_pid(server)
    assert not is_running(pid)


@pytest.mark.parametrize("door", [embedded_valkey.owned, embedded_valkey.running])
def test_14_an_orphan_of_a_killed_parent_is_adopted_with_its_data_and_stopped_at_the_end(
    home: Path, door: Callable[..., object]
) -> None:
    before: list[object] = []

    def prepare(server: embedded_valkey.Server) -> None:
        fill(server)
        before.append(contents(server))

    with orphan(home, prepare) as pid:
        with door(home) as server:
            assert server_pid(server) == pid, "the same server, not a second one on its files"
            assert [contents(server)] == before
            with pytest.raises(ServerRunning, match=f"owner: process {os.getpid()}"):
                embedded_valkey.owned(home).__enter__()
        assert not is_running(pid)
    assert not server.socket.exists()
