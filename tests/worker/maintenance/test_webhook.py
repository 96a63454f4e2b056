"""The webhook: which events are found, that each is delivered until it is accepted, and how it is signed."""

import re
import subprocess
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select, update

from db import jobs, predictions, registry
from db.admin import webhook_events
from db.models import TrainingJob, WebhookEvent, utc_now
from db.session import Database
from tests.conftest import PATIENCE_SECONDS, wait_until
from tests.support.paths import ROOT
from tests.support.receivers import SECRET, Requests, receiving
from tests.support.rows import assign, letter_row, make_version, run
from tests.support.world import World, on_sqlite
from worker.errors import BadSettings
from worker.maintenance import maintenance_thread, webhook
from worker.maintenance import webhook_events as watching
from worker.maintenance.webhook import NotDelivered, send, signature
from worker.maintenance.webhook_events import WebhookWatch, pause_after
from worker.settings import load_settings

Run = Callable[..., subprocess.CompletedProcess[str]]


class Watched:
    """A watch on a database and its receiver, one look at a time."""

    def __init__(self, database: Database, folder: Path, requests: Requests) -> None:
        self.database, self.folder, self.requests = database, folder, requests
        self.watch = self.another()

    def another(self) -> WebhookWatch:
        return WebhookWatch(self.database, self.folder, self.requests.receiver, threading.Event())

    def look(self) -> list[dict[str, Any]]:
        """Look once; returns the events that arrived."""
        self.watch.look(self.database.begin, self.database.read)
        return self.requests.take()

    def rows(self) -> list[WebhookEvent]:
        """The events in the outbox."""
        with self.database.read() as session:
            query = select(WebhookEvent).where(WebhookEvent.event_key != webhook_events.WATCH)
            return list(session.scalars(query.order_by(WebhookEvent.id)))

    def set(self, **values: Any) -> None:
        with self.database.begin() as session:
            session.execute(update(WebhookEvent).values(**values))


@pytest.fixture
def watched(database: Database, tmp_path: Path) -> Any:
    with receiving() as requests:
        yield Watched(database, tmp_path, requests)


@pytest.fixture
def only(sqlite: Database, tmp_path: Path) -> Any:
    with receiving() as requests:
        yield Watched(sqlite, tmp_path, requests)


def ended_job(database: Database, state: str, error: str | None = None) -> int:
    with database.begin() as session:
        job = jobs.submit(session, request_id=f"{utc_now()}", dataset="d.csv", dataset_sha256=None, config={})
        job.state, job.error, job.finished_at = state, error, utc_now()
        job.started_at = job.finished_at - timedelta(seconds=90)
        session.flush()
        return job.id


def bury(database: Database, *ids: str) -> None:
    with database.begin() as session:
        predictions.bury(session, [letter_row(id_, other_fields=None, buried_at=utc_now()) for id_ in ids])


# --- what is found


def test_jobs_champions_and_dead_letters_are_told_once_and_the_past_is_not(watched: Watched) -> None:
    database = watched.database
    ended_job(database, "succeeded")
    first = make_version(database)
    assign(database, first)
    bury(database, "1-0")
    assert watched.look() == watched.look() == []  # the webhook was switched on at the first look
    assert watched.rows() == []

    job = ended_job(database, "succeeded")
    second = make_version(database, {("accuracy", ""): 0.875, ("f1", "positive"): 0.5}, job)
    failed = ended_job(database, "failed", "the disk is full")
    assign(database, first)  # no change
    assign(database, second)
    bury(database, "2-0", "3-0")
    found = {event["kind"] + str(event.get("job", "")): event for event in watched.look()}
    assert set(found) == {f"job.ended{job}", f"job.ended{failed}", "champion.changed", "dead_letters.found"}
    told = found[f"job.ended{job}"]
    assert list(told)[:3] == ["id", "kind", "at"]
    assert (told["state"], told["seconds"], told["model"], told["figures"]) == (
        "succeeded", 90.0, second, {"accuracy": 0.875},
    )  # fmt: skip
    assert (found[f"job.ended{failed}"]["state"], found[f"job.ended{failed}"]["error"]) == (
        "failed",
        "the disk is full",
    )
    assert (found["champion.changed"]["from"], found["champion.changed"]["to"]) == (first, second)
    assert found["dead_letters.found"]["count"] == 2

    bury(database, "4-0")
    with database.begin() as session:
        jobs.retry(session, failed)
    assert watched.look() == []  # the letters of this hour are told, and a job that is retried has not ended
    with database.begin() as session:
        session.execute(
            update(TrainingJob).where(TrainingJob.id == failed).values(state="cancelled", finished_at=utc_now())
        )
    assert [(event["job"], event["state"]) for event in watched.look()] == [(failed, "cancelled")]
    # An hour later.
    last = next(row for row in watched.rows() if row.kind == "dead_letters.found")
    with database.begin() as session:
        session.execute(
            update(WebhookEvent).where(WebhookEvent.id == last.id).values(event_key=f"{last.event_key} earlier")
        )
    assert [(event["kind"], event["count"]) for event in watched.look()] == [("dead_letters.found", 1)]
    assert all(row.delivered_at and row.attempts == 1 for row in watched.rows())


def test_much_drift_on_the_last_whole_day_is_told_once_per_measure(watched: Watched) -> None:
    today = utc_now().date()
    yesterday = today - timedelta(days=1)
    run(watched.database, "DROP VIEW IF EXISTS v_drift")
    rows = [(yesterday, 0.3, 0.2, 0.26), (today, 9.0, 9.0, 9.0)]
    selects = (
        f"SELECT CAST(1 AS INTEGER) AS model_version_id, '{day}' AS day, 500 AS tweets, {labels} AS psi_labels, "
        f"{length} AS psi_length, {unknown} AS psi_unknown"
        for day, labels, length, unknown in rows
    )
    run(watched.database, f"CREATE VIEW v_drift AS {' UNION ALL '.join(selects)}")
    assert watched.look() == []
    watched.set(created_at=utc_now() - timedelta(days=2))  # switched on two days ago
    watched.watch = watched.another()
    found = [(event["kind"], event["measure"], event["value"], event["day"]) for event in watched.look()]
    assert found == [
        ("drift.found", "psi_labels", 0.3, str(yesterday)), ("drift.found", "psi_unknown", 0.26, str(yesterday)),
    ]  # fmt: skip
    watched.watch = watched.another()
    assert watched.look() == []


def test_what_happened_while_the_webhook_was_off_is_not_told(only: Watched) -> None:
    only.look()
    only.set(next_attempt_at=utc_now() - timedelta(days=2))  # nobody has looked for two days
    ended_job(only.database, "succeeded")
    assert only.look() == []
    ended = ended_job(only.database, "succeeded")
    assert [event["job"] for event in only.look()] == [ended]


def test_events_are_deleted_after_a_month_and_dead_letters_are_not_told_again(only: Watched) -> None:
    only.look()
    bury(only.database, "1-0")
    assert len(only.look()) == 1
    only.set(created_at=utc_now() - timedelta(days=31))
    run(only.database, "UPDATE dead_letters SET buried_at = '2020-01-01T00:00:00.000000Z'")
    only.watch = only.another()
    assert only.look() == []
    assert only.rows() == []


# --- delivery


def test_an_event_is_delivered_to_a_receiver_that_refuses_is_away_is_slow_and_at_last_accepts(
    only: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhook, "TIMEOUT_SECONDS", 0.3)
    only.look()
    requests, go = only.requests, threading.Event()
    ended_job(only.database, "succeeded")
    requests.status = 503
    assert len(only.look()) == 1
    assert only.look() == []  # the pause has begun
    (row,) = only.rows()
    assert (row.attempts, row.delivered_at, row.error) == (1, None, "127.0.0.1 answered with status 503")
    assert timedelta(seconds=4) < row.next_attempt_at - utc_now() <= timedelta(seconds=5)

    requests.before_answer = lambda: go.wait(PATIENCE_SECONDS)
    only.set(next_attempt_at=utc_now())
    assert len(only.look()) == 1
    go.set()
    requests.before_answer = lambda: None
    (row,) = only.rows()
    assert (row.attempts, row.delivered_at) == (2, None)
    assert "127.0.0.1 does not answer (TimeoutError" in (row.error or "")
    assert row.next_attempt_at - utc_now() > timedelta(seconds=8)

    with receiving() as away:  # its port is closed after the block
        pass
    only.requests, only.watch = requests, WebhookWatch(only.database, only.folder, away.receiver, threading.Event())
    only.set(next_attempt_at=utc_now())
    assert only.look() == []
    assert "does not answer (ConnectionRefusedError" in (only.rows()[0].error or "")

    requests.status, only.watch = 200, only.another()
    only.set(next_attempt_at=utc_now())
    assert [event["id"] for event in only.look()] == [row.id]
    (row,) = only.rows()
    assert (row.attempts, row.error) == (4, None)
    assert row.delivered_at is not None
    only.set(next_attempt_at=utc_now())
    assert only.look() == []


def test_pauses_double_up_to_a_day() -> None:
    pauses = [pause_after(attempts).total_seconds() for attempts in (1, 2, 3, 14, 15, 16, 1_000_000)]
    assert pauses == [5, 10, 20, 40_960, 81_920, 86_400, 86_400]


def test_a_refused_event_does_not_hold_up_the_next_one(only: Watched) -> None:
    only.look()
    first, second = ended_job(only.database, "failed"), ended_job(only.database, "succeeded")
    statuses = iter([400, 204])
    only.requests.before_answer = lambda: setattr(only.requests, "status", next(statuses))
    assert [event["job"] for event in only.look()] == [first, second]
    assert [row.delivered_at is None for row in only.rows()] == [True, False]


def test_a_redirect_is_not_followed(only: Watched) -> None:
    with receiving() as other:
        only.requests.status, only.requests.location = 307, other.url
        with pytest.raises(NotDelivered, match="answered with status 307") as refused:
            send(only.requests.receiver, {"id": 1})
        assert "token" not in str(refused.value)
        assert other.got == []


def test_one_worker_at_a_time_looks_and_another_takes_over(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "LOOK_SECONDS", 0.02)
    stopping = threading.Event()
    first = WebhookWatch(watched.database, watched.folder, watched.requests.receiver, stopping)
    done: list[bool] = []
    thread = threading.Thread(target=lambda: done.append(first.run()))
    thread.start()
    try:
        wait_until(lambda: marked(watched))
        assert watched.another().run() is False
        for _ in range(2):  # it goes on looking
            job = ended_job(watched.database, "succeeded")
            wait_until(lambda: watched.requests.got or done)
            assert [event["job"] for event in watched.requests.take()] == [job]
    finally:
        stopping.set()
        thread.join(PATIENCE_SECONDS)
    assert done == [True]
    wait_until(lambda: not locked(watched))  # PostgreSQL frees it when it notices that the connection is closed


def locked(watched: Watched) -> bool:
    with maintenance_thread.maintenance_lock(watched.database, watched.folder, "webhook") as begin:
        return begin is None


def marked(watched: Watched) -> bool:
    with watched.database.read() as session:
        return webhook_events.watch_row(session) is not None


@pytest.mark.slow
@on_sqlite
def test_a_worker_tells_of_a_new_champion_while_it_scores(world: World, promote: Any) -> None:
    with receiving() as requests, world.worker(**requests.settings):
        wait_until(lambda: marked(Watched(world.database, world.settings.run, requests)))
        with world.database.begin() as session:
            twin = registry.get(session, world.champion)
        version = make_version(world.database)
        assign(world.database, version)
        wait_until(lambda: requests.got)
        told = requests.take()
        assert [(event["kind"], event["from"], event["to"]) for event in told] == [
            ("champion.changed", twin.id, version)
        ]


# --- the signature, the settings and the command


def test_the_receiver_in_the_documentation_accepts_what_is_signed_and_nothing_else(only: Watched) -> None:
    page = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(import hashlib.*?)```", page, re.DOTALL)
    assert code
    names: dict[str, Any] = {}
    exec(code[1], names)
    accepted = names["accepted"]
    send(only.requests.receiver, {"id": 1, "kind": "webhook.test", "text": "日本"})
    ((headers, body),) = only.requests.got
    assert accepted(SECRET, headers, body)
    assert not accepted("another secret", headers, body)
    assert not accepted(SECRET, headers, body + b" ")
    assert not accepted(SECRET, {**headers, webhook.TIMESTAMP: str(int(headers[webhook.TIMESTAMP]) + 1)}, body)
    old = str(int(headers[webhook.TIMESTAMP]) - 3600)
    assert not accepted(SECRET, {webhook.TIMESTAMP: old, webhook.SIGNATURE: signature(SECRET, old, body)}, body)


def test_the_command_sends_a_signed_event_and_prints_the_answer(tweetscore: Run, tmp_path: Path) -> None:
    missing = tweetscore("webhook", "test")
    assert (missing.returncode, "set TWEETSCORE_WEBHOOK_URL" in missing.stderr) == (2, True)
    secret = tmp_path / "secret"
    secret.write_text(f"{SECRET}\n", encoding="utf-8")
    with receiving() as requests:
        given = {"TWEETSCORE_WEBHOOK_URL": requests.url, "TWEETSCORE_WEBHOOK_SECRET_FILE": str(secret)}
        done = tweetscore("webhook", "test", **given)
        assert (done.returncode, done.stdout) == (0, "127.0.0.1 accepted the event with status 204: (no text)\n")
        ((headers, body),) = requests.got
        assert headers[webhook.SIGNATURE] == signature(SECRET, headers[webhook.TIMESTAMP], body)
        requests.status = 401
        refused = tweetscore("webhook", "test", **given)
        assert (refused.returncode, refused.stderr) == (1, "127.0.0.1 answered with status 401\n")


def test_a_webhook_without_a_secret_or_with_another_scheme_is_refused() -> None:
    with pytest.raises(BadSettings, match="TWEETSCORE_WEBHOOK_URL is set without a secret"):
        load_settings(webhook_url="https://example.org/x")
    for url in ("ftp://example.org", "https://", "https://user:pass@example.org"):
        with pytest.raises(BadSettings, match="TWEETSCORE_WEBHOOK_URL: it must begin with http") as refused:
            load_settings(webhook_url=url, webhook_secret=SECRET)
        assert "pass" not in str(refused.value)


def test_without_a_webhook_nothing_is_stored(only: Watched) -> None:
    ended_job(only.database, "succeeded")
    assert webhook.receiver_from(load_settings()) is None
    assert only.rows() == []
