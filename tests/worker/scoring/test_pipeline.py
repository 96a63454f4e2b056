"""The route of a tweet with a real server, real databases and a real model: what is stored, acknowledged and buried."""

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import text
from sqlalchemy.exc import OperationalError

import db.session
from db.models import PROBABILITY_DECIMALS, DeadLetter, Prediction, ScoringWindow, Tweet
from db.session import Database
from tests.conftest import LABELS, PATIENCE_SECONDS, wait_until
from tests.support.bench import DRAINED, Bench, Killed, Slow, draining, wire
from training.model.batching import plan_batches
from worker.scoring import pipeline
from worker.scoring.overlap import UNSCORED_ON_CPU, WINDOWS_IN_FLIGHT
from worker.scoring.pipeline import Pipeline
from worker.scoring.scores import Scores
from worker.scoring.scoring_model import ScoringModel
from worker.scoring.window import Window
from worker.stream.stream import Depth, Stream

# --- what is stored


def test_every_tweet_gets_one_row_that_says_what_the_model_says(bench: Bench) -> None:
    version = bench.promote()
    bench.stream.publish([wire(i, "雨" * (i % 9 + 1), lang="ja") for i in range(249)] + [wire(249, "雨 𠮷 𓀀")])
    assert bench.worker().drain() == 250
    found = bench.rows(Prediction)
    assert {row["tweet_id"]: row["unknown_share"] for row in found} == {
        str(i): 0.0 if i < 249 else pytest.approx(2 / 3) for i in range(250)
    }
    assert {row["tweet_id"] for row in found} == {str(i) for i in range(250)}
    assert len(found) == 250
    for row in found:
        said = row["probabilities"]
        assert row["model_version_id"] == version
        assert set(said) == set(LABELS)
        assert sum(said.values()) == pytest.approx(1, abs=1e-5)
        assert said[row["label"]] == max(said.values())
        assert row["probability"] == round(said[row["label"]], PROBABILITY_DECIMALS)
        assert row["score_signed"] == pytest.approx(said["positive"] - said["negative"], abs=1e-6)
    assert {(row["text"], row["lang"]) for row in bench.rows(Tweet)} == {
        *(("雨" * i, "ja") for i in range(1, 10)), ("雨 𠮷 𓀀", None)
    }  # fmt: skip
    assert [row["tweets"] for row in bench.rows(ScoringWindow)] == [64, 100, 86]
    assert bench.stream.depth() == DRAINED


def test_window_leaves_a_row_with_its_stage_times(lite: Bench) -> None:
    version = lite.promote()
    lite.stream.publish([wire(1), wire(2, "長い" * 50), b"no tweet"])
    worker = lite.worker()
    worker.drain()
    (row,) = lite.rows(ScoringWindow)
    assert (row["worker"], row["model_version_id"]) == (worker.stream.consumer, version)
    assert (row["tweets"], row["buried"]) == (2, 1)
    assert 0 < row["tokens"] <= row["padded_tokens"] <= 2 * row["tokens"]
    assert all(row[name] > 0 for name in ("read_ms", "tokenise_ms", "forward_ms", "store_ms"))


def test_the_same_tweet_twice_is_one_row(bench: Bench) -> None:
    bench.promote()
    bench.stream.publish([wire("1", "最初"), wire(1, "二度目"), wire("2")])
    bench.worker().drain()
    first = bench.rows(Prediction), bench.rows(Tweet)
    assert [len(table) for table in first] == [2, 2]
    bench.stream.publish([wire("1", "三度目")])
    bench.worker().drain()
    assert (bench.rows(Prediction), bench.rows(Tweet)) == first
    assert {row["tweet_id"]: row["text"] for row in first[1]}["1"] == "最初"
    assert bench.stream.depth() == DRAINED


def test_a_text_that_many_post_is_scored_once_a_window_and_stored_for_each(lite: Bench) -> None:
    lite.promote()
    lite.stream.publish([wire(i, f"今日は嬉しい https://example.com/{i}") for i in range(50)] + [wire("x", "雨")])
    assert lite.worker().drain() == 51
    [window] = lite.rows(ScoringWindow)
    alone = lite.holding(ScoringModel).model.tokenise(["今日は嬉しい", "雨"])
    assert (window["tweets"], window["tokens"]) == (51, sum(map(len, alone)))
    rows = {row["tweet_id"]: row["probabilities"] for row in lite.rows(Prediction)}
    assert len(rows) == 51
    assert all(rows[str(i)] == rows["0"] for i in range(50))
    assert rows["x"] != rows["0"]


def test_scores_do_not_depend_on_window_mates(lite: Bench) -> None:
    model = lite.holding(ScoringModel).model
    texts = ["嬉しい", "今日は雨が降って悲しい" * 8, "https://example.com", "[SEP]", "普通の一日だった"]
    model.token_budget = 64
    together = model.score(texts)
    model.token_budget = 4096
    for said, text_ in zip(together, texts, strict=True):
        assert said["probabilities"] == pytest.approx(model.score([text_])[0]["probabilities"], abs=1e-5)


# --- failures between commit and acknowledgement


def test_window_is_not_acked_when_commit_fails(bench: Bench) -> None:
    bench.promote()
    bench.stream.publish([wire(i) for i in range(3)] + [b"no tweet"])

    class FailsAtCommit(Database):
        @contextlib.contextmanager
        def begin(self) -> Iterator[Any]:
            with super().begin() as session:
                yield session
                worker.stopping.set()  # prevents a retry
                raise OperationalError("COMMIT", {}, Exception("the connection is gone"))

    worker = bench.worker(database=FailsAtCommit(bench.database.engine))
    with pytest.raises(OperationalError):
        worker.drain()
    assert [bench.rows(table) for table in (Tweet, Prediction, DeadLetter, ScoringWindow)] == [[], [], [], []]
    assert bench.stream.depth() == Depth(length=4, lag=0, pending=4)
    bench.recovers()
    assert (len(bench.scored()), len(bench.rows(DeadLetter))) == (3, 1)


def test_rows_are_committed_before_the_ack_and_a_replay_changes_nothing(bench: Bench) -> None:
    class DiesBeforeAck(Stream):
        def ack(self, ids: Any) -> None:
            raise Killed

    bench.promote()
    bench.stream.publish([wire(i) for i in range(5)] + [b"no tweet"])
    with pytest.raises(Killed):
        bench.worker(holds=DiesBeforeAck).drain()
    before = [bench.rows(table) for table in (Tweet, Prediction, DeadLetter)]
    assert [len(table) for table in before] == [5, 5, 1]
    assert bench.stream.depth() == Depth(length=6, lag=0, pending=6)
    bench.recovers()
    assert [bench.rows(table) for table in (Tweet, Prediction, DeadLetter)] == before


def test_locked_database_is_waited_for_and_drained_afterwards(
    lite: Bench, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(db.session, "BUSY_TIMEOUT_MS", 50)  # instead of half a minute
    lite.promote()
    lite.stream.publish([wire(i) for i in range(20)])
    with lite.database.engine.connect() as blocker:
        blocker.execute(text("PRAGMA user_version"))  # a writer's connection holds the lock from its first statement
        with draining(lite.worker(window_tweets=5)):
            wait_until(lambda: lite.stream.depth() == Depth(length=20, lag=0, pending=20))
            wait_until(lambda: "the database does not answer" in caplog.text)
            assert lite.scored() == {}
            blocker.rollback()
    assert len(lite.scored()) == 20
    assert lite.stream.depth() == DRAINED


# --- holding and stopping


def test_stopping_finishes_the_windows_under_way_and_reads_no_other(lite: Bench) -> None:
    champion = lite.holding(Slow)
    model = champion.model
    lite.stream.publish([wire(i) for i in range(20)])
    worker = lite.worker(champion, window_tweets=4)
    with draining(worker):
        wait_until(lambda: lite.stream.depth().pending == 4 * UNSCORED_ON_CPU)
        worker.stopping.set()
        model.go.set()
    assert set(lite.scored()) == {str(i) for i in range(4 * UNSCORED_ON_CPU)}
    assert lite.stream.depth() == Depth(length=12, lag=12, pending=0)


# --- overlapping stages


@pytest.mark.parametrize("unscored", [1, UNSCORED_ON_CPU, WINDOWS_IN_FLIGHT])
def test_other_windows_are_read_while_one_is_on_the_device_as_many_as_may_wait_for_it(
    lite: Bench, unscored: int
) -> None:
    champion = lite.holding(Slow)
    lite.stream.publish([wire(i) for i in range(20)])
    with draining(lite.worker(champion, window_tweets=4, unscored_windows=unscored)):
        assert champion.model.begun.wait(PATIENCE_SECONDS)
        wait_until(lambda: lite.stream.depth().pending == 4 * unscored)
        time.sleep(0.1)  # in which no other may be read
        assert lite.stream.depth().pending == 4 * unscored
        assert lite.scored() == {}
        champion.model.go.set()
    assert len(lite.scored()) == 20
    assert [row["tweets"] for row in lite.rows(ScoringWindow)] == [4] * 5, "in their order, none twice"
    assert lite.stream.depth() == DRAINED


@pytest.mark.parametrize("stage", ["tokenise", "forward", "store"])
def test_a_fault_in_any_stage_reaches_the_route_and_leaves_no_thread(lite: Bench, stage: str) -> None:
    """Killed in the first, third or last window: committed rows stay, the other records wait for another worker."""
    lite.promote()
    for at in (1, 3, 5):
        lite.stream.publish([wire(f"{stage}-{at}-{i}") for i in range(20)])
        calls: list[Window] = []

        class Dies(Pipeline):
            pass

        def step(self: Pipeline, window: Window, at: int = at, calls: list[Window] = calls) -> Any:
            calls.append(window)
            if len(calls) == at:
                raise Killed
            return getattr(Pipeline, stage)(self, window)

        setattr(Dies, stage, step)
        worker = lite.worker(kind=Dies, window_tweets=4)
        with pytest.raises(Killed):
            worker.drain()
        mine = {id_ for id_ in lite.scored() if id_.startswith(f"{stage}-{at}-")}
        assert len(mine) == 20 - lite.stream.depth().pending - (lite.stream.depth().lag or 0)
        assert not [thread.name for thread in threading.enumerate() if thread.name.startswith(("tokenise", "renew"))]
        lite.recovers()
    assert len(lite.scored()) == 60
    assert lite.rows(DeadLetter) == []


def test_one_bad_text_among_windows_under_way_is_buried_alone_and_none_is_scored_twice(lite: Bench) -> None:
    class Fails(ScoringModel):
        def forward(self, rows: Any) -> Scores:
            if len({tuple(row) for row in self.tokenise(["毒"])} & {tuple(row) for row in rows}):
                raise RuntimeError("not this one")
            return super().forward(rows)

    champion = lite.holding(Fails)
    lite.stream.publish([wire(i, "毒" if i == 9 else f"雨が降る{i}") for i in range(40)])
    assert lite.worker(champion, window_tweets=4).drain() == 39
    assert set(lite.scored()) == {str(i) for i in range(40) if i != 9}
    assert [row["payload"] for row in lite.rows(DeadLetter)] == [wire(9, "毒")]
    assert sum(row["tweets"] for row in lite.rows(ScoringWindow)) == 39
    assert lite.stream.depth() == DRAINED


def test_first_windows_are_small_and_grow_while_there_is_more(lite: Bench) -> None:
    lite.promote()
    lite.stream.publish([wire(i) for i in range(500)])
    lite.worker(window_tweets=200).drain()
    assert [row["tweets"] for row in lite.rows(ScoringWindow)] == [64, 128, 200, 108]


def test_no_window_has_more_tweets_than_suit_the_model_on_its_device(lite: Bench) -> None:
    champion = lite.holding(ScoringModel)
    champion.model.choice = replace(champion.model.choice, window_tweets=150)
    lite.stream.publish([wire(i) for i in range(500)])
    lite.worker(champion, window_tweets=200).drain()
    assert [row["tweets"] for row in lite.rows(ScoringWindow)] == [64, 128, 150, 150, 8]


def test_windows_exceed_the_usual_size_only_while_they_are_a_small_part_of_what_waits(
    lite: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "USUAL_WINDOW_TWEETS", 8)
    monkeypatch.setattr(pipeline, "FIRST_WINDOW_TWEETS", 2)
    lite.promote()
    lite.stream.publish([wire(i) for i in range(400)])
    lite.worker(window_tweets=40).drain()
    sizes = [row["tweets"] for row in lite.rows(ScoringWindow)]
    left = [400 - sum(sizes[:number]) for number in range(len(sizes))]  # before each window
    assert sizes[:3] == [2, 4, 8]
    assert 16 < max(sizes) <= 40
    assert all(size <= max(8, waiting / pipeline.BACKLOG_PARTS + 1) for size, waiting in zip(sizes, left, strict=True))
    assert sum(sizes) == len(lite.scored()) == 400
    assert lite.stream.depth() == DRAINED


def test_a_slow_model_keeps_to_the_usual_windows(lite: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    class Unhurried(ScoringModel):  # two windows of 8 take 10 ms or more: at most 1,600 tweets a second
        def forward(self, rows: Any) -> Scores:
            time.sleep(0.01)
            return super().forward(rows)

    monkeypatch.setattr(pipeline, "USUAL_WINDOW_TWEETS", 8)
    monkeypatch.setattr(pipeline, "FIRST_WINDOW_TWEETS", 2)
    monkeypatch.setattr(pipeline, "LARGE_WINDOW_SECONDS", 0.002)
    champion = lite.holding(Unhurried)
    lite.stream.publish([wire(i) for i in range(300)])
    lite.worker(champion, window_tweets=40).drain()
    assert max(row["tweets"] for row in lite.rows(ScoringWindow)) == 8


def test_a_large_window_ends_early_when_its_records_are_large(lite: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "USUAL_WINDOW_TWEETS", 8)
    monkeypatch.setattr(pipeline, "WINDOW_BYTES", 8 * len(wire(10)))
    lite.stream.ensure_group()
    lite.stream.publish([wire(i) for i in range(10, 42)])
    assert len(lite.worker(window_tweets=40).read_new(32, 10)) == 8


def test_what_was_scored_is_said_in_the_log(lite: Bench, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    lite.promote()
    lite.stream.publish([wire(i, "雨" * (i % 5 + 1)) for i in range(30)])
    lite.worker(window_tweets=10).drain()
    [said] = [record.getMessage() for record in caplog.records if record.getMessage().startswith("scored")]
    assert said.startswith("scored 30 tweets in 3 windows, padding 1.")
    assert all(f"{stage} " in said for stage in ("read", "tokenise", "forward", "store"))


# --- the champion


def test_without_a_champion_nothing_is_read_and_it_is_said_once(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    bench.stream.publish([wire(1)])
    worker = bench.worker()
    assert [worker.drain(), worker.drain(), worker.drain()] == [0, 0, 0]
    assert bench.stream.depth() == Depth(length=1, lag=1, pending=0)
    assert caplog.text.count("there is no champion yet") == 1
    bench.promote()
    assert worker.drain() == 1


# --- batches


@given(st.lists(st.integers(1, 300), max_size=80), st.integers(1, 2000))
def test_batches_hold_every_row_once_within_the_budget_and_waste_no_forward(lengths: list[int], budget: int) -> None:
    batches = plan_batches(lengths, token_budget=budget)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    flat = [lengths[index] for batch in batches for index in batch]
    assert flat == sorted(flat, reverse=True)
    for batch in batches:
        assert len(batch) == 1 or lengths[batch[0]] * len(batch) <= budget
    for batch in batches[:-1]:
        assert lengths[batch[0]] * (len(batch) + 1) > budget, "the next row would have fitted"
