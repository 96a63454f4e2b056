"""The route of a tweet with a real server, real databases and a real model: what is stored, acknowledged and buried."""

import contextlib
import json
import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import redis
import torch
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import event, select, text
from sqlalchemy.exc import OperationalError

from db import registry
from db.models import Base, DeadLetter, ModelVersion, Prediction, ScoringWindow, Tweet
from db.session import Database
from tests.conftest import LABELS, wait_until
from training.artifact import load_artifact
from worker.batch import plan_batches
from worker.pipeline import Limits, Pipeline
from worker.scorer import Champion, Model, Scores
from worker.stream import Depth, Stream

POISON = "この文は計算を壊す"
DRAINED = Depth(length=0, lag=0, pending=0)
Make = Callable[..., Pipeline]


class Killed(BaseException):
    """Ends a worker where it stands, as a signal would: nothing on the way may handle it."""


class Fragile(Model):
    """Fails on one text."""

    fault: type[BaseException] = RuntimeError

    def forward(self, rows: Any, token_budget: int) -> Scores:
        if self.tokenise([POISON])[0] in list(rows):
            raise self.fault("the device says no")
        return super().forward(rows, token_budget)


class Deadly(Fragile):
    fault = Killed


class BrokenDevice(Model):
    def forward(self, rows: Any, token_budget: int) -> Scores:
        raise RuntimeError("the device is broken")


class NotANumber(Model):
    """What a model says whose weights have diverged."""

    def forward(self, rows: Any, token_budget: int) -> Scores:
        scores = super().forward(rows, token_budget)
        return Scores(scores.probabilities * float("nan"), scores.tokens, scores.padded_tokens)


class Slow(Model):
    """Says when it has begun, and takes until it is let go."""

    begun: threading.Event
    go: threading.Event

    def forward(self, rows: Any, token_budget: int) -> Scores:
        self.begun.set()
        assert self.go.wait(60)
        return super().forward(rows, token_budget)


class Holding(Champion):
    """A champion that is the model it was given."""

    def __init__(self, database: Database, model: Model) -> None:
        super().__init__(database, "cpu")
        self.model = model

    def current(self) -> Model:
        return self.model


@pytest.fixture
def make(raw: "redis.Redis", stream: Stream) -> Make:
    """A new worker: its own consumer on the test's stream."""

    def worker(
        database: Database,
        champion: Champion | None = None,
        *,
        kind: type[Pipeline] = Pipeline,
        stream_kind: type[Stream] = Stream,
        **limits: float,
    ) -> Pipeline:
        given: dict[str, Any] = {"window_tweets": 100, "token_budget": 512, "min_idle_seconds": 60, **limits}
        own = stream_kind(raw, stream.key, stream.group)
        return kind(
            own, database, champion or Champion(database, "cpu"), Limits(**given, linger_seconds=0.05),
            threading.Event(),
        )  # fmt: skip

    return worker


@pytest.fixture
def load(tiny_artifact: SimpleNamespace) -> Callable[[type[Model], int], Any]:
    artifact = load_artifact(tiny_artifact.folder, tiny_artifact.sha256)
    return lambda kind, version_id: kind(version_id, artifact, torch.device("cpu"))


def wire(id_: object, words: str = "今日は嬉しい", **more: object) -> bytes:
    return json.dumps({"v": 1, "id": id_, "text": words, **more}).encode()


def rows(database: Database, table: type[Base]) -> list[dict[str, Any]]:
    with database.read() as session:
        return [dict(row) for row in session.execute(select(table.__table__)).mappings()]


def scored(database: Database) -> dict[str, int]:
    """Tweet id -> the version that scored it."""
    return {row["tweet_id"]: row["model_version_id"] for row in rows(database, Prediction)}


def deliveries(raw: "redis.Redis", stream: Stream) -> list[int]:
    return [row["times_delivered"] for row in raw.xpending_range(stream.key, stream.group, "-", "+", 1000)]


@contextlib.contextmanager
def draining(pipeline: Pipeline) -> Iterator[threading.Thread]:
    """A worker that drains beside the test, and has ended without a fault afterwards."""
    done: list[int] = []
    thread = threading.Thread(target=lambda: done.append(pipeline.drain()))
    thread.start()
    try:
        yield thread
    finally:
        thread.join(60)
    assert done


# --- what is stored


def test_every_tweet_gets_one_row_that_says_what_the_model_says(
    database: Database, stream: Stream, make: Make, promote: Callable[[Database], int]
) -> None:
    version = promote(database)
    stream.publish([wire(i, "雨が降る" * (i % 9 + 1), lang="ja") for i in range(250)])
    assert make(database).drain() == 250
    found = rows(database, Prediction)
    assert {row["tweet_id"] for row in found} == {str(i) for i in range(250)}
    assert len(found) == 250
    for row in found:
        said = row["probabilities"]
        assert row["model_version_id"] == version
        assert set(said) == set(LABELS)
        assert sum(said.values()) == pytest.approx(1, abs=1e-5)
        assert (row["label"], row["probability"]) == max(said.items(), key=lambda item: item[1])
        assert row["score_signed"] == pytest.approx(said["positive"] - said["negative"], abs=1e-6)
    assert {(row["text"], row["lang"]) for row in rows(database, Tweet)} == {
        ("雨が降る" * i, "ja") for i in range(1, 10)
    }
    assert [row["tweets"] for row in rows(database, ScoringWindow)] == [100, 100, 50]
    assert stream.depth() == DRAINED


def test_window_leaves_a_row_with_its_stage_times(
    sqlite: Database, stream: Stream, make: Make, promote: Callable[[Database], int]
) -> None:
    version = promote(sqlite)
    stream.publish([wire(1), wire(2, "長い" * 50), b"no tweet"])
    worker = make(sqlite)
    worker.drain()
    (row,) = rows(sqlite, ScoringWindow)
    assert (row["worker"], row["model_version_id"]) == (worker.stream.consumer, version)
    assert (row["tweets"], row["buried"]) == (2, 1)
    assert 0 < row["tokens"] <= row["padded_tokens"] <= 2 * row["tokens"]
    assert all(row[name] > 0 for name in ("read_ms", "tokenise_ms", "forward_ms", "store_ms"))


def test_malformed_records_are_buried_and_their_window_mates_scored(
    database: Database, stream: Stream, raw: "redis.Redis", make: Make, promote: Callable[[Database], int]
) -> None:
    promote(database)
    bad = {
        b"{": "not JSON", b"[" * 100_000: "not JSON", b"\xff\xfe": "not UTF-8", b"[1]": "not a list",
        b'{"text": "a"}': "no id", b'{"id": "1"}': "no text", wire("1", "  "): "blank", wire(1.5): "id is a number",
        wire("x" * 65): "65 characters", wire("1", "a\0"): "NUL", wire("1", "\ud800"): "surrogate",
        wire("1", "あ" * 400_000): "400,000 characters", wire("1", v=2): "wire version '2'",
        wire("1", created_at="soon"): "created_at", wire("1", author_id=[]): "author_id is a list",
    }  # fmt: skip
    raw.xadd(stream.key, {"twet": "misspelled"})
    for i, payload in enumerate(bad):
        stream.publish([payload, wire(f"good-{i}")])
    assert make(database).drain() == len(bad)
    assert set(scored(database)) == {f"good-{i}" for i in range(len(bad))}
    letters = {row["payload"]: row for row in rows(database, DeadLetter)}
    assert set(letters) == {b"", *bad}
    assert "no field 'tweet'" in letters[b""]["reason"]
    for payload, reason in bad.items():
        assert reason in letters[payload]["reason"]
        assert letters[payload]["attempts"] == 1
    assert stream.depth() == DRAINED


def test_the_same_tweet_twice_is_one_row(
    database: Database, stream: Stream, make: Make, promote: Callable[[Database], int]
) -> None:
    promote(database)
    stream.publish([wire("1", "最初"), wire(1, "二度目"), wire("2")])
    make(database).drain()
    first = rows(database, Prediction), rows(database, Tweet)
    assert [len(table) for table in first] == [2, 2]
    stream.publish([wire("1", "三度目")])
    make(database).drain()
    assert (rows(database, Prediction), rows(database, Tweet)) == first
    assert {row["tweet_id"]: row["text"] for row in first[1]}["1"] == "最初"
    assert stream.depth() == DRAINED


def test_scores_do_not_depend_on_window_mates(sqlite: Database, promote: Any, load: Any) -> None:
    model = load(Model, promote(sqlite))
    texts = ["嬉しい", "今日は雨が降って悲しい" * 8, "https://example.com", "[SEP]", "普通の一日だった"]
    for said, text_ in zip(model.score(texts, 64), texts, strict=True):
        assert said["probabilities"] == pytest.approx(model.score([text_], 4096)[0]["probabilities"], abs=1e-5)


# --- when commit and acknowledgement part


def test_window_is_not_acked_when_commit_fails(
    database: Database, stream: Stream, make: Make, promote: Callable[[Database], int]
) -> None:
    promote(database)
    stream.publish([wire(i) for i in range(3)] + [b"no tweet"])

    class FailsAtCommit(Database):
        @contextlib.contextmanager
        def begin(self) -> Iterator[Any]:
            with super().begin() as session:
                yield session
                worker.stopping.set()  # and nobody tries again
                raise OperationalError("COMMIT", {}, Exception("the connection is gone"))

    worker = make(FailsAtCommit(database.engine))
    with pytest.raises(OperationalError):
        worker.drain()
    assert [rows(database, table) for table in (Tweet, Prediction, DeadLetter, ScoringWindow)] == [[], [], [], []]
    assert stream.depth() == Depth(length=4, lag=0, pending=4)
    wait_until(lambda: make(database, min_idle_seconds=0.05).drain() == 3)
    assert (len(scored(database)), len(rows(database, DeadLetter)), stream.depth()) == (3, 1, DRAINED)


def test_rows_are_committed_before_the_ack_and_a_replay_changes_nothing(
    database: Database, stream: Stream, make: Make, promote: Callable[[Database], int]
) -> None:
    class DiesBeforeAck(Stream):
        def ack(self, ids: Any) -> None:
            raise Killed

    promote(database)
    stream.publish([wire(i) for i in range(5)] + [b"no tweet"])
    with pytest.raises(Killed):
        make(database, stream_kind=DiesBeforeAck).drain()
    before = [rows(database, table) for table in (Tweet, Prediction, DeadLetter)]
    assert [len(table) for table in before] == [5, 5, 1]
    assert stream.depth() == Depth(length=6, lag=0, pending=6)
    wait_until(lambda: make(database, min_idle_seconds=0.05).drain() == 5)
    assert [rows(database, table) for table in (Tweet, Prediction, DeadLetter)] == before
    assert stream.depth() == DRAINED


def test_locked_database_is_waited_for_and_drained_afterwards(
    sqlite: Database, stream: Stream, make: Make, promote: Callable[[Database], int], caplog: Any
) -> None:
    promote(sqlite)
    stream.publish([wire(i) for i in range(20)])
    event.listen(sqlite.engine, "connect", lambda connection, _: connection.execute("PRAGMA busy_timeout=50"))
    sqlite.close()
    with sqlite.engine.connect() as blocker:
        blocker.execute(text("PRAGMA user_version"))  # a writer's connection holds the lock from its first statement
        locked_until = time.monotonic() + 2
        with draining(make(sqlite, window_tweets=5)):
            wait_until(lambda: time.monotonic() > locked_until)
            assert stream.depth() == Depth(length=20, lag=15, pending=5)
            assert scored(sqlite) == {}
            blocker.rollback()
    assert len(scored(sqlite)) == 20
    assert stream.depth() == DRAINED
    assert "the database does not answer" in caplog.text


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_database_that_refuses_to_write_buries_nobody(
    database: Database, stream: Stream, raw: "redis.Redis", make: Make, promote: Callable[[Database], int]
) -> None:
    """As PostgreSQL does for a while after a failover."""
    promote(database)
    stream.publish([wire(i) for i in range(3)])
    name = database.engine.url.database
    with database.begin() as session:
        session.execute(text(f"ALTER DATABASE {name} SET default_transaction_read_only = on"))
    database.close()

    def refused() -> bool:
        with contextlib.suppress(Exception):
            make(database, min_idle_seconds=0.02).drain()
        return max(deliveries(raw, stream), default=0) > 6

    wait_until(refused)
    assert scored(database) == {}
    with database.begin() as session:
        session.execute(text("SET TRANSACTION READ WRITE"))
        session.execute(text(f"ALTER DATABASE {name} RESET default_transaction_read_only"))
    database.close()
    wait_until(lambda: make(database, min_idle_seconds=0.02).drain() >= 0 and stream.depth().idle)
    assert rows(database, DeadLetter) == []
    assert set(scored(database)) == {"0", "1", "2"}


# --- suspects, culprits and broken devices


def test_text_that_fails_is_buried_alone(
    database: Database, stream: Stream, make: Make, promote: Callable[[Database], int], load: Any
) -> None:
    model = load(Fragile, promote(database))
    stream.publish([wire(0), wire("poison", POISON), b"no tweet", wire(1)])
    assert make(database, Holding(database, model)).drain() == 2
    assert set(scored(database)) == {"0", "1"}
    reasons = {row["payload"]: row["reason"] for row in rows(database, DeadLetter)}
    assert set(reasons) == {wire("poison", POISON), b"no tweet"}
    assert "failed (RuntimeError) 3 times" in reasons[wire("poison", POISON)]
    assert stream.depth() == DRAINED


def test_record_that_kills_its_worker_is_scored_alone_and_buried_the_fourth_time(
    sqlite: Database, stream: Stream, raw: "redis.Redis", make: Make, promote: Callable[[Database], int], load: Any
) -> None:
    model = load(Deadly, promote(sqlite))
    stream.publish([wire(0), wire("poison", POISON), wire(1), wire(2)])
    deaths: list[list[int]] = []

    def drained() -> bool:
        try:
            make(sqlite, Holding(sqlite, model), min_idle_seconds=0.05).drain()
        except Killed:
            deaths.append(deliveries(raw, stream))
        return stream.depth().idle

    wait_until(drained)
    # Twice with its mates; then alone, after the mate before it and ahead of those behind it.
    assert deaths == [[1] * 4, [2] * 4, [3] * 3, [4] * 3, [5] * 3]
    assert set(scored(sqlite)) == {"0", "1", "2"}
    (letter,) = rows(sqlite, DeadLetter)
    assert letter["payload"] == wire("poison", POISON)
    assert "ended the worker 3 times" in letter["reason"]
    assert letter["attempts"] == 6
    assert raw.hlen(f"{stream.key}:suspects") == 0


@pytest.mark.parametrize("kind", [BrokenDevice, NotANumber])
def test_broken_device_buries_nobody(
    sqlite: Database, stream: Stream, raw: "redis.Redis", make: Make, promote: Any, load: Any, kind: type[Model]
) -> None:
    version = promote(sqlite)
    stream.publish([wire(i) for i in range(3)])
    stream.ensure_group()

    def failed() -> bool:
        with contextlib.suppress(Exception):
            make(sqlite, Holding(sqlite, load(kind, version)), min_idle_seconds=0.02).drain()
        return rows(sqlite, DeadLetter) != [] or max(deliveries(raw, stream), default=0) > 6

    wait_until(failed)
    assert rows(sqlite, DeadLetter) == []
    assert stream.depth().pending == 3
    wait_until(lambda: make(sqlite, min_idle_seconds=0.02).drain() >= 0 and stream.depth().idle)
    assert rows(sqlite, DeadLetter) == []
    assert set(scored(sqlite)) == {"0", "1", "2"}


def test_long_forward_keeps_its_records(
    sqlite: Database, stream: Stream, raw: "redis.Redis", make: Make, promote: Any, load: Any
) -> None:
    model = load(Slow, promote(sqlite))
    model.begun, model.go = threading.Event(), threading.Event()
    stream.publish([wire(i) for i in range(3)])
    with draining(make(sqlite, Holding(sqlite, model), min_idle_seconds=0.4)):
        assert model.begun.wait(30)
        until = time.monotonic() + 1.6
        thief = Stream(raw, stream.key, stream.group)
        wait_until(lambda: thief.claim_idle(400, 10) or time.monotonic() > until)
        held = deliveries(raw, stream)
        model.go.set()
    assert held == [1, 1, 1]
    assert len(scored(sqlite)) == 3
    assert stream.depth() == DRAINED


def test_stopping_finishes_the_window_at_hand_and_reads_no_other(
    sqlite: Database, stream: Stream, make: Make, promote: Any, load: Any
) -> None:
    model = load(Slow, promote(sqlite))
    model.begun, model.go = threading.Event(), threading.Event()
    stream.publish([wire(i) for i in range(9)])
    worker = make(sqlite, Holding(sqlite, model), window_tweets=4)
    with draining(worker):
        assert model.begun.wait(30)
        worker.stopping.set()
        model.go.set()
    assert set(scored(sqlite)) == {"0", "1", "2", "3"}
    assert stream.depth() == Depth(length=5, lag=5, pending=0)


# --- the champion


def test_without_a_champion_nothing_is_read_and_it_is_said_once(
    database: Database, stream: Stream, make: Make, promote: Callable[[Database], int], caplog: Any
) -> None:
    stream.publish([wire(1)])
    worker = make(database)
    assert [worker.drain(), worker.drain(), worker.drain()] == [0, 0, 0]
    assert stream.depth() == Depth(length=1, lag=1, pending=0)
    assert caplog.text.count("there is no champion yet") == 1
    promote(database)
    assert worker.drain() == 1


def test_new_champion_takes_over_between_windows(
    database: Database, stream: Stream, make: Make, promote: Callable[[Database], int]
) -> None:
    versions = [promote(database)]

    class PromotesAfterItsFirstWindow(Pipeline):
        def store(self, *args: Any) -> None:
            super().store(*args)
            if len(versions) == 1:
                versions.append(promote(self.database))

    stream.publish([wire(i) for i in range(4)])
    assert make(database, kind=PromotesAfterItsFirstWindow, window_tweets=2).drain() == 4
    old, new = versions
    assert scored(database) == {"0": old, "1": old, "2": new, "3": new}


def test_champion_that_cannot_be_loaded_leaves_the_old_one_scoring_until_it_is_mended(
    sqlite: Database, stream: Stream, make: Make, promote: Any, tiny_artifact: Any, tmp_path: Path, caplog: Any
) -> None:
    old, folder, worker = promote(sqlite), tmp_path / "later", make(sqlite)
    with sqlite.begin() as session:
        version = ModelVersion(
            base_model="tiny", artifact_url=folder.as_uri(), sha256=tiny_artifact.sha256, labels=LABELS,
            cleaner_version="1",
        )  # fmt: skip
        new = registry.add_version(session, version, [], [], []).id
    for id_ in ("before", "after", "and on"):
        stream.publish([wire(id_)])
        assert worker.drain() == 1
        with sqlite.begin() as session:
            if id_ == "before":
                registry.assign(session, registry.CHAMPION, new)
    assert scored(sqlite) == {"before": old, "after": old, "and on": old}
    faults = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    assert len(faults) == 1
    assert f"model {new}, cannot be loaded, model {old} goes on scoring" in faults[0]
    shutil.copytree(tiny_artifact.folder, folder)
    with sqlite.begin() as session:
        registry.assign(session, registry.CHAMPION, new)
    stream.publish([wire("mended")])
    worker.drain()
    assert scored(sqlite)["mended"] == new


# --- batches


@given(st.lists(st.integers(1, 300), max_size=80), st.integers(1, 2000))
def test_batches_hold_every_row_once_within_the_budget_and_waste_no_forward(lengths: list[int], budget: int) -> None:
    batches = plan_batches(lengths, budget)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    flat = [lengths[index] for batch in batches for index in batch]
    assert flat == sorted(flat, reverse=True)
    for batch in batches:
        assert len(batch) == 1 or lengths[batch[0]] * len(batch) <= budget
    for batch in batches[:-1]:
        assert lengths[batch[0]] * (len(batch) + 1) > budget, "the next row would have fitted"
