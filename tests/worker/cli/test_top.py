"""`tweetscore top`: what it shows of a system at work, of an empty one, and without servers."""

import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update

from db import jobs
from db.models import Label, ScoringWindow, TrainingJob, utc_now
from db.session import Database
from tests.conftest import PATIENCE_SECONDS, wait_until
from tests.support.bench import wire
from tests.support.rows import assign, make_version, prediction_row, tweet_row, write
from tests.support.world import World
from worker.cli import output
from worker.cli.top import sparkline
from worker.process.heartbeat import Heartbeat

Run = Callable[..., subprocess.CompletedProcess[str]]


def settings_of(world: World) -> dict[str, str]:
    return {
        "DATABASE_URL": str(world.given["database_url"]), "REDIS_URL": world.url,
        "TWEETSCORE_STREAM_KEY": world.settings.stream_key, "TWEETSCORE_HOME": str(world.given["home"]),
    }  # fmt: skip


def add_windows(database: Database, version: int) -> None:
    """A window of 300 tweets just now, and four in the minutes before."""
    stages = {"read_ms": 1.5, "tokenise_ms": 20.0, "forward_ms": 300.0, "store_ms": 9.25}
    with database.begin() as session:
        for minutes in range(5):
            began = utc_now() - timedelta(seconds=1, minutes=minutes)
            row = {"worker": "w", "model_version_id": version, "started_at": began, "tweets": 300, "buried": 0}
            session.add(ScoringWindow(**row, tokens=1, padded_tokens=1, **stages))


def test_a_system_at_work_is_shown_in_80_columns_and_as_json(
    world: World, tweetscore: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output.console, "width", 80)
    database = world.database
    add_windows(database, world.champion)
    challenger = make_version(database)
    assign(database, challenger, "challenger")
    write(
        database,
        [tweet_row("1"), tweet_row("2")],
        [prediction_row("1", challenger, scored_at=utc_now(), unknown_share=None)],
    )
    with database.begin() as session:
        job = jobs.submit(session, request_id="r", dataset="d.csv", dataset_sha256=None, config={"epochs": 1})
        session.execute(
            update(TrainingJob)
            .where(TrainingJob.id == job.id)
            .values(state="running", step=30, total_steps=120, loss=0.5)
        )
        for minutes, source in ((1, "review"), (2, "import"), (3, "model")):
            session.add(
                Label(
                    tweet_id="1", label="positive", annotator="a", source=source,
                    at=utc_now() - timedelta(minutes=minutes),
                )
            )  # fmt: skip
    world.stream.ensure_group()
    world.stream.publish([wire(i) for i in range(7)])
    world.stream.read(2, None)

    found = tweetscore("top", "--once", **settings_of(world))
    assert (found.returncode, found.stderr) == (0, "")
    shown = found.stdout
    assert max(map(len, shown.splitlines())) <= 80
    for text in (
        "10 a second", "█", "5 not read, 2 being scored", "read 1.5, tokenise 20.0, forward 300.0, store 9.2 ms",
        f"champion {world.champion}, tiny", f"challenger {challenger}, base, 1 tweets in 10 min",
        "none runs on this home",
        "holds 2", f"{job.id} train", "running", "██░░░░", "25%", "running", "loss 0.500", "2 in 30 min", "no letters",
    ):  # fmt: skip
        assert text in shown, f"{text!r} is missing in\n{shown}"

    told: dict[str, Any] = json.loads(tweetscore("top", "--json", **settings_of(world)).stdout)
    assert told["stream"]["depth"] == {"length": 7, "lag": 5, "pending": 2}
    assert told["database"]["tweets_per_second"] == 10
    assert sum(told["database"]["rates"]) in (75, 60)  # the period that is running does not count
    assert told["database"]["models"]["challenger"]["tweets"] == 1
    assert sum(told["database"]["labels"]) == 2


def test_an_empty_database_and_a_worker_are_shown(world: World, tweetscore: Run) -> None:
    beat = Heartbeat(world.settings.run, "scoring", lambda: "working", lambda: None, lambda: None)
    beat.start()
    wait_until(lambda: list(world.settings.run.glob("scoring-*.json")))
    shown = tweetscore("top", "--once", **settings_of(world)).stdout
    beat.stop()
    for text in (
        "none in the last 10 minutes",
        "0 not read",
        "no window",
        "scoring",
        "working",
        "none runs or waits",
        "seen ",
    ):
        assert text in shown, f"{text!r} is missing in\n{shown}"


def test_without_server_and_database_the_remedy_is_shown_and_nothing_is_made(tweetscore: Run, tmp_path: Path) -> None:
    shown = tweetscore("top", "--once")
    assert shown.returncode == 0
    assert "no server runs; start `tweetscore up`" in shown.stdout
    assert "there is no database yet" in shown.stdout
    away = tweetscore(
        "top", "--once", REDIS_URL="redis://127.0.0.1:1/0", DATABASE_URL="postgresql://u:p4ss@127.0.0.1:1/x"
    )
    assert "the stream's server does not answer" in away.stdout
    assert "cannot be used: connection failed" in away.stdout
    assert "p4ss" not in away.stdout
    assert not (tmp_path / "home").exists()


def test_a_terminal_is_redrawn_until_q_is_pressed() -> None:
    ours, theirs = pty.openpty()
    running = subprocess.Popen(
        [sys.executable, "-m", "worker.cli", "top", "--interval", "0.2"], stdin=theirs, stdout=theirs, stderr=theirs,
        env={**os.environ, "TERM": "xterm"},
    )  # fmt: skip
    os.close(theirs)
    shown = b""
    try:
        while shown.count(b"q quits") < 2:  # the second frame
            shown += os.read(ours, 65_536)
        os.write(ours, b"q")
        with suppress(OSError):  # which tells that the terminal is closed
            while os.read(ours, 65_536):
                pass
        assert running.wait(PATIENCE_SECONDS) == 0
    finally:
        running.kill()
        os.close(ours)


def test_a_sparkline_is_as_high_as_the_values() -> None:
    assert sparkline([0, 1, 4, 8]) == " ▂▅█"
    assert sparkline([0, 0]) == "  "
    assert sparkline([]) == ""
