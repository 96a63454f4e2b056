"""List, show, retry and drop dead letters."""

import json
import subprocess
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from db import predictions
from db.errors import NotFound
from db.models import DeadLetter, utc_now
from db.session import Database
from tests.support.bench import DRAINED, Bench, wire
from worker.app import make_app
from worker.maintenance.dead_letters import drop, retry
from worker.scoring.scores import Scores
from worker.scoring.scoring_model import ScoringModel
from worker.settings import Settings
from worker.stream import embedded_valkey
from worker.stream.redis_client import connect
from worker.stream.stream import FIELD, Stream
from worker.stream.tweet_record import pack_fields, unpack_fields

Run = Callable[..., subprocess.CompletedProcess[str]]
POISON = "毒のある文"


@given(st.dictionaries(st.binary(max_size=8), st.binary(max_size=20), min_size=1), st.binary(max_size=20) | st.none())
def test_any_fields_are_kept_whole_and_in_order(others: dict[bytes, bytes], tweet: bytes | None) -> None:
    fields = {**others, **({} if tweet is None else {FIELD: tweet})}
    stored = json.loads(json.dumps(pack_fields(fields)))
    back = unpack_fields(fields.get(FIELD, b""), stored)
    assert list(back.items()) == list(fields.items())
    assert "\\u0000" not in json.dumps(stored)


def test_a_letter_is_put_back_with_every_field_and_leaves_the_table(bench: Bench, settings: Settings) -> None:
    bench.promote()
    sent: list[dict[bytes, bytes]] = [
        {b"tweet": b"no json"},
        {b"text": "項目が違う".encode(), b"lang": b"ja"},
        {b"before": b"\xff\x00", b"tweet": b"", b"after": b""},
    ]
    for fields in sent:
        bench.raw.xadd(bench.stream.key, fields)
    bench.worker().drain()
    assert len(bench.dead()) == 3
    assert bench.stream.depth() == DRAINED

    assert retry(bench.database, bench.stream, make_app(settings), None) == 3
    assert bench.dead() == []
    assert sorted([list(fields.items()) for _, fields in bench.raw.xrange(bench.stream.key)]) == sorted(
        [list(fields.items()) for fields in sent]
    )


class Squeamish(ScoringModel):
    def forward(self, rows: Any) -> Scores:
        if self.tokenise([POISON])[0] in list(rows):
            raise RuntimeError("not this one")
        return super().forward(rows)


def test_a_record_that_one_model_could_not_score_is_retried_with_another(bench: Bench, settings: Settings) -> None:
    bench.stream.publish([wire("hard", POISON), wire("easy")])
    bench.worker(bench.holding(Squeamish)).drain()
    (letter,) = bench.dead()
    assert retry(bench.database, bench.stream, make_app(settings), [letter["record_id"]]) == 1
    bench.worker().drain()
    assert set(bench.scored()) == {"easy", "hard"}
    assert bench.dead() == []


def test_a_crash_between_stream_and_table_leaves_one_prediction(bench: Bench, settings: Settings) -> None:
    bench.stream.publish([wire("hard", POISON)])
    bench.worker(bench.holding(Squeamish)).drain()

    class Crashes(Stream):
        def add(self, entries: Any) -> None:
            super().add(entries)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        retry(bench.database, Crashes(bench.raw, bench.stream.key, bench.stream.group), make_app(settings), None)
    assert len(bench.dead()) == 1
    assert retry(bench.database, bench.stream, make_app(settings), None) == 1
    bench.worker().drain()
    assert list(bench.scored()) == ["hard"]
    assert (bench.dead(), bench.stream.depth()) == ([], DRAINED)


def test_letters_are_processed_in_chunks_and_an_unknown_id_changes_nothing(bench: Bench, settings: Settings) -> None:
    bench.promote()
    bench.stream.publish([b"no json"] * 600)
    bench.worker().drain()
    known = bench.dead()[0]["record_id"]
    with pytest.raises(NotFound, match="there is no dead letter '1-1'"):
        drop(bench.database, [known, "1-1"])
    assert len(bench.dead()) == 600
    assert drop(bench.database, [known]) == 1
    assert retry(bench.database, bench.stream, make_app(settings), None) == 599
    assert bench.stream.length() == 599
    bench.worker().drain()
    assert drop(bench.database, None) == 599
    with bench.database.read() as session:
        assert (predictions.dead_count(session), predictions.recent_dead(session, 5)) == (0, [])


def test_the_command_lists_shows_retries_and_drops(
    tweetscore: Run, settings: Settings, home_database: Database
) -> None:
    letters = {"1-0": wire("7", "x" * 30_000), "2-0": b'{"id": "8"', "3-0": b"\xff\xfe"}
    with home_database.begin() as session:
        for record_id, payload in letters.items():
            letter = DeadLetter(record_id=record_id, payload=payload, reason=f"reason of {record_id}", attempts=1)
            letter.buried_at = utc_now()
            session.add(letter)
    listed = json.loads(tweetscore("dead", "list", "--json").stdout)
    assert {row["record_id"]: row["tweet_id"] for row in listed} == {"1-0": "7", "2-0": None, "3-0": None}
    assert "reason of 2-0" in tweetscore("dead", "list").stdout
    assert json.loads(tweetscore("dead", "show", "1-0", "--json").stdout)["payload"]["id"] == "7"
    assert r"\xff\xfe" in tweetscore("dead", "show", "3-0").stdout

    for arguments in (["retry"], ["drop"], ["retry", "1-0", "--all"], ["show", "9-9"], ["drop", "9-9"]):
        refused = tweetscore("dead", *arguments)
        assert refused.returncode == 2
        assert "Traceback" not in refused.stderr
    assert tweetscore("dead", "drop", "3-0").stdout.strip() == "1 dead letters dropped"
    assert json.loads(tweetscore("dead", "retry", "--all", "--json").stdout) == {"count": 2}
    assert json.loads(tweetscore("dead", "list", "--json").stdout) == []
    with embedded_valkey.owned(settings.home) as server, connect(server.url) as client:
        assert {fields[b"tweet"] for _, fields in client.xrange("tweets")} == {letters["1-0"], letters["2-0"]}
