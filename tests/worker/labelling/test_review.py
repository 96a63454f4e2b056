"""Review: which tweets are picked, who is asked about them, and what an answer, a skip and an undo change."""

import json
import os
import pty
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from itertools import pairwise
from select import select as select_ready
from threading import Barrier

import pytest
from sqlalchemy import select, update

from db.base import utc_now
from db.errors import NotFound
from db.labelling import labels
from db.models import Label, ReviewAsk, ReviewTweet, TrainingJob
from db.session import Database
from tests.conftest import PATIENCE_SECONDS
from tests.support.rows import assign, make_version, prediction_row, run, tweet_row, write
from worker.errors import BadRequest
from worker.labelling import review
from worker.settings import Settings

TOPICS = ("映画", "雨", "電車", None)


def scored(database: Database, count: int) -> int:
    """A champion, and tweets that it scored with rising certainty."""
    version = make_version(database)
    now = utc_now()
    tweets = [
        tweet_row(str(i), text=f"{TOPICS[i % 4]}の話{i}", topic=TOPICS[i % 4], received_at=now) for i in range(count)
    ]
    sure = [0.5 + i / (2 * count) for i in range(count)]
    rows = [
        prediction_row(str(i), version, probability=p, probabilities={"positive": p, "negative": 1 - p})
        for i, p in enumerate(sure)
    ]
    write(database, tweets, rows)
    assign(database, version)
    return version


def picks(database: Database) -> list[ReviewTweet]:
    with database.read() as session:
        return list(session.scalars(select(ReviewTweet).order_by(ReviewTweet.place)))


def given(database: Database) -> list[tuple[str, str, str]]:
    with database.read() as session:
        rows = session.execute(select(Label.tweet_id, Label.annotator, Label.label).order_by(Label.id))
        return [(tweet_id, annotator, label) for tweet_id, annotator, label in rows]


def asked(database: Database, annotator: str) -> review.Question:
    question = review.next_question(database, annotator)
    assert question is not None
    return question


def everyone_reads(database: Database, readers: int) -> None:
    with database.begin() as session:
        session.execute(update(ReviewTweet).values(readers=readers))


def test_picks_mix_random_uncertain_disputed_and_varied_tweets(database: Database, settings: Settings) -> None:
    scored(database, 400)
    challenger = make_version(database)
    disputed = [str(i) for i in range(250, 300)]
    rows = [prediction_row(i, challenger, label="negative", probabilities={"negative": 0.9}) for i in disputed]
    write(database, [], rows)
    assign(database, challenger, "challenger")
    picked = review.fill(database, settings, 60, seed=3)
    assert picked.total() == 60
    assert picked["random"] == 30
    assert min(picked["uncertain"], picked["disagreement"], picked["spread"]) >= 10
    found = picks(database)
    assert Counter(row.reason for row in found) == picked
    assert [row.place for row in found] == list(range(1, 61))
    changes = sum(one.reason != other.reason for one, other in pairwise(found))
    assert changes > 20  # in blocks there would be 3
    of = {reason: [int(row.tweet_id) for row in found if row.reason == reason] for reason in picked}
    assert max(of["uncertain"]) < 150
    assert {str(i) for i in of["disagreement"]} <= set(disputed)
    assert max(Counter(i % 4 for i in of["spread"]).values()) <= len(of["spread"]) // 4 + 1
    assert sum(row.readers == 2 for row in found) == 6
    again = review.fill(database, settings, 60, seed=3)
    assert again.total() == 60
    assert sum(row.place > 60 for row in picks(database)) >= 60


def test_a_random_draw_takes_in_tweets_that_are_picked_or_labelled(database: Database, settings: Settings) -> None:
    scored(database, 40)
    review.fill(database, settings, 10, random_share=0)
    picked = {row.tweet_id for row in picks(database)}
    free = [str(i) for i in range(40) if str(i) not in picked]
    given_by = {"label": "positive", "annotator": "ann", "source": "import", "at": utc_now()}
    with database.begin() as session:
        labels.add(session, [{"tweet_id": i, **given_by} for i in free[:20]])
    assert review.fill(database, settings, 40, random_share=1) == {"random": 10}
    found = picks(database)
    assert {row.reason for row in found} == {"random"}
    assert sorted(row.place for row in found) == list(range(11, 51))  # the earlier picks move to the order of the draw
    assert review.progress(database, "bob").labelled == 20
    everyone_reads(database, 1)
    assert review.progress(database, "bob").open == 20
    assert review.fill(database, settings, 40) == {}


def test_annotators_who_ask_at_the_same_moment_get_different_tweets(database: Database, settings: Settings) -> None:
    scored(database, 60)
    review.fill(database, settings, 48)
    everyone_reads(database, 1)
    names = ["ann", "bob", "cid", "dee"]
    together = Barrier(len(names))

    def label_all(annotator: str) -> list[str]:
        read = []
        for _ in range(12):
            together.wait(PATIENCE_SECONDS)
            question = asked(database, annotator)
            read.append(question.tweet_id)
            review.answer(database, annotator, question.tweet_id, "positive")
        return read

    with ThreadPoolExecutor(len(names)) as threads:
        read = list(threads.map(label_all, names))
    assert sorted(i for each in read for i in each) == sorted(row.tweet_id for row in picks(database))
    assert len(given(database)) == 48
    assert review.next_question(database, "ann") is None


def test_an_unanswered_question_is_asked_of_others_and_a_late_answer_is_kept(
    database: Database, settings: Settings
) -> None:
    scored(database, 4)
    review.fill(database, settings, 2)
    everyone_reads(database, 1)
    first = asked(database, "ann")
    assert asked(database, "ann") == first
    second = asked(database, "bob")
    assert second.tweet_id != first.tweet_id
    assert review.next_question(database, "cid") is None
    with database.begin() as session:
        session.execute(update(ReviewAsk).values(at=utc_now() - timedelta(seconds=review.ASK_SECONDS + 1)))
    assert asked(database, "cid") == first
    review.answer(database, "cid", first.tweet_id, "negative")
    review.answer(database, "ann", first.tweet_id, "positive")
    assert given(database) == [(first.tweet_id, "cid", "negative"), (first.tweet_id, "ann", "positive")]
    assert asked(database, "ann") == second


def test_a_second_reader_is_somebody_else(database: Database, settings: Settings) -> None:
    scored(database, 3)
    review.fill(database, settings, 1)
    everyone_reads(database, 2)
    question = asked(database, "ann")
    assert review.next_question(database, "bob") is None  # one annotator at a time
    review.answer(database, "ann", question.tweet_id, "positive")
    assert review.next_question(database, "ann") is None
    assert asked(database, "bob") == question
    review.answer(database, "bob", question.tweet_id, "positive")
    assert review.next_question(database, "cid") is None


def test_undo_takes_answers_and_skips_back_one_after_the_other(database: Database, settings: Settings) -> None:
    scored(database, 10)
    review.fill(database, settings, 4)
    one = asked(database, "ann")
    review.answer(database, "ann", one.tweet_id, "positive")
    two = asked(database, "ann")
    review.skip(database, "ann", two.tweet_id)
    three = asked(database, "ann")
    done = review.progress(database, "ann")
    assert (done.picked, done.labelled, done.skipped, done.open, done.mine) == (4, 1, 1, 2, 1)
    assert review.undo(database, "ann") == two
    assert review.undo(database, "bob") is None
    assert review.undo(database, "ann") == one
    assert given(database) == []
    assert review.undo(database, "ann") is None
    review.answer(database, "ann", one.tweet_id, "negative")
    review.answer(database, "ann", one.tweet_id, "positive")  # a key that is pressed twice
    assert given(database) == [(one.tweet_id, "ann", "positive")]
    assert asked(database, "ann") == min(two, three, key=lambda question: question.place)


def test_agreement_is_that_of_the_formula(database: Database, settings: Settings) -> None:
    scored(database, 12)
    review.fill(database, settings, 10, random_share=1)
    everyone_reads(database, 2)
    empty = review.progress(database, "ann")
    assert (empty.pairs, empty.agreement, empty.kappa) == (0, None, None)
    # Both positive 4, both negative 3, only ann positive 2, only bob positive 1. Observed agreement 0.7, by chance
    # 0.6 * 0.5 + 0.4 * 0.5 = 0.5, so kappa is (0.7 - 0.5) / (1 - 0.5).
    table = ["pp"] * 4 + ["nn"] * 3 + ["pn"] * 2 + ["np"]
    names = {"p": "positive", "n": "negative"}
    for row, pair in zip(picks(database), table, strict=True):
        for annotator, letter in zip(("ann", "bob"), pair, strict=True):
            assert asked(database, annotator).tweet_id == row.tweet_id
            review.answer(database, annotator, row.tweet_id, names[letter])
    done = review.progress(database, "bob")
    assert (done.pairs, done.agreement, done.mine) == (10, 0.7, 10)
    assert done.kappa == pytest.approx(0.4)


def test_what_cannot_be_picked_or_answered_is_refused(sqlite: Database, settings: Settings) -> None:
    with pytest.raises(NotFound, match="no champion yet"):
        review.fill(sqlite, settings, 5)
    version = make_version(sqlite)
    assign(sqlite, version)
    with pytest.raises(NotFound, match="has not scored a tweet yet"):
        review.fill(sqlite, settings, 5)
    scored(sqlite, 5)
    review.fill(sqlite, settings, 5)
    assert review.label_names(sqlite) == ["negative", "positive"]
    question = asked(sqlite, "ann")
    with pytest.raises(BadRequest, match="no label 'happy'; use one of negative, positive"):
        review.answer(sqlite, "ann", question.tweet_id, "happy")
    with pytest.raises(BadRequest, match=r"no label 'negative\|positive'"):
        review.answer(sqlite, "ann", question.tweet_id, "negative|positive")
    with pytest.raises(NotFound, match="was not asked of 'bob'"):
        review.skip(sqlite, "bob", question.tweet_id)
    with pytest.raises(BadRequest, match="no name"):
        review.next_question(sqlite, " ")
    with pytest.raises(BadRequest, match=r"the random share is 1\.5"):
        review.fill(sqlite, settings, 5, random_share=1.5)
    assert given(sqlite) == []


def test_several_labels_are_stored_in_the_order_of_the_model(sqlite: Database, settings: Settings) -> None:
    with sqlite.begin() as session:
        job = TrainingJob(request_id="r", config={"task": "multi_label"}, dataset="d")
        session.add(job)
        session.flush()
    version = scored(sqlite, 2)
    run(sqlite, f"UPDATE model_versions SET job_id = {job.id} WHERE id = {version}")
    review.fill(sqlite, settings, 2)
    for label, stored in (("positive|negative", "negative|positive"), ("", "")):
        question = asked(sqlite, "ann")
        review.answer(sqlite, "ann", question.tweet_id, label)
        assert given(sqlite)[-1] == (question.tweet_id, "ann", stored)


def test_the_commands_pick_and_show_the_progress(
    home_database: Database, tweetscore: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    scored(home_database, 50)
    picked = json.loads(tweetscore("review", "pick", "20", "--random-share", "0.25", "--json").stdout)
    assert (picked["random"], sum(picked.values())) == (5, 20)
    question = asked(home_database, "ann")
    review.answer(home_database, "ann", question.tweet_id, "positive")
    shown = json.loads(tweetscore("review", "status", "--annotator", "ann", "--json").stdout)
    assert (shown["picked"], shown["labelled"], shown["open"], shown["kappa"]) == (20, 1, 19, None)
    refused = tweetscore("review", "read")
    assert (refused.returncode, "run it in a terminal" in refused.stderr) == (2, True)


def test_the_keys_of_a_terminal_label_skip_and_undo(home_database: Database, settings: Settings) -> None:
    scored(home_database, 4)
    hostile = "\x1b[2J消える\u202e"
    run(home_database, f"UPDATE tweets SET text = '{hostile}'")
    review.fill(home_database, settings, 3)
    everyone_reads(home_database, 1)
    places = [row.tweet_id for row in picks(home_database)]
    shown = typed("2u1s1", "review", "read", "--annotator", "ann")
    assert given(home_database) == [(places[0], "ann", "negative"), (places[2], "ann", "negative")]
    assert "\\x1b[2J消える\\u202e" in shown
    assert "\x1b[2J" not in shown
    assert "2 labelled by ann, 0 left" in shown


def typed(keys: str, *arguments: str) -> str:
    """Run the command on a terminal of its own, press each key once it waits for one, and return what it printed."""
    ours, its = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "worker.cli", *arguments], stdin=its, stdout=its, stderr=its, start_new_session=True,
        env={**os.environ, "COLUMNS": "200", "TERM": "xterm"},
    )  # fmt: skip
    os.close(its)
    shown, left, deadline = b"", keys, time.monotonic() + PATIENCE_SECONDS
    try:
        while select_ready([ours], [], [], deadline - time.monotonic())[0]:
            try:
                shown += os.read(ours, 65_536)
            except OSError:  # the command ended, which closes the terminal
                break
            if left and shown.count(b"q quit") > len(keys) - len(left):
                os.write(ours, left[:1].encode())
                left = left[1:]
        assert process.wait(PATIENCE_SECONDS) == 0, shown
    finally:
        process.kill()
        os.close(ours)
    return shown.decode()
