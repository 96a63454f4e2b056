"""Access rights: users of the server, TLS, roots of files, code that comes with a model, and the content of logs."""

import json
import pickle
import re
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis
import torch
from celery import Celery
from redis.exceptions import NoPermissionError
from sqlalchemy import select, text
from sqlalchemy.exc import StatementError

import worker as tweetscore_package
from db import migrate
from db.errors import DatabaseError, TweetscoreError, public_url
from db.models import ModelVersion, TrainingJob
from db.session import Database, open_database
from tests.conftest import wait_until
from tests.support.bench import wire
from tests.support.commands import worker
from tests.support.pages import section
from tests.support.paths import ROOT
from tests.support.world import World, on_postgresql, on_sqlite
from training.config import make_config
from training.data.dataset import find_dataset
from training.errors import BadArtifact, BadDataset, ModelUnavailable
from training.model.base_model import BaseModelFolder, resolve_base_model
from training.model.classifier import build_model
from training.store.paths import folder_from_url
from training.text.tokenizer import load_tokenizer
from worker.app import SCORING, broker_url, make_app, nudge
from worker.connections import broker
from worker.errors import BadSettings, StreamDenied, StreamError
from worker.settings import load_settings
from worker.stream import embedded_valkey
from worker.stream.redis_client import connect
from worker.stream.stream import Stream

UNSAFE = re.compile(r"\b(pickle|dill|joblib|marshal)\.loads?\b|trust_remote_code=True")
SECRET_TEXT = "秘密の文章"
PASSWORDS = {"producer": "p-geheim-1", "worker": "w-geheim-2"}
Run = Callable[..., subprocess.CompletedProcess[str]]


# --- files and models from outside


@pytest.mark.parametrize(
    "name",
    ["/etc/passwd", "../outside.csv", "link.csv", "file:///etc/passwd", "s3://b/x.csv", "http://h/x.csv", "a\0b", ""],
)
def test_a_dataset_outside_its_roots_is_refused_however_it_is_named(tmp_path: Path, name: str) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "outside.csv").write_text("label,text\n")
    (root / "link.csv").symlink_to(tmp_path / "outside.csv")
    named = name if name.startswith(("/", "file:", "s3:", "http:")) or not name else str(root / name)
    with pytest.raises(BadDataset) as refused:
        find_dataset(named, [root])
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "name", ["file:///etc", "s3://bucket/model", "https://host/model", "a/b/c", "../x", "x/..", "a\0"]
)
def test_a_base_model_that_is_no_hub_name_and_in_no_root_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ModelUnavailable):
        resolve_base_model(name, None, [tmp_path])


@pytest.mark.parametrize(
    "url", ["s3://bucket/m", "http://h/m", "file://host/m", "/plain", "file:///etc", "{store}/../x", "{store}/link"]
)
def test_a_model_outside_the_store_is_never_loaded(tmp_path: Path, url: str) -> None:
    store = tmp_path / "store"
    store.mkdir()
    (tmp_path / "x").mkdir()
    (store / "link").symlink_to(tmp_path / "x")
    (store / "model").mkdir()
    assert folder_from_url((store / "model").as_uri(), store) == store / "model"
    with pytest.raises(BadArtifact) as refused:
        folder_from_url(url.format(store=store.as_uri()), store)
    assert "\n" not in str(refused.value)


@on_sqlite
def test_a_champion_whose_url_leads_out_of_the_store_is_refused(own: World, tiny_artifact: Any) -> None:
    with own.database.begin() as session:
        version = session.get_one(ModelVersion, own.champion)
        version.artifact_url = tiny_artifact.folder.as_uri()
    with embedded_valkey.owned(own.settings.home), own.worker() as scorer:
        wait_until(lambda: "lies outside the model store" in scorer.said())
        own.stream.publish([wire(1)])
        assert own.predictions() == 0


def test_code_that_comes_with_a_model_is_not_run(tmp_path: Path, tiny_encoder: Path) -> None:
    folder, marker = tmp_path / "coded", tmp_path / "ran"
    folder.mkdir()
    config = {
        "model_type": "coded",
        "auto_map": {"AutoConfig": "evil.C", "AutoModel": "evil.M", "AutoTokenizer": ["evil.T", None]},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": config["auto_map"]}))
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w').write('ran')\n")
    for load in (
        lambda: load_tokenizer(folder),
        lambda: build_model(BaseModelFolder("coded", folder), 2, make_config("fast", pooling="mean")),
    ):
        with pytest.raises(ModelUnavailable) as refused:
            load()
        assert "\n" not in str(refused.value)
    assert not marker.exists()


class Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return open, (str(self.marker), "w")


def test_a_pickle_in_place_of_weights_is_not_run(tmp_path: Path, tiny_encoder: Path) -> None:
    folder, marker = tmp_path / "pickled", tmp_path / "ran"
    folder.mkdir()
    (folder / "config.json").write_bytes((tiny_encoder / "config.json").read_bytes())
    for name, write in (
        ("plain", lambda p: p.write_bytes(pickle.dumps(Bomb(marker)))),
        ("zip", lambda p: torch.save(Bomb(marker), p)),
    ):
        write(folder / "pytorch_model.bin")
        with pytest.raises(ModelUnavailable):
            build_model(BaseModelFolder(name, folder), 2, make_config("fast", pooling="mean"))
        assert not marker.exists()


def test_weights_are_safetensors_and_torch_load_reads_our_own_state_alone() -> None:
    found = {}
    for folder in ("db", "training", "worker"):
        for path in (ROOT / folder).rglob("*.py"):
            source = path.read_text(encoding="utf-8")
            assert not UNSAFE.search(source), path
            if calls := re.findall(r"torch\.load\([^)]*\)", source):
                found[path.relative_to(ROOT).as_posix()] = calls
    assert list(found) == ["training/loop/checkpoints.py"]
    assert all("weights_only=True" in call for call in found["training/loop/checkpoints.py"])


# --- messages and logs


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://u:geheim@h:1/0", "redis://u:***@h:1/0"),
        ("unix://u:geheim@/a.sock?db=1", "unix://u:***@/a.sock?db=1"),
        ("postgresql://u:ge%40heim@h/d?sslmode=require", "postgresql://u:***@h/d?sslmode=require"),
        ("postgresql://h/d?password=geheim&sslpassword=geheim", "postgresql://h/d?password=***&sslpassword=***"),
        ("sqlite:////a/b.db", "sqlite:////a/b.db"),
    ],
)  # fmt: skip
def test_a_url_is_shown_without_its_passwords(url: str, shown: str) -> None:
    assert public_url(url) == shown


def test_an_error_of_the_database_shows_no_parameters(database: Database) -> None:
    with pytest.raises(StatementError) as failed, database.begin() as session:
        session.execute(text("INSERT INTO nowhere VALUES (:text)"), {"text": SECRET_TEXT})
    assert SECRET_TEXT not in str(failed.value)


def test_an_unreachable_database_is_named_without_its_password(tmp_path: Path) -> None:
    opened = open_database(f"postgresql://u:geheim@/name?host={tmp_path}&sslpassword=geheim")
    with pytest.raises(DatabaseError, match=r"u:\*\*\*@") as caught:
        migrate.upgrade(opened)
    assert "geheim" not in str(caught.value)


@on_sqlite
def test_the_folders_below_the_home_are_their_owners_alone(own: World) -> None:
    with broker(own.settings):
        assert (own.settings.home.stat().st_mode & 0o777) == 0o700, "others can reach no file below it"
        assert (own.settings.home / "valkey").stat().st_mode & 0o077 == 0


# --- users of the server


def acl_lines() -> list[str]:
    lines = re.findall(r"^    (ACL SETUSER .*)$", section("Security", "docs/operations.md"), re.MULTILINE)
    return [line.replace("PASSWORD", PASSWORDS[line.split()[2]]) for line in lines]


@pytest.fixture
def guarded(own: World) -> Iterator[World]:
    """The embedded server with the users of docs/operations.md and no other."""
    with embedded_valkey.owned(own.settings.home):
        raw = own.raw
        for line in acl_lines():
            raw.execute_command(*line.split())
        raw.execute_command("ACL", "SETUSER", "guard", "on", ">x", "+@all", "~*", "&*")
        guard = redis.Redis.from_url(url_of(own, "guard", "x"))
        guard.execute_command("ACL", "SETUSER", "default", "off")
        yield own
        guard.execute_command("ACL", "SETUSER", "default", "on", "nopass", "+@all", "~*", "&*")


def url_of(world: World, user: str, password: str | None = None) -> str:
    return world.url.replace("unix://", f"unix://{user}:{password or PASSWORDS[user]}@")


@on_sqlite
def test_a_producer_may_add_tweets_and_nothing_else(guarded: World) -> None:
    client = redis.Redis.from_url(url_of(guarded, "producer"))
    assert client.xadd("tweets", {"tweet": wire(1)})
    for refused in (
        lambda: client.xadd("elsewhere", {"tweet": wire(1)}),
        lambda: client.xread({"tweets": "0"}),
        lambda: client.xlen("tweets"),
        lambda: client.delete("tweets"),
        lambda: client.lpush("scoring", "x"),
        client.flushall,
        lambda: client.config_get("*"),
    ):
        with pytest.raises(NoPermissionError):
            refused()
    with pytest.raises(redis.AuthenticationError):
        redis.Redis.from_url(url_of(guarded, "producer", "wrong")).ping()


@on_sqlite
def test_a_worker_may_not_do_what_workers_never_do(guarded: World) -> None:
    client = redis.Redis.from_url(url_of(guarded, "worker"))
    for refused in (
        client.flushall, client.keys, lambda: client.config_set("maxmemory", "1"), client.shutdown,
        lambda: client.set("anything", "x"), lambda: client.execute_command("ACL", "LIST"),
    ):  # fmt: skip
        with pytest.raises(NoPermissionError):
            refused()
    stream = Stream(client, "elsewhere", "scorers")
    with pytest.raises(StreamDenied):
        stream.length()
    assert isinstance(StreamDenied("x"), StreamError)


@pytest.mark.slow
@on_postgresql
def test_with_those_users_everything_works_and_no_log_holds_a_password_or_a_tweet(
    guarded: World,
    labelled_csv: Path,
    tweetscore: Run,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    labelled_csv.write_text(labelled_csv.read_text().replace("日だった", SECRET_TEXT), encoding="utf-8")
    given = {**guarded.given, "redis_url": url_of(guarded, "worker")}
    producer = {
        "TWEETSCORE_HOME": str(given["home"]),
        "REDIS_URL": url_of(guarded, "producer"),
        "DATABASE_URL": given["database_url"],
    }
    said = []
    with worker(given, "score") as scorer, worker(given, "train") as trainer:
        redis.Redis.from_url(url_of(guarded, "producer")).xadd("tweets", {"tweet": wire("bare", SECRET_TEXT)})
        redis.Redis.from_url(url_of(guarded, "producer")).xadd("tweets", {"tweet": f'{{"no id": "{SECRET_TEXT}"}}'})
        pushed = tweetscore("push", "-", stdin=json.dumps({"id": "pushed", "text": SECRET_TEXT}) + "\n", **producer)
        assert pushed.returncode == 0, pushed.stderr
        for name, value in producer.items():
            monkeypatch.setenv(name, value)
        assert tweetscore_package.publish([{"id": "published", "text": SECRET_TEXT}]) == 1
        wait_until(lambda: guarded.scored() == {"bare", "pushed", "published"})
        job_id = guarded.submit(labelled_csv, epochs=1)
        assert guarded.ends(job_id, "succeeded").attempts == 1
        Celery(broker=broker_url(given["redis_url"])).send_task(
            "worker.tasks.train", kwargs={"dataset": 7, "epochs": "many", "x" * 50: SECRET_TEXT}, queue="training"
        )

        def refused() -> list[TrainingJob]:
            with guarded.database.read() as session:
                return list(session.scalars(select(TrainingJob).where(TrainingJob.state == "failed")))

        wait_until(refused)
        assert "\n" not in refused()[0].error
        said += [scorer.said(), trainer.said(), pushed.stdout, pushed.stderr]
    (letter,) = guarded.dead()
    said += [letter["reason"], *capfd.readouterr(), (guarded.settings.home / "valkey" / "valkey.log").read_text()]
    for name, secret in {**PASSWORDS, "tweet": SECRET_TEXT}.items():
        assert not [text for text in said if secret in text], f"a log holds the secret of {name}"
    assert "NOPERM" not in "".join(said)
    assert "Traceback" not in "".join(said)


@on_sqlite
def test_a_nudge_says_nothing_of_tweets(own: World) -> None:
    with embedded_valkey.owned(own.settings.home):
        own.stream.publish([wire(1, SECRET_TEXT)])
        assert nudge(make_app(own.settings), SCORING)
        (message,) = own.raw.lrange("scoring", 0, -1)
        headers = json.loads(message)["headers"]
        assert (headers["argsrepr"], headers["kwargsrepr"]) == ("()", "{}")
        assert SECRET_TEXT.encode() not in message


# --- TLS


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ca.pem signs host.pem for localhost; other.pem signs nothing."""
    folder = tmp_path_factory.mktemp("tls")
    for name in ("ca", "other"):
        made = f"-keyout {name}.key -out {name}.pem -days 2 -subj /CN={name}"
        _openssl(folder, f"req -x509 -newkey rsa:2048 -nodes {made}")
    _openssl(folder, "req -newkey rsa:2048 -nodes -keyout host.key -out host.csr -subj /CN=localhost")
    (folder / "names").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\n")
    signed = "x509 -req -in host.csr -CA ca.pem -CAkey ca.key -CAcreateserial -out host.pem -days 2 -extfile names"
    _openssl(folder, signed)
    return folder


def _openssl(folder: Path, arguments: str) -> None:
    subprocess.run(["openssl", *arguments.split()], cwd=folder, check=True, capture_output=True)


@contextmanager
def tls_front(target: Path, certificates: Path) -> Iterator[int]:
    """TLS on a port of the loopback, before a server's Unix socket: what a TLS-terminating server is to its clients."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates / "host.pem", certificates / "host.key")
    listener = socket.create_server(("127.0.0.1", 0))

    def copy(source: Any, sink: Any) -> None:
        try:
            while data := source.recv(65536):
                sink.sendall(data)
        except OSError:
            pass
        finally:
            for end in (source, sink):
                end.close()

    def serve() -> None:
        while True:
            try:
                raw, _ = listener.accept()
            except OSError:
                return
            try:
                client = context.wrap_socket(raw, server_side=True)
                server = socket.socket(socket.AF_UNIX)
                server.connect(str(target))
            except OSError:
                continue
            for pair in ((client, server), (server, client)):
                threading.Thread(target=copy, args=pair, daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.close()


def test_rediss_speaks_tls_for_stream_and_celery_and_refuses_a_wrong_certificate(
    server: embedded_valkey.Server, certificates: Path, tmp_path: Path
) -> None:
    with tls_front(server.socket, certificates) as port:
        url = f"rediss://localhost:{port}/0?ssl_ca_certs={certificates / 'ca.pem'}"
        assert connect(url).ping()
        settings = load_settings(home=tmp_path / "home", redis_url=url)
        assert nudge(make_app(settings), SCORING)
        wrong = f"rediss://127.0.0.1:{port}/0?ssl_ca_certs={certificates / 'other.pem'}"
        with pytest.raises(StreamError, match=r"(?i)certificate"):
            Stream(connect(wrong), "tweets", "scorers").length()
        assert not nudge(make_app(load_settings(home=tmp_path / "home", redis_url=wrong)), SCORING)
    with pytest.raises(BadSettings, match="REDIS_URL"):
        make_app(load_settings(home=tmp_path / "home", redis_url="rediss://h/0?ssl_cert_reqs=maybe"))


def test_sslmode_reaches_the_database(postgresql: str) -> None:
    opened = open_database(f"{postgresql}&sslmode=disable")
    migrate.upgrade(opened)
    opened.close()
    # A Unix socket has no TLS, so an `sslmode` that cannot be met must be refused, not ignored.
    with pytest.raises(TweetscoreError) as refused:
        migrate.upgrade(open_database(f"{postgresql}&sslmode=nonsense"))
    assert "sslmode" in str(refused.value)
    assert "\n" not in str(refused.value)
