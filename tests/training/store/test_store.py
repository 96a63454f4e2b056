"""Models, datasets and checkpoints on a real S3 server, used by machines that share only it and the database."""

import hashlib
import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from db import jobs, registry
from db.models import EpochMetric, ModelVersion, Prediction
from db.session import Database
from tests.conftest import LABELS, PATIENCE_SECONDS, wait_until
from tests.support.bench import Bench
from tests.support.s3 import S3, s3_server
from tests.support.training_jobs import NEVER, count, job_of, left_in, running, shorten
from training.errors import BadArtifact, ModelUnavailable, StoreUnavailable
from training.jobs.inputs import fetched_base_model, store_base_model
from training.jobs.run import run_next_job
from training.store.cache import Cache
from training.store.paths import file_sha256
from training.store.sealed_folder import SUMS, seal, verify
from training.store.store import Store
from worker.connections import input_store, model_store, training_context
from worker.intake.submit_job import submit_training
from worker.scoring.champion import Champion
from worker.scoring.scoring_model import Serving, load_model, serving_from
from worker.settings import Settings, load_settings

MIB = 1024 * 1024


@pytest.fixture(scope="module")
def s3() -> Iterator[S3]:
    with s3_server() as server:
        yield server


@pytest.fixture
def machine(s3: S3, tmp_path: Path) -> Callable[[str], Settings]:
    """Settings of a machine with a home of its own and the test's stores on S3."""
    place = s3.url(tmp_path.name + str(time.time_ns()))

    def make(name: str, **more: Any) -> Settings:
        return load_settings(
            home=tmp_path / name, model_store=f"{place}/models", dataset_store=f"{place}/data",
            checkpoint_store=f"{place}/jobs", engine="torch-float32", **more,
        )  # fmt: skip

    return make


def sealed(folder: Path, *sizes: int) -> str:
    """A sealed folder of files of random bytes; returns its digest."""
    draft = folder.with_name(f"{folder.name}.draft")
    draft.mkdir(parents=True)
    for number, size in enumerate(sizes):
        (draft / f"{number}.bin").write_bytes(os.urandom(size))
    return seal(draft, folder)


@pytest.fixture
def far(s3: S3, tmp_path: Path) -> SimpleNamespace:
    """A store on S3 with a cache of 2.5 MiB, and a way to put folders of 1 MiB there, without a copy here."""
    store = Store(s3.url(f"far-{time.time_ns()}"), Cache(tmp_path / "cache", round(2.5 * MIB)))

    def put(name: str, *sizes: int) -> str:
        sha256 = sealed(tmp_path / "made" / name, *(sizes or (MIB,)))
        store.remote.upload(tmp_path / "made" / name, name)
        return sha256

    return SimpleNamespace(store=store, put=put, cache=tmp_path / "cache")


def test_one_machine_submits_another_trains_a_third_scores(
    machine: Callable[[str], Settings], s3: S3, sqlite: Database, labelled_csv: Path, tiny_encoder: Path
) -> None:
    asks, trains, scores = (machine(name) for name in ("asks", "trains", "scores"))
    job = submit_training(asks, sqlite, labelled_csv, "fast", base_model=str(tiny_encoder), epochs=1)
    assert job.dataset.startswith("s3://")
    assert job.config["base_model"].startswith("s3://")
    assert run_next_job(sqlite, training_context(trains), "there", NEVER) == job.id
    assert (job_of(sqlite, job.id).state, job_of(sqlite, job.id).error) == ("succeeded", None)
    with sqlite.begin() as session:
        version = registry.of_job(session, job.id)
        assert version is not None
    assert version.artifact_url == f"{trains.model_store}/job-{job.id}-1"
    model = load_model(version, serving_from(scores))
    assert model.spec.labels == ["negative", "positive"]
    assert len(model.score(["嬉しい"])) == 1
    # The run leaves no files, and each machine keeps its copy in its cache.
    assert left_in(scores.home / "models") == left_in(trains.home / "jobs") == []
    assert not [name for name in s3.names() if f"{trains.checkpoint_store}".removeprefix("s3://tweetscore/") in name]
    copy = model_store(scores).place(version.artifact_url, version.sha256)
    verify(copy, version.sha256)
    assert copy == scores.home / "cache" / version.sha256


def test_a_copy_that_is_here_needs_no_store(far: SimpleNamespace, s3: S3) -> None:
    sha256 = far.put("model")
    url = far.store.url_of("model")
    with far.store.fetched(url, sha256):
        pass
    s3.files.rm(url, recursive=True)
    with far.store.fetched(url, sha256) as folder:
        verify(folder, sha256)


def test_a_damaged_copy_is_fetched_again(far: SimpleNamespace) -> None:
    sha256 = far.put("model")
    with far.store.fetched(far.store.url_of("model"), sha256) as folder:
        (folder / "0.bin").write_bytes(b"damaged")
    with far.store.fetched(far.store.url_of("model"), sha256) as folder:
        assert (folder / "0.bin").stat().st_size == MIB


def test_what_was_damaged_in_the_store_is_refused_and_leaves_no_copy(far: SimpleNamespace, s3: S3) -> None:
    sha256 = far.put("model")
    url = far.store.url_of("model")
    with s3.files.open(f"{url}/0.bin", "wb") as file:
        file.write(b"damaged")
    with pytest.raises(BadArtifact, match="damaged"), far.store.fetched(url, sha256):
        pass
    with pytest.raises(BadArtifact, match="is not the artifact"), far.store.fetched(url, "0" * 64):
        pass
    with pytest.raises(BadArtifact, match="is not in"), far.store.fetched(far.store.url_of("none"), sha256):
        pass
    assert [name for name in left_in(far.cache) if name != "locks"] == []


def test_the_copy_used_longest_ago_makes_room_and_one_in_use_stays(far: SimpleNamespace) -> None:
    urls = {name: (far.store.url_of(name), far.put(name)) for name in ("a", "b", "c", "d")}

    def here() -> set[str]:
        return {name for name, (_, sha256) in urls.items() if (far.cache / sha256).is_dir()}

    for name in ("a", "b", "a"):
        with far.store.fetched(*urls[name]):
            pass
    with far.store.fetched(*urls["c"]):
        assert here() == {"a", "c"}  # b was used before a
    with far.store.fetched(*urls["a"]), far.store.fetched(*urls["d"]):
        assert here() == {"a", "d"}
    with far.store.fetched(*urls["a"]), far.store.fetched(*urls["d"]), far.store.fetched(*urls["b"]):
        assert here() == {"a", "b", "d"}  # more than the limit, since all are in use


@pytest.mark.parametrize(
    "url", ["s3://elsewhere/model", "{store}/../secrets", "{store}", "{store}/", "{store}s/model", "file:///etc"]
)
def test_a_url_that_leads_out_of_the_store_is_refused(far: SimpleNamespace, url: str) -> None:
    with pytest.raises(BadArtifact, match="outside"):
        far.store.place(url.format(store=far.store.remote.url), "0" * 64)


def test_digests_that_name_files_elsewhere_are_refused(far: SimpleNamespace, s3: S3) -> None:
    sums = f"{'0' * 64}  ../../escaped\n".encode()
    with s3.files.open(f"{far.store.url_of('evil')}/{SUMS}", "wb") as file:
        file.write(sums)
    with (
        pytest.raises(BadArtifact, match="no file of its folder"),
        far.store.fetched(far.store.url_of("evil"), hashlib.sha256(sums).hexdigest()),
    ):
        pass


def _fetch(folder: Path, log: Path) -> None:
    def fill(draft: Path) -> None:
        with log.open("a") as file:
            file.write("fetched\n")
        time.sleep(0.5)
        (draft / "file").write_text("whole")

    def check(copy: Path) -> None:
        if (copy / "file").read_text() != "whole":
            raise BadArtifact("torn")

    with Cache(folder, MIB).entry("key", lambda: 5, fill, check) as place:
        assert (place / "file").read_text() == "whole"


def test_processes_that_want_the_same_at_once_fetch_it_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    started = [context.Process(target=_fetch, args=(tmp_path / "cache", tmp_path / "log")) for _ in range(4)]
    for process in started:
        process.start()
    for process in started:
        process.join(PATIENCE_SECONDS)
    assert [process.exitcode for process in started] == [0] * 4
    assert (tmp_path / "log").read_text() == "fetched\n"


@pytest.mark.slow
def test_a_trainer_that_must_end_leaves_its_checkpoint_to_another_machine(
    machine: Callable[[str], Settings], s3: S3, sqlite: Database, labelled_csv: Path, tiny_encoder: Path
) -> None:
    here, there = machine("here"), machine("there")
    job = submit_training(here, sqlite, labelled_csv, "fast", base_model=str(tiny_encoder), epochs=1000)
    stopping = threading.Event()
    with running(sqlite, training_context(here), job.id, stopping):
        wait_until(lambda: count(sqlite, EpochMetric) > 1)
        stopping.set()
    done = count(sqlite, EpochMetric)
    shutil.rmtree(here.home)  # that machine is lost
    shorten(sqlite, job.id, done + 2)
    with sqlite.begin() as session:
        before = [(epoch.epoch, epoch.seconds) for epoch in jobs.epochs(session, job.id)]
    assert run_next_job(sqlite, training_context(there), "there", NEVER) == job.id
    assert (job_of(sqlite, job.id).state, job_of(sqlite, job.id).error) == ("succeeded", None)
    with sqlite.begin() as session:
        after = [(epoch.epoch, epoch.seconds) for epoch in jobs.epochs(session, job.id)]
    assert after[:done] == before  # unchanged: no epoch ran again
    assert len(after) == done + 2
    prefix = str(here.checkpoint_store).removeprefix("s3://tweetscore/")
    assert [name for name in s3.names() if name.startswith(prefix)] == []


def test_a_fault_met_while_an_encoder_is_held_stays_what_it_is(
    machine: Callable[[str], Settings], tiny_encoder: Path
) -> None:
    inputs = input_store(machine("home"))
    name = store_base_model(inputs, tiny_encoder)
    with pytest.raises(BadArtifact, match="a checkpoint"), fetched_base_model(name, None, inputs, []):
        raise BadArtifact("a checkpoint is damaged")
    with (
        pytest.raises(ModelUnavailable, match="is not in"),
        fetched_base_model(name.replace("tiny-", "other-"), None, input_store(machine("another")), []),
    ):
        pass


# --- the server becomes unavailable


@pytest.fixture
def fragile(tmp_path: Path) -> Iterator[S3]:
    """A server for one test, which may kill it."""
    with s3_server() as server:
        yield server


@pytest.mark.slow
def test_a_server_killed_in_mid_fetch_leaves_no_copy_and_the_next_fetch_goes_on(fragile: S3, tmp_path: Path) -> None:
    def models() -> Store:
        return Store(fragile.url("models"), Cache(tmp_path / "cache", 1000 * MIB))

    made = tmp_path / "made" / "model"
    sha256 = sealed(made, MIB, 10 * MIB)
    store = models()
    assert store.remote is not None
    store.remote.upload(made, "model")
    draft, url = tmp_path / "cache" / f".{sha256}.draft", store.url_of("model")

    def fetch() -> None:
        with models().fetched(url, sha256) as folder:
            verify(folder, sha256)

    with fragile.killed_after(5 * MIB), pytest.raises(StoreUnavailable, match="does not answer"):
        fetch()
    assert 0 < (draft / "1.bin").stat().st_size < 10 * MIB  # it was in the middle
    assert not (tmp_path / "cache" / sha256).exists()
    first = (draft / "0.bin").stat().st_mtime_ns
    fragile.start()
    store.remote.upload(made, "model")
    fetch()
    assert (tmp_path / "cache" / sha256 / "0.bin").stat().st_mtime_ns == first  # not fetched a second time
    assert not draft.exists()


@pytest.mark.slow
def test_a_champion_whose_store_is_away_waits_for_it_and_the_old_one_goes_on(
    fragile: S3, lite: Bench, tmp_path: Path, tiny_artifact: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(fragile.url("models"), Cache(tmp_path / "cache", 1000 * MIB))
    assert store.remote is not None
    serves = Serving(store, device="cpu", engine="torch-float32")

    def promote(name: str, folder: Path) -> int:
        with lite.database.begin() as session:
            version = ModelVersion(
                base_model="tiny", artifact_url=store.url_of(name), sha256=file_sha256(folder / SUMS), labels=LABELS,
                cleaner_version="1",
            )  # fmt: skip
            registry.add_version(session, version, [], [], [])
            registry.assign(session, registry.CHAMPION, version.id)
        return version.id

    store.remote.upload(tiny_artifact.folder, "first")
    first = promote("first", tiny_artifact.folder)
    champion = Champion(lite.database, serves)
    model = champion.current()
    assert model is not None
    second_folder = shutil.copytree(tiny_artifact.folder, tmp_path / "second")
    (second_folder / "note.txt").write_text("another")
    seal(second_folder, tmp_path / "sealed")
    fragile.kill()
    second = promote("second", tmp_path / "sealed")
    wait_until(lambda: champion.current() is not None and champion.loading_since is not None)
    wait_until(lambda: champion.current() is not None and champion.loading_since is None)
    assert champion.current().version_id == first  # type: ignore[union-attr]
    fragile.start()
    store.remote.upload(tmp_path / "sealed", "second")
    wait_until(lambda: champion.current().version_id == second)  # type: ignore[union-attr]
    assert count(lite.database, Prediction) == 0


def test_a_trainer_goes_on_without_the_store_of_its_checkpoints(
    fragile: S3, tmp_path: Path, sqlite: Database, labelled_csv: Path, tiny_encoder: Path
) -> None:
    settings = load_settings(
        home=tmp_path / "home", checkpoint_store=fragile.url("jobs"), read_roots=(tiny_encoder.parent,)
    )
    job = submit_training(settings, sqlite, labelled_csv, "fast", base_model=str(tiny_encoder), epochs=2)
    fragile.kill()
    assert run_next_job(sqlite, training_context(settings), "here", NEVER) == job.id
    assert (job_of(sqlite, job.id).state, job_of(sqlite, job.id).error) == ("succeeded", None)


def test_a_job_whose_dataset_is_out_of_reach_is_given_back_with_the_reason(
    fragile: S3, tmp_path: Path, sqlite: Database, labelled_csv: Path, tiny_encoder: Path
) -> None:
    settings = load_settings(home=tmp_path / "home", dataset_store=fragile.url("data"), read_roots=(tmp_path,))
    job = submit_training(settings, sqlite, labelled_csv, "fast", base_model="starter", epochs=1)
    fragile.kill()
    assert run_next_job(sqlite, training_context(settings), "here", NEVER) == job.id
    assert (job_of(sqlite, job.id).state, job_of(sqlite, job.id).attempts) == ("queued", 0)
    assert "s3://tweetscore/data does not answer" in job_of(sqlite, job.id).error


def test_the_command_refuses_a_store_of_a_kind_nobody_knows(tweetscore: Callable[..., Any]) -> None:
    ran = tweetscore("jobs", "list", TWEETSCORE_MODEL_STORE="floppy://a")
    assert ran.returncode == 2
    assert "TWEETSCORE_MODEL_STORE is 'floppy://a'" in ran.stderr


def test_deleting_a_model_takes_it_out_of_the_store(
    machine: Callable[..., Settings], s3: S3, tweetscore: Callable[..., Any], tiny_artifact: Any, tmp_path: Path
) -> None:
    settings = machine("home")
    url = f"sqlite:///{tmp_path / 'models.db'}"
    assert model_store(settings).remote is not None
    model_store(settings).remote.upload(tiny_artifact.folder, "tiny")
    from worker.connections import open_sql

    with open_sql(settings.model_copy(update={"database_url": url})).begin() as session:
        registry.add_version(
            session,
            ModelVersion(
                base_model="tiny", artifact_url=model_store(settings).url_of("tiny"), sha256=tiny_artifact.sha256,
                labels=LABELS, cleaner_version="1",
            ), [], [], [],
        )  # fmt: skip
    given = {"TWEETSCORE_MODEL_STORE": str(settings.model_store), "DATABASE_URL": url}
    assert "tiny" in tweetscore("models", "show", "1", **given).stdout
    scored = tweetscore("score", "-", "--model", "1", "--json", stdin='{"id": "1", "text": "嬉しい"}\n', **given)
    assert '"model_version_id": 1' in scored.stdout, scored.stderr
    ran = tweetscore("models", "delete", "1", **given)
    assert ran.returncode == 0, ran.stderr
    assert [name for name in s3.names() if "/models/tiny" in name and str(settings.model_store)[5:30] in name] == []
