"""Parse tweets from the wire format: valid records, and the reasons why others are refused."""

import contextlib
import json
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.errors import BadRecord
from worker.stream.tweet_record import MAX_TEXT_CHARS, Tweet, parse_object, parse_payload


def test_a_tweet_survives_the_wire_format() -> None:
    tweet = Tweet(
        "1962345678901234567", "最高😭\n二行目", "12", "ja", "映画", datetime(2026, 9, 1, 3, 4, 5, tzinfo=UTC)
    )
    assert parse_payload(tweet.payload()) == tweet
    assert json.loads(tweet.payload())["v"] == 1


def test_ids_past_two_to_the_fifty_third_keep_every_digit() -> None:
    assert parse_payload(b'{"v":1,"id":9007199254740993,"text":"x"}').id == "9007199254740993"


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (None, "no field 'tweet'"),
        (b"not json", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff\xfe", "not UTF-8"),
        (b"[1]", "not a list"),
        (b'{"v":2,"id":"1","text":"x"}', "wire version '2'"),
        (b'{"text":"x"}', "no id"),
        (b'{"id":"1"}', "no text"),
        (b'{"id":true,"text":"x"}', "true or false"),
        (b'{"id":1.5,"text":"x"}', "id is a number"),
        (b'{"id":{"a":1},"text":"x"}', "id is an object"),
        (b'{"id":"1","text":["x"]}', "text is a list"),
        (b'{"id":"1","text":7}', "a number"),
        (b'{"id":"1","text":"  "}', "blank"),
        (b'{"id":"1","text":"a\\u0000b"}', "NUL"),
        (b'{"id":"1","text":"a\\ud83d"}', "surrogate"),
        (b'{"id":"1","text":"x","created_at":"yesterday"}', "not a time"),
        (b'{"id":"1","text":"x","author_id":{}}', "author_id is an object"),
        (b'{"id":"1","text":"x","author_id":[]}', "author_id is a list"),
        (json.dumps({"id": "1", "text": "あ" * 1_000_000}).encode(), "1,000,000 characters"),
        (json.dumps({"id": "9" * 65, "text": "x"}).encode(), "65 characters"),
        (b"[" * 100_000, "not JSON"),
    ],
)
def test_a_malformed_record_is_refused_with_a_reason_without_its_text(payload: bytes | None, reason: str) -> None:
    with pytest.raises(BadRecord, match=reason) as refused:
        parse_payload(payload)
    assert len(str(refused.value)) < 200
    assert "ああ" not in str(refused.value)


@given(st.binary(max_size=200))
def test_any_bytes_end_as_a_tweet_or_a_reason(payload: bytes) -> None:
    with contextlib.suppress(BadRecord):  # any other error fails the test
        tweet = parse_payload(payload)
        assert tweet.id
        assert tweet.text.strip()


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@given(
    st.dictionaries(st.sampled_from(["v", "id", "text", "author_id", "lang", "topic", "created_at", "x"]), JSON_VALUES)
)
def test_any_json_object_ends_as_a_storable_tweet_or_a_reason(value: dict) -> None:
    with contextlib.suppress(BadRecord):
        tweet = parse_payload(json.dumps(value).encode())
        stored = tweet.payload().decode("utf-8")  # a lone surrogate would not encode
        assert "\\u0000" not in stored
        assert len(tweet.text) <= MAX_TEXT_CHARS
        assert tweet.created_at is None or tweet.created_at.tzinfo is not None


def test_times_are_read_in_both_formats_of_the_api() -> None:
    expected = datetime(2018, 10, 10, 20, 19, 24, tzinfo=UTC)
    for written in ("2018-10-10T20:19:24.000Z", "Wed Oct 10 20:19:24 +0000 2018", "2018-10-11T05:19:24+09:00"):
        assert parse_object({"id": "1", "text": "x", "created_at": written}).created_at == expected
