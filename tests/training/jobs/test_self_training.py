"""Jobs that also learn from stored tweets by their own predicted labels."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from db import jobs
from db.models import utc_now
from db.session import Database
from tests.conftest import PATIENCE_SECONDS, wait_until
from tests.support.training_jobs import job_of, left_in, submit
from tests.support.unlabelled import EASY, easy_tweets, failing, run, same_weights, shown, store_tweets, version_of
from training import failpoint
from training.jobs.context import TrainingContext
from training.jobs.run import run_next_job
from training.jobs.unlabelled import labels
from training.loop.pseudo_labels import MOST_SHARE


def test_self_training_adds_certain_tweets_in_the_shares_of_the_labels_and_none_of_the_held_out_texts(
    sqlite: Database,
    context: TrainingContext,
    labelled_csv: Path,
    tiny_encoder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A labelled text with a mention and a link, and as a retweet, is still the same text.
    labelled = [line.split(",")[1] for line in labelled_csv.read_text(encoding="utf-8").splitlines()[1:]]
    store_tweets(
        sqlite, [*easy_tweets(90), *(f"RT @who: {text} https://t.co/a" for text in labelled), "別の話", "別の話 @you"]
    )
    # Without dropout the tiny encoder learns the easy rows for certain.
    certain = {**EASY, "encoder_dropout": 0.0}
    job_id = submit(sqlite, labelled_csv, base_model=str(tiny_encoder), **certain, unlabelled=500, pseudo_threshold=0.6)
    job = run(sqlite, context, job_id)
    report = job.data_report or {}
    found = report["unlabelled"]
    assert (found["asked"], found["found"]) == (500, 91)
    used = found["used"]
    assert min(used.values()) > 10
    assert max(used.values()) <= MOST_SHARE / 2 * sum(used.values())
    assert 0 < found["weight"] <= min(48, sum(used.values()))
    assert found["kept"] == "with_tweets", report["notes"]
    assert report["sizes"] == {"train": 48, "valid": 6, "test": 6}
    screen = shown(sqlite, job, monkeypatch)
    assert "500 stored tweets were asked for; there are 91" in screen
    assert f"of 91 stored tweets, {found['certain']} have a predicted label of 0.6 or more" in screen
    with sqlite.read() as session:
        assert [metric.epoch for metric in jobs.epochs(session, job_id)] == [1, 2, 3, 4]
    card = Path(version_of(sqlite, job_id).artifact_url.removeprefix("file://")) / "README.md"
    assert "the second model was also trained on" in card.read_text(encoding="utf-8")
    assert left_in(context.jobs_folder) == []


def test_without_stored_tweets_a_job_trains_as_without_the_option_and_says_so(
    sqlite: Database, context: TrainingContext, labelled_csv: Path, tiny_encoder: Path
) -> None:
    store_tweets(sqlite, ["hello world", "good morning"], lang="en")
    plain = run(sqlite, context, submit(sqlite, labelled_csv, base_model=str(tiny_encoder), **EASY))
    job = run(sqlite, context, submit(sqlite, labelled_csv, base_model=str(tiny_encoder), **EASY, unlabelled=10))
    assert (job.data_report or {})["notes"] == [
        "no stored tweet can be trained on besides the labelled rows; the model was trained without"
    ]
    assert same_weights(version_of(sqlite, plain.id), version_of(sqlite, job.id))


@pytest.mark.slow
@pytest.mark.parametrize("case", ["nothing is certain", "the second is worse"])
def test_the_first_model_is_registered_with_its_epochs_when_tweets_do_not_help(
    case: str,
    sqlite: Database,
    context: TrainingContext,
    labelled_csv: Path,
    tiny_encoder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = run(sqlite, context, submit(sqlite, labelled_csv, base_model=str(tiny_encoder), **EASY))
    threshold = 0.999999
    if case == "the second is worse":
        threshold = 0.6
        monkeypatch.setattr("training.jobs.unlabelled.self_training.as_good", lambda f1, best, rows: False)
    store_tweets(sqlite, easy_tweets(40))
    options = {**EASY, "unlabelled": 40, "pseudo_threshold": threshold}
    job = run(sqlite, context, submit(sqlite, labelled_csv, base_model=str(tiny_encoder), **options))
    assert same_weights(version_of(sqlite, plain.id), version_of(sqlite, job.id))
    with sqlite.read() as session:
        one, other = ([epoch.train_loss for epoch in jobs.epochs(session, id_)] for id_ in (plain.id, job.id))
    assert one == other
    note = (job.data_report or {})["notes"][-1]
    assert ("the first model was kept" if case == "the second is worse" else "trained without stored tweets") in note


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["first model", "labels", "second model", "evaluation"])
def test_a_job_that_failed_in_any_stage_resumes_there_and_ends_with_the_same_model(
    stage: str,
    sqlite: Database,
    context: TrainingContext,
    labelled_csv: Path,
    tiny_encoder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(labels, "CHUNK_ROWS", 16)
    store_tweets(sqlite, easy_tweets(60))
    options = {**EASY, "base_model": str(tiny_encoder), "unlabelled": 60, "pseudo_threshold": 0.6}
    whole = run(sqlite, context, submit(sqlite, labelled_csv, **options))
    first, passes = 24, 38  # four epochs of 48 rows, five passes of 60 tweets, 8 rows a step
    second = whole.step - first - passes
    assert second > first
    # Where it fails, how many steps are left from the newest checkpoint, and how many of four chunks of tweets.
    point, left, chunks = {
        "first model": ("stepped=fail@9", first - 6 + second, 4),
        "labels": ("labelled=fail@2", second, 2),
        "second model": (f"stepped=fail@{first + second // 4 + 2}", second - second // 4, 0),
        "evaluation": ("evaluated=fail", 0, 0),
    }[stage]
    job_id = submit(sqlite, labelled_csv, **options)
    failing(sqlite, context, job_id, point)
    store_tweets(sqlite, [f"新しい話{i}" for i in range(30)], prefix="later", received_at=utc_now())  # changes nothing
    failpoint.arm(f"stepped=fail@{left + 1}, labelled=fail@{chunks + 1}")
    try:
        job = run(sqlite, context, job_id)
    finally:
        failpoint.arm("")
    assert same_weights(version_of(sqlite, whole.id), version_of(sqlite, job.id))
    assert (job.data_report or {})["unlabelled"] == (whole.data_report or {})["unlabelled"]


@pytest.mark.slow
def test_a_worker_that_shuts_down_while_tweets_are_predicted_gives_the_job_back(
    sqlite: Database, context: TrainingContext, labelled_csv: Path, tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(labels, "CHUNK_ROWS", 16)
    store_tweets(sqlite, easy_tweets(60))
    job_id = submit(sqlite, labelled_csv, **EASY, base_model=str(tiny_encoder), unlabelled=60, pseudo_threshold=0.6)
    stopping = threading.Event()
    failpoint.arm("labelled=pause:3@1")
    try:
        thread = threading.Thread(target=run_next_job, args=(sqlite, context, "here", stopping), daemon=True)
        thread.start()
        wait_until(lambda: list((context.jobs_folder / str(job_id)).glob("labels-*")))
        stopping.set()
        thread.join(PATIENCE_SECONDS)
    finally:
        failpoint.arm("")
    job = job_of(sqlite, job_id)
    assert (job.state, job.attempts) == ("queued", 0)
    assert job.total_steps is not None
    assert job.step < job.total_steps
    run(sqlite, context, job_id)


def test_stored_tweets_are_refused_for_several_labels_a_row_without_a_teacher(
    tweetscore: Callable[..., Any], labelled_csv: Path
) -> None:
    refused = tweetscore("train", str(labelled_csv), "--task", "multi_label", "--unlabelled", "10")
    assert refused.returncode == 2
    assert "without a teacher only a single_label task can use stored tweets" in refused.stderr
