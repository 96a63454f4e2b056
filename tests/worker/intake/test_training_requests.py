"""Requests to train that are Celery messages: none is lost or made twice, and their sender is told the outcome.

A real worker serves the file, on the embedded server and SQLite; another program reads Celery's default queue.
"""

import json
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import redis
from celery import Celery, chain, chord, states
from celery.exceptions import TaskRevokedError
from celery.result import AsyncResult
from sqlalchemy import select

from db import jobs
from db.models import TrainingJob
from db.session import open_database
from tests.conftest import PATIENCE_SECONDS, wait_until, write_labelled
from tests.support.actors import acting, killed_at
from tests.support.adapting import store_tweets
from tests.support.commands import worker
from tests.support.scraped import log_lines, metrics_port, scraped
from tests.support.world import World, on_postgresql
from worker.app import TRAINING, broker_url
from worker.intake.request_queue import RequestQueue, read_request
from worker.intake.submit_job import submit_training
from worker.settings import load_settings
from worker.stream import embedded_valkey

TRAIN, ADAPT, CANCEL = "worker.tasks.train", "worker.tasks.adapt", "worker.tasks.cancel"
OTHER_PROGRAM = """
import sys
from celery import Celery
app = Celery("other", broker=sys.argv[1], backend=sys.argv[1])
@app.task(name="other.notify")
def notify(result): return {"notified": result}
@app.task(name="other.failed")
def failed(task_id): return task_id
app.worker_main("worker -l INFO --pool solo -n other@h --without-mingle --without-gossip".split())
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_encoder: Path) -> Iterator[SimpleNamespace]:
    """A home with a server and a training worker, and `client`, a program that has only Celery."""
    home = tmp_path_factory.mktemp("requests") / "home"
    given = {
        "home": home, "watch_seconds": 0.1, "base_model": str(tiny_encoder), "read_roots": (tiny_encoder.parent,),
        "lease_seconds": 60, "metrics_port": 0,
    }  # fmt: skip
    dataset = write_labelled(tiny_encoder.parent / "requests.csv")
    with embedded_valkey.owned(home) as server, worker(given, "train") as trainer:
        url = broker_url(server.url)
        yield SimpleNamespace(
            given=given, dataset=str(dataset), trainer=trainer, url=url, server=server,
            client=Celery(broker=url, backend=url), database=open_database(f"sqlite:///{home / 'tweetscore.db'}"),
            raw=redis.Redis.from_url(server.url, decode_responses=True),
        )  # fmt: skip


def ask(place: SimpleNamespace, **options: Any) -> AsyncResult:
    given = {"dataset": place.dataset, "epochs": 1, **options}
    return place.client.send_task(TRAIN, kwargs=given, queue=TRAINING)


def job_of(place: SimpleNamespace, request_id: str) -> TrainingJob | None:
    with place.database.read() as session:
        return jobs.of_request(session, request_id)


def running(place: SimpleNamespace, result: AsyncResult) -> bool:
    job = job_of(place, result.id)
    return job is not None and job.step > 0


@contextmanager
def other_program(url: str, folder: Path) -> Iterator[Path]:
    """A Celery worker of somebody else on the same broker; yields its log."""
    log = folder / "other.log"
    with log.open("w") as output:
        process = subprocess.Popen([sys.executable, "-c", OTHER_PROGRAM, url], stdout=output, stderr=output)
    try:
        wait_until(lambda: " ready." in log.read_text())
        yield log
    finally:
        process.kill()
        process.wait()


# --- what a client is told


def test_a_result_goes_from_started_over_progress_to_success_with_figures_and_expires(place: SimpleNamespace) -> None:
    asked, heard = ask(place, epochs=8), []
    assert asked.state == states.PENDING
    answer = asked.get(timeout=PATIENCE_SECONDS, on_message=lambda message: heard.append(message))
    wait_until(lambda: job_of(place, asked.id).message is None)
    job = job_of(place, asked.id)
    assert job.state == "succeeded"
    assert answer["job_id"] == job.id
    assert answer["model_version_id"] is not None
    assert {"accuracy", "f1_macro", "tfidf_f1_macro"} <= set(answer["metrics"])
    told = list(dict.fromkeys(message["status"] for message in heard))
    assert told == [states.STARTED, "PROGRESS", states.SUCCESS]
    progress = [message["result"] for message in heard if message["status"] == "PROGRESS"]
    assert set(progress[0]) == {"job_id", "step", "total_steps", "epoch", "loss"}
    assert all(1 <= said["epoch"] <= 8 and said["total_steps"] == job.total_steps for said in progress)
    assert 0 < place.raw.ttl(f"celery-task-meta-{asked.id}") <= 7 * 86_400


@pytest.mark.slow
def test_a_request_to_adapt_a_base_model_returns_its_name_for_later_jobs(place: SimpleNamespace) -> None:
    store_tweets(place.database)
    asked = place.client.send_task(ADAPT, kwargs={"epochs": 1, "max_length": 32}, queue=TRAINING)
    answer = asked.get(timeout=PATIENCE_SECONDS)
    job = job_of(place, asked.id)
    assert (job.kind, job.state, answer["job_id"]) == ("adapt", "succeeded", job.id)
    assert set(answer["metrics"]) == {"loss_before", "loss_after"}
    trained = ask(place, base_model=answer["base_model"]).get(timeout=PATIENCE_SECONDS)
    assert trained["model_version_id"] is not None
    refused = place.client.send_task(ADAPT, args=["labelled.csv"], queue=TRAINING)
    with pytest.raises(Exception, match="dataset is not a setting"):
        refused.get(timeout=PATIENCE_SECONDS)


def test_a_job_that_fails_raises_its_sentence(place: SimpleNamespace) -> None:
    asked = ask(place, dataset="/etc/passwd")
    with pytest.raises(Exception, match="'/etc/passwd' lies outside the folders this worker may read") as raised:
        asked.get(timeout=PATIENCE_SECONDS)
    assert type(raised.value).__name__ == "JobFailed"
    assert asked.state == states.FAILURE
    refused = ask(place, epochs=0)
    with pytest.raises(Exception, match="epochs is 0"):
        refused.get(timeout=PATIENCE_SECONDS)
    assert "Traceback" not in place.trainer.said()


def test_get_returns_for_each_of_two_requests_though_the_worker_was_busy_when_the_second_came(
    place: SimpleNamespace,
) -> None:
    first, second = ask(place, epochs=3), ask(place)
    assert second.get(timeout=PATIENCE_SECONDS)["job_id"] == job_of(place, second.id).id
    assert first.get(timeout=PATIENCE_SECONDS)["job_id"] == job_of(place, first.id).id


def test_get_returns_when_another_worker_ended_the_job(place: SimpleNamespace) -> None:
    """The job's row ends without this worker: here it is cancelled in SQL while it waits behind another."""
    first, second = ask(place, epochs=1000), ask(place)
    wait_until(lambda: running(place, first) and job_of(place, second.id) is not None)
    with place.database.begin() as session:
        jobs.request_cancel(session, jobs.of_request(session, second.id).id)
    with pytest.raises(TaskRevokedError):
        second.get(timeout=PATIENCE_SECONDS)
    first.revoke()
    with pytest.raises(TaskRevokedError):
        first.get(timeout=PATIENCE_SECONDS)


@pytest.mark.parametrize("how", ["revoke", "job_id", "request_id"])
def test_a_running_job_is_cancelled_and_its_result_is_revoked(place: SimpleNamespace, how: str) -> None:
    asked = ask(place, epochs=1000)
    wait_until(lambda: running(place, asked))
    if how == "revoke":
        asked.revoke()
    else:
        names = {"job_id": job_of(place, asked.id).id} if how == "job_id" else {"request_id": asked.id}
        answer = place.client.send_task(CANCEL, kwargs=names, queue=TRAINING).get(timeout=PATIENCE_SECONDS)
        assert answer["job_id"] == job_of(place, asked.id).id
    with pytest.raises(TaskRevokedError):
        asked.get(timeout=PATIENCE_SECONDS)
    assert asked.state == states.REVOKED
    assert job_of(place, asked.id).state == "cancelled"


@pytest.mark.parametrize("how", ["revoke", "cancel"])
def test_a_request_that_was_cancelled_before_it_came_is_no_job_to_run(place: SimpleNamespace, how: str) -> None:
    id_ = uuid.uuid4().hex
    if how == "revoke":
        place.client.control.revoke(id_, reply=True, timeout=PATIENCE_SECONDS, limit=1)
    else:
        said = place.client.send_task(CANCEL, kwargs={"request_id": id_}, queue=TRAINING)
        assert said.get(timeout=PATIENCE_SECONDS)["state"] == "cancelled"
    asked = place.client.send_task(TRAIN, kwargs={"dataset": place.dataset}, queue=TRAINING, task_id=id_)
    with pytest.raises(TaskRevokedError):
        asked.get(timeout=PATIENCE_SECONDS)
    assert (job_of(place, id_).state, job_of(place, id_).attempts) == ("cancelled", 0)


def test_a_request_that_expired_before_a_worker_took_it_is_cancelled(place: SimpleNamespace) -> None:
    asked = place.client.send_task(TRAIN, kwargs={"dataset": place.dataset}, queue=TRAINING, expires=-1)
    with pytest.raises(TaskRevokedError):
        asked.get(timeout=PATIENCE_SECONDS)
    wait_until(lambda: job_of(place, asked.id).message is None)
    assert "expired" in job_of(place, asked.id).error


def test_a_request_that_is_sent_again_when_its_result_has_expired_is_told_again(place: SimpleNamespace) -> None:
    asked = ask(place, dataset="/etc/passwd")
    with pytest.raises(Exception, match="outside the folders"):
        asked.get(timeout=PATIENCE_SECONDS)
    wait_until(lambda: job_of(place, asked.id).message is None)
    place.raw.delete(f"celery-task-meta-{asked.id}")
    again = place.client.send_task(TRAIN, kwargs={"dataset": place.dataset}, queue=TRAINING, task_id=asked.id)
    with pytest.raises(Exception, match="outside the folders"):
        again.get(timeout=PATIENCE_SECONDS)


def test_cancelling_a_job_that_is_not_there_fails_with_a_sentence(place: SimpleNamespace) -> None:
    with pytest.raises(Exception, match="there is no job 999999"):
        place.client.send_task(CANCEL, kwargs={"job_id": 999_999}, queue=TRAINING).get(timeout=PATIENCE_SECONDS)


@pytest.mark.slow
def test_what_is_chained_behind_a_job_runs_when_it_has_ended_with_its_result(
    place: SimpleNamespace, tmp_path: Path
) -> None:
    """`chain`, `link` and `chord`; and `link_error` of one that failed."""
    train = place.client.signature(TRAIN, kwargs={"dataset": place.dataset, "epochs": 1}, queue=TRAINING)
    bad = place.client.signature(TRAIN, kwargs={"dataset": "/etc/passwd"}, queue=TRAINING)
    notify, failed = place.client.signature("other.notify"), place.client.signature("other.failed")
    with other_program(place.url, tmp_path):
        chained = chain(train, notify).apply_async()
        joined = chord([train, train])(notify)
        broken = chain(bad, notify).apply_async(link_error=failed)
        ended = chained.get(timeout=PATIENCE_SECONDS)["notified"]
        assert ended == chained.parent.get(timeout=PATIENCE_SECONDS)
        assert job_of(place, chained.parent.id).id == ended["job_id"]
        both = joined.get(timeout=PATIENCE_SECONDS)["notified"]
        assert [one["model_version_id"] is not None for one in both] == [True, True]
        with pytest.raises(Exception, match="outside the folders"):
            broken.get(timeout=PATIENCE_SECONDS)


def test_a_trainer_names_the_job_in_every_line_about_it(place: SimpleNamespace) -> None:
    asked = ask(place)
    asked.get(timeout=PATIENCE_SECONDS)
    job_id = job_of(place, asked.id).id
    wait_until(lambda: scraped(metrics_port(place.trainer))["jobs", "succeeded"] > 0)
    assert ("model_version", "") not in scraped(metrics_port(place.trainer)), "a trainer has no model"
    about = [line for line in log_lines(place.trainer.said()) if f"job {job_id}:" in line["event"]]
    assert len(about) > 2
    assert {line["job"] for line in about} == {job_id}


def test_nudges_store_nothing(place: SimpleNamespace) -> None:
    before = set(place.raw.keys("celery-task-meta-*"))
    with place.database.read() as session:
        known = set(session.scalars(select(TrainingJob.request_id)))
    job_id = submit_training(load_settings(**place.given), place.database, place.dataset, epochs=1).id
    place.client.send_task(TRAIN, queue=TRAINING, ignore_result=True)
    with place.database.read() as session:
        wait_until(lambda: (session.rollback(), jobs.get(session, job_id).finished_at)[1])
        asked = {jobs.get(session, job_id).request_id} | known
    new = {key.removeprefix("celery-task-meta-") for key in set(place.raw.keys("celery-task-meta-*")) - before}
    assert new <= asked


def test_a_failed_job_is_a_failed_task_to_those_who_watch_events(place: SimpleNamespace) -> None:
    """What Flower shows is made of these."""
    seen: dict[str, list[str]] = {}
    good = bad = None

    def note(event: dict[str, Any]) -> None:
        seen.setdefault(event.get("uuid", ""), []).append(event["type"])
        ended = good and bad and ("task-succeeded" in seen.get(good.id, ()), "task-failed" in seen.get(bad.id, ()))
        receiver.should_stop = ended == (True, True)

    with place.client.connection() as connection:
        receiver = place.client.events.Receiver(connection, handlers={"*": note})
        hearing = receiver.itercapture(limit=None, timeout=PATIENCE_SECONDS, wakeup=False)
        next(hearing)  # its consumer is there from now on
        good, bad = ask(place), ask(place, dataset="/etc/passwd")
        for _ in hearing:
            pass
    assert seen[good.id][:2] == ["task-received", "task-started"]
    assert (seen[good.id][-1], seen[bad.id][-1]) == ("task-succeeded", "task-failed")


# --- queues


def test_tasks_of_other_programs_stay_in_the_default_queue(place: SimpleNamespace) -> None:
    place.raw.delete("celery")
    theirs = place.client.send_task("other.task")
    ours = place.client.send_task(TRAIN, kwargs={"dataset": place.dataset})
    asked = ask(place)
    asked.get(timeout=PATIENCE_SECONDS)
    waiting = [json.loads(raw)["headers"]["id"] for raw in place.raw.lrange("celery", 0, -1)]
    assert {theirs.id, ours.id} <= set(waiting)
    # A worker that is told to takes ours out of it, and leaves theirs.
    inbox = RequestQueue(redis.Redis.from_url(place.server.url), f"q{uuid.uuid4().hex}", "own", shared=True)
    assert [read_request(raw).id for raw in inbox.take(0.01)] == [ours.id]
    assert [json.loads(raw)["headers"]["id"] for raw in place.raw.lrange("celery", 0, -1)] == [theirs.id]
    place.raw.delete("celery")


def test_requests_of_every_priority_protocol_and_packing_are_taken(place: SimpleNamespace) -> None:
    sent = [
        place.client.send_task(TRAIN, args=["/etc/passwd"], queue=TRAINING, priority=5),
        place.client.send_task(TRAIN, args=["/etc/passwd", "fast"], queue=TRAINING, compression="gzip"),
    ]
    old = Celery(broker=place.url, backend=place.url)
    old.conf.task_protocol = 1
    sent.append(old.send_task(TRAIN, kwargs={"dataset": "/etc/passwd"}, queue=TRAINING))
    for asked in sent:
        with pytest.raises(Exception, match="outside the folders"):
            asked.get(timeout=PATIENCE_SECONDS)


def test_a_message_that_is_no_task_is_refused_and_the_next_is_worked(place: SimpleNamespace) -> None:
    place.raw.lpush(TRAINING, "{broken", json.dumps({"body": "x"}), "7")
    with pytest.raises(Exception, match="outside the folders"):
        ask(place, dataset="/etc/passwd").get(timeout=PATIENCE_SECONDS)
    assert place.raw.llen(f"{TRAINING}:taken") == 0
    assert place.trainer.said().count("that are not a Celery message") == 3


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"dataset": "a\x00b"}, "NUL"),
        ({"labels": {"a\x00": "b", "c": "d"}}, "NUL"),
        ({"epochs": float("nan")}, "epochs is nan"),
        ({"base_model": "a/../b"}, r"'a/\.\./b' is not a hub name"),
        ({"dataset": 7}, "outside"),
    ],
)
def test_a_bad_request_becomes_a_failed_job_with_a_sentence(
    place: SimpleNamespace, options: dict[str, Any], says: str
) -> None:
    with pytest.raises(Exception, match=says):
        ask(place, **options).get(timeout=PATIENCE_SECONDS)


# --- none is lost


@pytest.mark.parametrize(
    ("database_url", "point"),
    [("sqlite", "taken"), ("postgresql", "accepted"), ("sqlite", "claimed")],
    indirect=["database_url"],
)
@pytest.mark.usefixtures("clean_queue")
def test_a_request_survives_a_worker_that_is_killed_over_it(world: World, labelled_csv: Path, point: str) -> None:
    dataset = world.settings.home / "datasets" / "labelled.csv"
    dataset.parent.mkdir(exist_ok=True)
    dataset.write_bytes(labelled_csv.read_bytes())
    request_id = world.ask(dataset)
    killed_at("train", world.given, f"{point}=kill")
    assert (world.asked(request_id) is None) == (point == "taken")
    with world.worker("train"):
        wait_until(lambda: (job := world.asked(request_id)) is not None and job.state == "succeeded")
    assert [row["request_id"] for row in world.rows(TrainingJob)] == [request_id]


@pytest.mark.slow
@pytest.mark.usefixtures("clean_queue")
def test_requests_survive_twenty_kills_at_any_moment(world: World) -> None:
    ids = [world.ask("/etc/passwd") for _ in range(60)]
    for kill in range(20):
        with acting("train", world.given) as trainer:
            known = world.count(TrainingJob)
            wait_until(lambda known=known, kill=kill: world.count(TrainingJob) >= min(60, known + kill % 3))
            trainer.kill()
    with world.worker("train"):
        wait_until(lambda: len([row for row in world.rows(TrainingJob) if row["state"] == "failed"]) == 60)
    assert {row["request_id"] for row in world.rows(TrainingJob)} == set(ids)


@on_postgresql
@pytest.mark.usefixtures("clean_queue")
def test_the_same_message_twice_never_changes_the_job_that_is_there(world: World) -> None:
    request_id = uuid.uuid4().hex
    with world.worker("train"):
        world.ask("/etc/passwd", request_id)
        wait_until(lambda: (job := world.asked(request_id)) is not None and job.state == "failed")
        before = world.rows(TrainingJob)
        world.ask("/etc/shadow", request_id)
        other = world.ask("/etc/passwd")
        wait_until(lambda: world.asked(other) is not None)
        after = [row for row in world.rows(TrainingJob) if row["request_id"] == request_id]
    assert [row | {"answer_due_at": None} for row in after] == [row | {"answer_due_at": None} for row in before]
