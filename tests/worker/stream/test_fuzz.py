"""Random inputs: each is scored, dead-lettered or refused with one sentence, and none raises a traceback.

The ordinary run takes some hundreds, `pytest -m nightly` over 20,000; the count is shown at the end.
"""

import json
import os
import string
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from db.errors import TweetscoreError
from tests.support.bench import DRAINED, Bench, wire
from training.config import TrainConfig, make_config
from training.data.dataset import read_rows, split_rows
from training.data.table_file import TableFile, open_table
from worker.cli.options import label_map, numbers, pairs
from worker.intake.tweet_file import read_tweets
from worker.settings import Settings, environment_name, load_settings
from worker.stream.tweet_record import Tweet, parse_payload

# How many examples a kind gets, and that all kinds together are enough.
FEW, MANY = 150, 4_200
RECORDS_AN_EXAMPLE = 20
LONGEST_SENTENCE = 1_500  # several settings may be wrong at once

amounts = pytest.mark.parametrize(
    "examples", [pytest.param(FEW, id="few"), pytest.param(MANY, id="many", marks=pytest.mark.nightly)]
)
calm = {"database": None, "deadline": None, "suppress_health_check": list(HealthCheck)}

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=6,
)
KEYS = ["v", "id", "id_str", "text", "tweet", "本文", "author_id", "lang", "topic", "created_at", "label"]
keys = st.sampled_from(KEYS)
objects = st.dictionaries(keys | st.text(max_size=6), values, max_size=7)
records = st.one_of(
    st.binary(max_size=80),
    values.map(lambda value: json.dumps(value).encode()),
    objects.map(lambda value: json.dumps(value).encode()),
    st.tuples(objects, st.integers(0, 60), st.binary(max_size=3)).map(lambda parts: broken(*parts)),
)
cells = st.text(max_size=20) | st.sampled_from(
    ["0", "1", "positive", "negative", "良い", '"', ",", "\t", "\r", "\x00", "|"]
)
HEADERS = [
    "label,text",
    "ラベル,本文",
    "text,label,id",
    "id,tweet",
    "class,content",
    "label\ttext",
    "\ufefflabel,text",
    "",
]


def broken(value: dict[str, Any], at: int, junk: bytes) -> bytes:
    """A valid record with bytes overwritten at a random place."""
    whole = wire("1", "雨が降る", **{key: value[key] for key in value if key not in ("v", "id", "text")})
    return whole[:at] + junk + whole[at + len(junk) :]


def ended(call: Callable[[], Any]) -> tuple[Any, TweetscoreError | None]:
    """The result, or the `TweetscoreError`; any other exception fails the test."""
    try:
        return call(), None
    except TweetscoreError as error:
        return None, error


def is_sentence(error: TweetscoreError, *never: str) -> bool:
    said = str(error)
    assert 0 < len(said) <= LONGEST_SENTENCE, said
    assert "Traceback" not in said
    assert "\n" not in said
    return not any(len(text) > 8 and text in said for text in never)


@contextmanager
def file_of(content: bytes, ending: str) -> Iterator[Path]:
    with tempfile.NamedTemporaryFile(suffix=ending) as file:
        file.write(content)
        file.flush()
        yield Path(file.name)


@pytest.fixture
def fuzzed(record_property: Callable[[str, object], None]) -> Callable[[int, int], None]:
    """Record the number of inputs; fails when there are too few."""

    def note(count: int, wanted: int) -> None:
        assert count >= wanted
        record_property("fuzzed", count)

    return note


@amounts
def test_any_record_on_the_wire_is_scored_or_buried_with_a_sentence(
    lite: Bench, fuzzed: Callable[[int, int], None], examples: int
) -> None:
    lite.promote()
    worker = lite.worker()
    count = 0

    @settings(max_examples=max(8, examples // RECORDS_AN_EXAMPLE), **calm)
    @given(st.lists(records, min_size=RECORDS_AN_EXAMPLE, max_size=RECORDS_AN_EXAMPLE))
    def through_the_route(payloads: list[bytes]) -> None:
        nonlocal count
        good = {str(tweet.id) for tweet in map(tweet_or_none, payloads) if tweet is not None}
        before = len(lite.dead())
        lite.stream.publish([*payloads, wire(f"mate {count}")])
        worker.drain()
        assert lite.stream.depth() == DRAINED
        buried = lite.dead()[before:]
        assert len(lite.dead()) - before == sum(tweet_or_none(payload) is None for payload in payloads)
        assert good | {f"mate {count}"} <= set(lite.scored())
        assert all(letter["reason"] and "\n" not in letter["reason"] for letter in buried)
        count += len(payloads)

    through_the_route()
    fuzzed(count, 8 * RECORDS_AN_EXAMPLE)


def tweet_or_none(payload: bytes) -> Tweet | None:
    tweet, error = ended(lambda: parse_payload(payload))
    assert error is None or is_sentence(error)
    return tweet


@amounts
@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".tsv"])
def test_any_file_of_tweets_gives_a_tweet_or_a_sentence_for_each_line(
    fuzzed: Callable[[int, int], None], ending: str, examples: int
) -> None:
    count, examples = 0, examples // 3

    @settings(max_examples=examples, **calm)
    @given(tables(ending))
    def read(content: bytes) -> None:
        nonlocal count
        count += 1
        with file_of(content, ending) as path, opened_or_none(path) as source:
            for number, found in read_tweets(source) if source else ():
                assert number > 0
                assert isinstance(found, Tweet) or is_sentence(found)

    read()
    fuzzed(count, examples)


@contextmanager
def opened_or_none(path: Path) -> Iterator[TableFile | None]:
    """The open table; None when the file is empty, which raises an error with one sentence."""
    if path.stat().st_size:
        with open_table(path) as source:
            yield source
    else:
        _, error = ended(lambda: open_table(path).__enter__())
        assert is_sentence(error)
        yield None


def tables(ending: str) -> st.SearchStrategy[bytes]:
    """Files of one format with valid and random rows, in encodings with and without errors."""
    if ending == ".jsonl":
        lines = st.lists(
            objects.map(lambda value: json.dumps(value, ensure_ascii=False)) | st.text(max_size=20), max_size=8
        )
        text = lines.map("\n".join)
    else:
        row = st.lists(cells, min_size=1, max_size=3).map(("\t" if ending == ".tsv" else ",").join)
        text = st.tuples(st.sampled_from(HEADERS), st.lists(row, max_size=8)).map(lambda t: "\n".join([t[0], *t[1]]))
    encoded = st.tuples(text, st.sampled_from(["utf-8", "utf-16", "cp932"])).map(
        lambda pair: pair[0].encode(pair[1], errors="replace")
    )
    return encoded | st.binary(max_size=100)


@amounts
@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".tsv"])
def test_any_dataset_is_split_or_refused_with_a_sentence(
    fuzzed: Callable[[int, int], None], ending: str, examples: int
) -> None:
    count, examples = 0, examples // 3
    configs = [make_config("fast", split=split) for split in ("stratified", "guide")]

    @settings(max_examples=examples, **calm)
    @given(tables(ending) | st.lists(cells, min_size=20, max_size=40).map(plausible))
    def split(content: bytes) -> None:
        nonlocal count
        count += 1
        with file_of(content, ending) as path:
            for config in configs:
                data, error = ended(lambda config=config: split_rows(read_rows(path), config))
                assert error is None or is_sentence(error)
                assert data is None or min(len(data.train), len(data.valid), len(data.test)) > 0

    split()
    fuzzed(count, examples)


def plausible(texts: list[str]) -> bytes:
    rows = [f'{"positive" if i % 2 else "negative"},"{text.replace(chr(34), "")}{i}"' for i, text in enumerate(texts)]
    return "\n".join(["label,text", *rows]).encode(errors="replace")


PASSWORD = "geheim-7f3a"
NAMES = sorted(environment_name(name) for name in Settings.model_fields if name != "home")
words = st.text(string.printable + "日本é☃", max_size=20) | st.integers().map(str) | st.floats().map(str)
urls = st.builds(
    "{}://{}".format, st.sampled_from(["redis", "rediss", "unix", "sqlite", "postgresql", "s3", "file"]), words
)


@amounts
def test_any_environment_gives_settings_or_a_sentence_without_passwords(
    fuzzed: Callable[[int, int], None], tmp_path: Path, examples: int
) -> None:
    count = 0
    kept = dict(os.environ)

    @settings(max_examples=examples, **calm)
    @given(st.dictionaries(st.sampled_from(NAMES), words | urls, max_size=4))
    def load(environment: dict[str, str]) -> None:
        nonlocal count
        count += 1
        for name, value in environment.items():
            os.environ[name] = value.replace("\x00", "") + (f":{PASSWORD}@h" if name.endswith("_URL") else "")
        try:
            _, error = ended(lambda: load_settings(home=tmp_path / "home"))
        finally:
            os.environ.clear()
            os.environ.update(kept)
        assert error is None or is_sentence(error, PASSWORD)

    load()
    fuzzed(count, examples)


@amounts
def test_any_options_of_a_job_give_a_configuration_or_a_sentence(
    fuzzed: Callable[[int, int], None], examples: int
) -> None:
    count = 0
    fields = st.sampled_from(sorted(TrainConfig.model_fields)) | st.text(max_size=8)

    @settings(max_examples=examples, **calm)
    @given(st.dictionaries(fields, values, max_size=3), st.text(max_size=20))
    def make(options: dict[str, Any], written: str) -> None:
        nonlocal count
        count += 1
        for attempt in (
            lambda: make_config("fast", **options),
            lambda: label_map(written),
            lambda: numbers("polarity", written),
            lambda: pairs("--set", [written]),
        ):
            _, error = ended(attempt)
            assert error is None or str(error)

    make()
    fuzzed(count, examples)
