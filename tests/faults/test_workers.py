"""Real workers: they get one or two signals, hang, die at every start, or start beside a full server."""

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import redis
from celery import Celery

from tests.conftest import PATIENCE_SECONDS, wait_until
from tests.support.bench import wire
from tests.support.commands import command, worker
from tests.support.world import World, on_postgresql, on_sqlite
from worker.app import broker_url
from worker.errors import StreamFull
from worker.exit_codes import BAD_SETTINGS_EXIT, DEVICE_LOST_EXIT, GRACE_EXIT, STALLED_EXIT
from worker.process.heartbeat import HEARTBEAT_SECONDS, STALE_SECONDS
from worker.process.supervisor import child_environment
from worker.stream import embedded_valkey

Run = Callable[..., subprocess.CompletedProcess[str]]

# The second signal arrives while Celery handles the first, before it calls our handler.
SIGNALLED_TWICE = """
import os, signal, time
from types import SimpleNamespace
from celery.apps.worker import install_worker_term_handler
from celery.signals import worker_shutting_down

again = iter([signal.SIGTERM])

@worker_shutting_down.connect
def interrupt(**_):
    for number in again:
        os.kill(os.getpid(), number)

import worker.tasks
install_worker_term_handler(SimpleNamespace(hostname="here"))
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(600)
"""


@pytest.mark.slow
@on_postgresql
def test_25_a_worker_told_to_end_finishes_its_window_or_checkpoints_its_job(world: World, labelled_csv: Path) -> None:
    world.stream.publish([wire(i) for i in range(20)])
    with worker(world.given, "score", "forwarded=pause:2@1") as scorer:
        scorer.says("failpoint forwarded")
        scorer.send(signal.SIGTERM)
        assert scorer.ended() == 0
    assert world.predictions() == 20
    assert world.stream.depth().idle

    job_id = world.submit(labelled_csv, epochs=1000)
    with worker(world.given, "train") as trainer:
        wait_until(lambda: len(world.epochs(job_id)) > 1)
        trainer.send(signal.SIGTERM)
        assert trainer.ended() == 0
    job = world.job(job_id)
    assert (job.state, job.attempts, job.lease_owner) == ("queued", 0, None)
    assert list((world.settings.home / "jobs" / str(job_id)).glob("step-*"))


@pytest.mark.slow
@on_sqlite
def test_32_a_pickled_message_is_refused_and_the_worker_goes_on(world: World) -> None:
    client = Celery(broker=broker_url(world.url))
    client.conf.update(task_serializer="pickle", accept_content=["pickle"])
    with worker(world.given, "score") as scorer:
        client.send_task("worker.tasks.score", queue="scoring")
        scorer.says("dropped a message that is not a task of this worker")
        world.stream.publish([wire(1)])
        wait_until(lambda: world.predictions() == 1)
        assert scorer.process.poll() is None


@on_sqlite
def test_a_worker_with_bad_settings_exits_with_2_and_names_the_setting(own: World) -> None:
    with (
        embedded_valkey.owned(own.settings.home),
        worker(own.given, "score", metrics_port=0, metrics_host="192.0.2.1") as scorer,
    ):
        assert scorer.ended() == BAD_SETTINGS_EXIT == 2
    assert "TWEETSCORE_METRICS_HOST is '192.0.2.1'" in scorer.said()


@pytest.mark.slow
@on_postgresql
def test_a_worker_that_takes_longer_than_its_grace_ends_itself_and_a_second_signal_ends_it_at_once(
    world: World,
) -> None:
    world.stream.publish([wire(i) for i in range(5)])
    with worker(world.given, "score", "forwarded=pause:600", grace_seconds=2.0) as scorer:
        scorer.says("failpoint forwarded")
        scorer.send(signal.SIGTERM)
        assert scorer.ended() == GRACE_EXIT
        assert "took longer than 2 s to end" in scorer.said()
    with worker(world.given, "score", "forwarded=pause:600", grace_seconds=3600) as scorer:
        scorer.says("claimed 5 records")
        scorer.send(signal.SIGTERM)
        scorer.says("Warm shutdown")
        scorer.send(signal.SIGTERM)
        assert scorer.ended() == 128 + signal.SIGTERM
    assert world.predictions() == 0
    world.recovers()
    assert world.predictions() == 5


def test_a_second_signal_that_comes_while_celery_answers_the_first_ends_a_worker_at_once() -> None:
    ended = subprocess.run([sys.executable, "-c", SIGNALLED_TWICE], check=False, timeout=PATIENCE_SECONDS)
    assert ended.returncode == 128 + signal.SIGTERM


@pytest.mark.slow
@on_sqlite
def test_up_restarts_a_worker_that_hangs_and_what_it_held_is_scored(own: World) -> None:
    given = {
        **own.given,
        "stall_seconds": 4.0,
        "min_idle_seconds": 3.0,
        "failpoints": "forwarding=pause:600~毒",
    }
    with command(own.settings.home / "up.log", given, "up") as up:
        wait_until(lambda: embedded_valkey.find(own.settings.home))
        own.stream.publish([wire("bad", "毒"), *(wire(i) for i in range(3))])
        wait_until(lambda: own.stream.depth().pending > 0)

        def hung() -> bool:
            own.stream.publish([wire(f"later {uuid.uuid4()}")])
            return "it hung" in up.said()

        wait_until(hung, every=0.1)
        up.says(f"exit {STALLED_EXIT}: it hung), starting it again in 1 s")
        log = (own.settings.logs / "score.log").read_text()
        assert "nothing was committed for" in log
        assert "more tweets arrived" in log
        up.send(signal.SIGTERM)
        wait_until(lambda: "stopping:" in up.said())
        up.send(signal.SIGTERM)
        assert up.ended() == 0
    with embedded_valkey.owned(own.settings.home):
        own.recovers()
    assert "bad" in own.scored()
    assert own.dead() == []


@pytest.mark.slow
def test_a_worker_whose_device_is_lost_ends_and_buries_nothing(world: World) -> None:
    world.stream.publish([wire(i) for i in range(5)])
    with worker(world.given, "score", "device=fail, answering=fail") as scorer:
        assert scorer.ended() == DEVICE_LOST_EXIT
        assert "cpu no longer computes" in scorer.said()
    assert world.stream.depth().pending == 5
    assert (world.predictions(), world.dead()) == (0, [])
    world.recovers()
    assert world.predictions() == 5


@pytest.mark.slow
@on_sqlite
def test_a_worker_that_has_nothing_to_do_is_not_taken_to_hang(own: World) -> None:
    with embedded_valkey.owned(own.settings.home), own.worker(stall_seconds=1.5) as scorer:
        own.stream.publish([wire(0)])
        wait_until(lambda: own.predictions() == 1)
        until = time.monotonic() + 3 * HEARTBEAT_SECONDS
        wait_until(lambda: time.monotonic() > until)
        own.stream.publish([wire(1)])
        wait_until(lambda: own.predictions() == 2)
        assert scorer.alive


@pytest.mark.slow
@on_postgresql
def test_up_starts_a_dying_worker_again_after_pauses_that_double_and_leaves_the_other_alone(own: World) -> None:
    given = {**own.given, "failpoints": "starting=kill"}
    with command(own.settings.home / "up.log", given, "up", "--scorers", "2") as up:
        for seconds in (1, 2):
            up.says(f"the score worker ended (SIGKILL), starting it again in {seconds} s; log:")
        wait_until((own.settings.logs / "score-2.log").exists)
        family = up.family()
        up.send(signal.SIGINT)
        assert up.ended() == 0
    _, alive = psutil.wait_procs(family, timeout=PATIENCE_SECONDS)
    assert not alive


@pytest.mark.slow
@on_sqlite
def test_a_second_signal_ends_up_and_its_workers_at_once_and_the_server_in_order(own: World) -> None:
    given = {**own.given, "failpoints": "forwarding=pause:600", "grace_seconds": 3600}
    with command(own.settings.home / "up.log", given, "up") as up:
        wait_until(lambda: embedded_valkey.find(own.settings.home))
        own.stream.publish([wire(i) for i in range(5)])
        wait_until(lambda: own.stream.depth().pending == 5)
        family = up.family()
        up.send(signal.SIGTERM)
        up.says("stopping:")
        up.send(signal.SIGTERM)
        assert up.ended() == 0, "the second signal skips the hour of grace"
    _, alive = psutil.wait_procs(family, timeout=PATIENCE_SECONDS)
    assert not alive
    with embedded_valkey.owned(own.settings.home):
        assert own.stream.depth().pending == 5, "the records are still pending"
        own.recovers()
    assert own.predictions() == 5


@pytest.mark.slow
@on_postgresql
def test_a_worker_can_start_beside_a_server_that_is_full_and_drains_it(own: World) -> None:
    with embedded_valkey.owned(own.settings.home, memory_mb=4), redis.Redis.from_url(own.url) as client:
        with pytest.raises(StreamFull) as full:
            own.stream.publish([wire(i, "長い雨" * 200) for i in range(4_000)])
        sent = 4_000 - len(full.value.rest)
        assert sent > 500
        client.config_set("maxmemory", "2mb")  # far below its use, so that no command can write
        with pytest.raises(redis.OutOfMemoryError):
            client.set("anything", "x")
        with worker(own.given, "score") as scorer:
            wait_until(lambda: own.predictions() == sent or scorer.process.poll() is not None)
            assert scorer.process.poll() is None, scorer.said()[-3000:]
            own.drained()
    assert own.predictions() == sent


@pytest.mark.slow
@on_sqlite
def test_an_idle_worker_whose_server_becomes_full_drains_it_without_a_nudge(own: World) -> None:
    with embedded_valkey.owned(own.settings.home), redis.Redis.from_url(own.url) as client, worker(own.given, "score"):
        pipe = client.pipeline(transaction=True)
        for i in range(500):
            pipe.xadd("tweets", {"tweet": wire(i, "長い雨" * 200)})
        pipe.config_set("maxmemory", "1mb")  # in the same transaction: after it not even a nudge can be written
        pipe.execute()
        wait_until(lambda: own.predictions() == 500)
        own.drained()


@on_sqlite
def test_health_answers_for_workers_broker_and_database(
    own: World, tweetscore: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = child_environment(own.settings)

    def ask(kind: str) -> tuple[int, str]:
        ended = tweetscore("health", kind, **environment)
        assert "Traceback" not in ended.stderr
        return ended.returncode, ended.stdout + ended.stderr

    assert ask("db")[0] == 0
    for kind in ("scoring", "training", "broker"):
        code, says = ask(kind)
        assert code == 1
        assert len(says.strip().splitlines()) == 1
    with embedded_valkey.owned(own.settings.home):
        assert ask("broker")[0] == 0
        with own.worker() as scorer:
            wait_until(lambda: list(own.settings.run.glob("scoring-*")))
            assert ask("scoring")[0] == 0
            assert ask("training")[0] == 1
            scorer.send(signal.SIGSTOP)
            (pulse,) = own.settings.run.glob("scoring-*")
            old = time.time() - 2 * STALE_SECONDS
            os.utime(pulse, (old, old))
            assert "has written no heartbeat for" in ask("scoring")[1]
            scorer.kill()
        code, says = ask("scoring")
        assert (code, "no scoring worker of this host" in says) == (1, True)
        assert not list(own.settings.run.glob("scoring-*")), "files of dead workers are removed"
