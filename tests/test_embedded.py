"""The embedded server: private, durable, one a home, adopted when its owner was killed, and gone when it should be."""

import os
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import redis

from tests.conftest import wait_until
from worker import embedded
from worker.errors import ServerFailed, ServerRunning
from worker.stream import Depth, Stream, connect

OWN_UNTIL_STDIN_ENDS = """
import sys
from pathlib import Path
from worker import embedded
with embedded.owned(Path(sys.argv[1])):
    print("up", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def home() -> Iterator[Path]:
    """A home whose path is short enough for a socket wherever the tests' own folders lie."""
    with tempfile.TemporaryDirectory(prefix="ts", dir="/tmp") as folder:
        yield Path(folder) / "home"


def server_pid(server: embedded.Server) -> int:
    with redis.Redis.from_url(server.url) as client:
        return int(client.info("server")["process_id"])


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def fill(server: embedded.Server, count: int = 20) -> None:
    """A stream in which a reader holds some records and has acknowledged one."""
    with connect(server.url) as client:
        stream = Stream(client, "tweets", "scorers", "reader")
        stream.ensure_group()
        stream.publish([f"record {i}".encode() * 10 for i in range(count)])
        stream.ack([stream.read(5, None)[0].id])


def contents(server: embedded.Server) -> tuple[list[object], Depth, list[object]]:
    """Records, depth, and every pending record with its reader and count."""
    with connect(server.url) as client:
        stream = Stream(client, "tweets", "scorers")
        held = client.xpending_range("tweets", "scorers", "-", "+", 100)
        return (
            client.xrange("tweets"),
            stream.depth(),
            [(row["message_id"], row["consumer"], row["times_delivered"]) for row in held],
        )


def log_file(home: Path) -> Path:
    """The file of the append-only log that grows."""
    (found,) = (home / "valkey" / "appendonlydir").glob("*.incr.aof")
    return found


@contextmanager
def owner_process(home: Path, **environment: str) -> Iterator["subprocess.Popen[str]"]:
    """Another process that owns the home's server; ends it as `owned` does unless it was killed."""
    with subprocess.Popen(
        [sys.executable, "-c", OWN_UNTIL_STDIN_ENDS, str(home)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, **environment},
    ) as process:  # fmt: skip
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "up\n"
            yield process
        finally:
            process.stdin.close()
            process.wait(60)


@contextmanager
def orphan(home: Path, prepare: Callable[[embedded.Server], None] = fill) -> Iterator[int]:
    """A server whose owner was killed without a chance to stop it; yields its process number."""
    with owner_process(home) as owner:
        server = embedded.find(home)
        assert server is not None
        pid = server_pid(server)
        prepare(server)
        owner.kill()
        owner.wait()
    try:
        assert is_running(pid)
        yield pid
    finally:
        if is_running(pid):
            os.kill(pid, signal.SIGKILL)


# --- who may talk to it


def test_server_listens_for_its_owner_alone_and_on_no_port(home: Path) -> None:
    with embedded.owned(home) as server:
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
    with embedded.owned(odd) as server:
        assert len(os.fsencode(server.socket)) <= embedded.LONGEST_SOCKET_PATH
        assert stat.S_IMODE(server.socket.stat().st_mode) == 0o700
        assert stat.S_IMODE(server.socket.parent.stat().st_mode) == 0o700
        assert embedded.find(odd) == server
        assert embedded.find(home / "another") is None
        fill(server)
        assert log_file(odd).stat().st_size > 0
    assert not server.socket.exists()


def test_socket_folder_that_leads_elsewhere_is_refused(tmp_path: Path) -> None:
    """In a temporary folder of everybody's, somebody may have put a link where the sockets belong."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / f"tweetscore-{os.getuid()}").symlink_to(tmp_path / "elsewhere")
    refused = subprocess.run(
        [sys.executable, "-c", OWN_UNTIL_STDIN_ENDS, str(tmp_path / "with a space")],
        input="", capture_output=True, text=True, timeout=60, env={**os.environ, "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    assert "ServerFailed" in refused.stderr
    assert "belongs to somebody else; set TWEETSCORE_HOME" in refused.stderr
    assert list((tmp_path / "elsewhere").iterdir()) == []


# --- what survives


@pytest.mark.parametrize("ending", ["stopped", "killed"])
def test_stream_group_and_pending_list_survive_a_server(home: Path, ending: str) -> None:
    with embedded.owned(home) as server:
        fill(server)
        before = contents(server)
        pid = server_pid(server)
        if ending == "killed":
            os.kill(pid, signal.SIGKILL)
            wait_until(lambda: not is_running(pid))
            assert embedded.find(home) is None
    assert not is_running(pid)
    assert before[1] == Depth(length=20, lag=15, pending=4)
    with embedded.owned(home) as server:
        assert contents(server) == before


def test_client_goes_on_when_the_server_comes_back(home: Path) -> None:
    with embedded.owned(home) as server:
        client = connect(server.url)
        stream = Stream(client, "tweets", "scorers")
        stream.publish([b"before"])
    with embedded.owned(home), client:
        stream.publish([b"after"])
        assert stream.length() == 2


def test_log_with_its_tail_cut_off_starts_without_the_last_record(home: Path) -> None:
    with embedded.owned(home) as server, redis.Redis.from_url(server.url) as client:
        for i in range(20):
            client.xadd("tweets", {"tweet": f"record {i}"})
        whole = client.xrange("tweets")
    os.truncate(log_file(home), log_file(home).stat().st_size - 30)
    with embedded.owned(home) as server, redis.Redis.from_url(server.url) as client:
        assert client.xrange("tweets") == whole[:-1]
    assert "truncated" in (home / "valkey" / "valkey.log").read_text().lower()


def test_log_damaged_in_the_middle_is_refused_in_the_servers_words(home: Path) -> None:
    with embedded.owned(home) as server:
        fill(server, 200)
        before = contents(server)
    path = log_file(home)
    whole = path.read_bytes()
    middle = len(whole) // 2
    path.write_bytes(whole[:middle] + b"\xff" * 60 + whole[middle + 60 :])
    with pytest.raises(ServerFailed, match=r"(?i)bad file format.*append only file.*\(log: .*valkey\.log\)"):
        embedded.owned(home).__enter__()
    assert embedded.find(home) is None
    path.write_bytes(whole)
    with embedded.owned(home) as server:
        assert contents(server) == before


# --- one a home


def test_second_owner_is_refused_while_the_first_lives(home: Path) -> None:
    with owner_process(home) as owner:
        server = embedded.find(home)
        assert server is not None
        fill(server)
        before = contents(server)
        with pytest.raises(ServerRunning, match=rf"already runs on {home} \(owner: process {owner.pid}\)"):
            embedded.owned(home).__enter__()
        with embedded.running(home) as shared:
            assert shared == server
        assert contents(server) == before, "whoever shares a server leaves it running"
        pid = server_pid(server)
    assert not is_running(pid)


def test_server_started_for_one_command_ends_with_it(home: Path) -> None:
    assert embedded.find(home) is None
    with embedded.running(home) as server:
        pid = server_pid(server)
    assert not is_running(pid)
    assert embedded.find(home) is None


@pytest.mark.parametrize("door", [embedded.owned, embedded.running])
def test_orphan_is_adopted_with_its_data_and_stopped_at_the_end(home: Path, door: Callable[..., object]) -> None:
    before: list[object] = []

    def prepare(server: embedded.Server) -> None:
        fill(server)
        before.append(contents(server))

    with orphan(home, prepare) as pid:
        with door(home) as server:
            assert server_pid(server) == pid, "the same server, not a second one on its files"
            assert [contents(server)] == before
            with pytest.raises(ServerRunning, match=f"owner: process {os.getpid()}"):
                embedded.owned(home).__enter__()
        assert not is_running(pid)
    assert not server.socket.exists()


def test_server_starts_beside_the_traces_of_a_killed_owner_and_server(home: Path) -> None:
    with orphan(home) as pid:
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not is_running(pid))
    assert embedded.socket_path(home).exists(), "the traces this is about"
    with embedded.owned(home) as server:
        assert server_pid(server) != pid
        assert contents(server)[1] == Depth(length=20, lag=15, pending=4)


@pytest.mark.parametrize("action", ["stop", "look at a dead socket"])
def test_nobody_waits_for_a_server_that_is_gone(home: Path, action: str) -> None:
    with embedded.owned(home) as server:
        if action == "look at a dead socket":
            os.kill(server_pid(server), signal.SIGKILL)
            began = time.monotonic()
            wait_until(lambda: embedded.find(home) is None)
            assert time.monotonic() - began < 2
        began = time.monotonic()
    assert time.monotonic() - began < 2
