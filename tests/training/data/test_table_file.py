"""Files in different encodings, compressions and formats, and responses of the X API. All content is invented."""

import gzip
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from db.session import Database
from training.data.dataset import read_rows
from training.data.table_file import TableFile, guess_encoding, open_table
from training.errors import BadDataset, BadSource
from training.jobs.inputs import fetched_dataset
from worker.connections import input_store, training_context
from worker.errors import BadRecord
from worker.intake.submit_job import submit_training
from worker.intake.tweet_file import read_tweets
from worker.settings import Settings
from worker.stream.tweet_record import Tweet

LONG = "今日の展示はとても良かった。" * 20

V2_PAGE: dict[str, Any] = {
    "data": [
        {
            "id": "1900000000000000001",
            "text": "今日の展示はとても良かった。… https://t.co/a",
            "author_id": "77",
            "lang": "ja",
            "created_at": "2026-09-01T03:04:05.000Z",
            "note_tweet": {"text": LONG},
            "public_metrics": {"like_count": 3},
        },
        {
            "id": "1900000000000000002",
            "text": "RT @museum: 今日の展示は…",
            "referenced_tweets": [{"type": "retweeted", "id": "1900000000000000000"}],
        },
        {
            "id": "1900000000000000003",
            "text": "それは残念 &amp; 悲しい",
            "referenced_tweets": [{"type": "quoted", "id": "5"}, {"type": "replied_to", "id": "6"}],
        },
        {"id": "1900000000000000004", "text": ""},
    ],
    "includes": {
        "tweets": [
            {"id": "1900000000000000000", "text": "今日の展示は…", "note_tweet": {"text": "展示は十月まで。" * 30}}
        ],
        "users": [{"id": "77", "username": "someone"}],
    },
    "errors": [{"title": "Not Found Error", "value": "8"}],
    "meta": {"result_count": 4, "next_token": "abc"},
}
V1_PAGE: dict[str, Any] = {
    "statuses": [
        {
            "id": 1900000000000000100,
            "id_str": "1900000000000000101",
            "full_text": "雨だけど楽しい",
            "created_at": "Wed Oct 10 20:19:24 +0000 2018",
            "user": {"id": 12, "id_str": "12"},
            "lang": "ja",
            "in_reply_to_status_id_str": "9",
            "quoted_status_id_str": "10",
        },
        {"id": 3, "id_str": "3", "text": "前半…", "extended_tweet": {"full_text": "前半と後半"}, "user": {"id": 5}},
        {
            "id_str": "4",
            "full_text": "RT @b: 元の…",
            "retweeted_status": {"id_str": "2", "extended_tweet": {"full_text": "元の投稿の全文"}, "text": "元の…"},
        },
    ],
    "search_metadata": {"count": 3},
}


def written(folder: Path, name: str, content: bytes | str) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def read(path: Path, **how: Any) -> list[tuple[int, Tweet | BadRecord]]:
    with open_table(path) as source:
        return list(read_tweets(source, **how))


def tweets(path: Path, **how: Any) -> list[Tweet]:
    found = [tweet for _, tweet in read(path, **how)]
    assert all(isinstance(tweet, Tweet) for tweet in found), found
    return found  # type: ignore[return-value]


# --- the X API


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("name", ["page.json", "page.jsonl"])
def test_a_v2_page_gives_whole_texts_and_keeps_what_tweets_refer_to(
    tmp_path: Path, indent: int | None, name: str
) -> None:
    found = read(written(tmp_path, name, json.dumps(V2_PAGE, ensure_ascii=False, indent=indent)))
    note, retweet, reply = (tweet for _, tweet in found[:3])
    assert isinstance(note, Tweet)
    assert (note.text, note.author_id, note.lang) == (LONG, "77", "ja")
    assert retweet == Tweet("1900000000000000002", "展示は十月まで。" * 30, retweeted_id="1900000000000000000")
    assert reply == Tweet("1900000000000000003", "それは残念 &amp; 悲しい", quoted_id="5", replied_to_id="6")
    assert (found[3][0], str(found[3][1])) == (1, "the tweet's text is blank")


def test_single_v2_tweets_with_and_without_their_envelope(tmp_path: Path) -> None:
    bare = {"id": "1", "text": "…", "note_tweet": {"text": "全文"}}
    streamed = {"data": {"id": "2", "text": "映画が好き"}, "matching_rules": [{"id": "7", "tag": "映画"}]}
    nothing = {"meta": {"result_count": 0}}
    lines = "\n".join(json.dumps(line) for line in (bare, streamed, nothing))
    assert tweets(written(tmp_path, "a.jsonl", lines)) == [Tweet("1", "全文"), Tweet("2", "映画が好き", topic="映画")]


def test_a_response_with_only_errors_is_reported(tmp_path: Path) -> None:
    [(number, fault)] = read(written(tmp_path, "a.jsonl", json.dumps({"errors": [{"title": "Unauthorized"}]})))
    assert (number, str(fault)) == (1, "the API response contains errors and no tweets; see its field `errors`")


def test_v1_statuses_take_the_whole_text_and_the_id_that_is_not_rounded(tmp_path: Path) -> None:
    first, extended, retweet = tweets(written(tmp_path, "v1.json", json.dumps(V1_PAGE, indent=1)))
    assert (first.id, first.text, first.author_id) == ("1900000000000000101", "雨だけど楽しい", "12")
    assert (first.replied_to_id, first.quoted_id) == ("9", "10")
    assert first.created_at is not None
    assert first.created_at.isoformat() == "2018-10-10T20:19:24+00:00"
    assert (extended.text, extended.author_id) == ("前半と後半", "5")
    assert (retweet.id, retweet.text, retweet.retweeted_id) == ("4", "元の投稿の全文", "2")
    one_a_line = "\n".join(map(json.dumps, V1_PAGE["statuses"]))
    assert tweets(written(tmp_path, "v1.jsonl", one_a_line)) == [first, extended, retweet]


def test_the_wire_format_contains_references_to_other_tweets() -> None:
    tweet = Tweet("4", "x", retweeted_id="2", quoted_id="3", replied_to_id="5")
    assert json.loads(tweet.payload()) == {
        "v": 1, "id": "4", "text": "x", "retweeted_id": "2", "quoted_id": "3", "replied_to_id": "5"
    }  # fmt: skip


# --- rows and lines


def test_jsonl_lines_are_numbered_and_a_bad_one_does_not_stop_the_rest() -> None:
    text = io.StringIO('\n{"id":"1","text":"一"}\n\n{broken\n{"id":"2","text":"二"}\n')
    found = list(read_tweets(TableFile("tweets.jsonl", "json", text=text)))
    assert [(number, type(value)) for number, value in found] == [(2, Tweet), (4, BadRecord), (5, Tweet)]
    assert str(found[1][1]) == "the line is not JSON; correct or remove it"


def test_a_file_that_is_not_one_document_is_read_as_lines(tmp_path: Path) -> None:
    found = read(written(tmp_path, "a.json", '{broken\n{"id":"2","text":"二"}\n'))
    assert [(number, type(value)) for number, value in found] == [(1, BadRecord), (2, Tweet)]


def test_csv_rows_keep_quoted_newlines_and_take_japanese_headers(tmp_path: Path) -> None:
    path = written(tmp_path, "a.csv", 'tweet_id,本文,topic\n7,"一行目\n二行目",猫\n8,,犬\n9,a,b,c\n')
    (_, first), (number, second), (last, third) = read(path)
    assert first == Tweet("7", "一行目\n二行目", topic="猫")
    assert (number, str(second)) == (4, "the tweet's text is blank")
    assert (last, str(third)[:40]) == (5, "the row has 4 columns and the header 3; ")


def test_the_guides_form_is_read_by_position(tmp_path: Path) -> None:
    path = written(tmp_path, "guide.csv", "class,content\n1,楽しい\n0,悲しい\n")
    assert tweets(path, need_id=False) == [Tweet("2", "楽しい"), Tweet("3", "悲しい")]


def test_missing_ids_become_line_numbers_and_missing_topics_the_given_one(tmp_path: Path) -> None:
    path = written(tmp_path, "a.jsonl", '{"text":"a"}\n{"text":"b","id":"x","topic":"y"}\n')
    assert tweets(path, need_id=False, topic="t") == [Tweet("1", "a", topic="t"), Tweet("x", "b", topic="y")]


def test_a_name_without_a_known_ending_is_json_for_tweets_and_csv_for_datasets(tmp_path: Path) -> None:
    assert tweets(written(tmp_path, "a.txt", '{"id":"1","text":"良い"}\n')) == [Tweet("1", "良い")]
    assert read_rows(written(tmp_path, "b.txt", "label,text\np,良い\n")).texts == ["良い"]


def test_parquet_gives_rows_and_datasets(tmp_path: Path) -> None:
    table = pa.table({"tweet_id": [2**53 + 1, 2], "Text": ["良い", None], "label": ["pos", "neg"]})
    pq.write_table(table, tmp_path / "a.parquet")
    (_, first), (number, fault) = read(tmp_path / "a.parquet")
    assert first == Tweet("9007199254740993", "良い")
    assert (number, str(fault)) == (2, "the tweet has no text")
    rows = read_rows(tmp_path / "a.parquet")
    assert (rows.texts, rows.labels, rows.row_numbers) == (["良い", ""], ["pos", "neg"], [1, 2])
    [(_, broken)] = read(written(tmp_path, "b.parquet", b"PAR1 nothing"))
    assert "not readable Parquet" in str(broken)


# --- packing and places


@pytest.mark.parametrize(("name", "label"), [("a.csv.gz", "pos"), ("a.jsonl.gz", None), ("a.parquet.gz", None)])
def test_gzip_is_unpacked_by_its_ending(tmp_path: Path, name: str, label: str | None) -> None:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"id": ["1"], "text": ["良い"]}), buffer)
    content = {"csv": "id,text,label\n1,良い,pos\n".encode(), "jsonl": b'{"id":1,"text":"\xe8\x89\xaf\xe3\x81\x84"}\n'}
    packed = gzip.compress(content.get(name.split(".")[1], buffer.getvalue()))
    path = written(tmp_path, name, packed)
    assert tweets(path) == [Tweet("1", "良い")]
    if label:
        assert read_rows(path).labels == [label]


def test_a_torn_gzip_is_refused_with_a_sentence(tmp_path: Path) -> None:
    whole = gzip.compress(b'{"id":"1","text":"a"}\n' * 100_000)
    path = written(tmp_path, "a.jsonl.gz", whole[: len(whole) // 2])
    with pytest.raises(BadSource, match=r"a\.jsonl\.gz cannot be unpacked"):
        read(path)


def test_urls_are_opened_by_fsspec_and_never_shown_with_their_keys(tmp_path: Path) -> None:
    path = written(tmp_path, "a.csv", "id,text\n1,良い\n")
    with open_table(f"file://{path}") as source:
        assert [tweet for _, tweet in read_tweets(source)] == [Tweet("1", "良い")]
        assert source.size == source.position() == path.stat().st_size
    for url in ("memory://none/a.csv?sig=SECRET", "nosuch://me:SECRET@a/b.csv?sig=SECRET"):
        with pytest.raises(BadSource) as refused, open_table(url):
            pass
        assert "SECRET" not in str(refused.value)


def test_a_job_is_submitted_from_a_url(sqlite: Database, settings: Settings, labelled_csv: Path) -> None:
    """The copy in the home of a gzipped file from a URL keeps its ending."""
    packed = labelled_csv.with_name("labelled.csv.gz")
    packed.write_bytes(gzip.compress(labelled_csv.read_bytes()))
    job = submit_training(settings, sqlite, f"file://{packed}")
    assert Path(job.dataset).parent == input_store(settings).folder
    assert Path(job.dataset).name.endswith(".csv.gz")
    assert len(read_rows(Path(job.dataset)).texts) == 60
    with pytest.raises(BadSource, match="check that it exists"):
        submit_training(settings, sqlite, f"file://{packed.parent}/none.csv")
    with (
        pytest.raises(BadDataset, match="outside the folders"),  # a name that came in a message
        fetched_dataset(f"file://{packed}", None, input_store(settings), training_context(settings).read_roots),
    ):
        pass


def test_standard_input_is_read_as_it_comes(tmp_path: Path) -> None:
    """The first tweet is read before the writer ends."""
    code = (
        "from training.data.table_file import open_table\nfrom worker.intake.tweet_file import read_tweets\n"
        "with open_table('-') as source:\n  for number, tweet in read_tweets(source): print(tweet.text, flush=True)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONUTF8": "1"},
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write('{"id":1,"text":"良い"}\n'.encode())
        process.stdin.flush()
        assert process.stdout.readline().decode() == "良い\n"
        process.stdin.close()
    assert process.returncode == 0


@pytest.mark.parametrize("name", ["missing.csv", "a\x00b", "~nobody-here/a.csv"])
def test_a_file_that_is_not_there_is_named(name: str) -> None:
    with pytest.raises(BadSource, match="there is no file"), open_table(name):
        pass


# --- encodings

SAMPLE = "id,text\n1,とても良い①髙﨑\n2,ﾃﾞﾊﾟｰﾄで買物\n3,雨が降る\n"


@pytest.mark.parametrize(
    ("encoding", "expected"),
    [
        ("utf-8", "utf-8"), ("utf-8-sig", "utf-8-sig"), ("utf-16", "utf-16"), ("utf-16-le", "utf-16-le"),
        ("utf-16-be", "utf-16-be"), ("cp932", "cp932"),
    ],
)  # fmt: skip
def test_the_encoding_is_detected(tmp_path: Path, encoding: str, expected: str) -> None:
    path = written(tmp_path, "a.csv", SAMPLE.encode(encoding))
    with open_table(path) as source:
        assert source.encoding == expected
        found = [tweet for _, tweet in read_tweets(source)]
    assert found == [Tweet("1", "とても良い①髙﨑"), Tweet("2", "ﾃﾞﾊﾟｰﾄで買物"), Tweet("3", "雨が降る")]


def test_euc_jp_is_not_taken_for_half_width_kana() -> None:
    text = "id,text\n1,とても良い一日でした\n2,雨が降ると悲しい\n"
    assert guess_encoding(text.encode("euc_jp")) == "euc_jp"
    assert guess_encoding(text.encode("cp932")) == "cp932"


def test_a_stray_nul_does_not_make_a_file_utf_16(tmp_path: Path) -> None:
    assert guess_encoding("1,《映画》\n2,《雨》《雪》\n".encode("utf-16-le")) == "utf-16-le"
    (_, first), (_, second) = read(written(tmp_path, "a.jsonl", b'{"id":"1","text":"a\x00"}\n{"id":"2","text":"b"}\n'))
    assert str(first) == "the line is not JSON; correct or remove it"
    assert second == Tweet("2", "b")


def test_a_dataset_reports_its_encoding(tmp_path: Path) -> None:
    rows = read_rows(written(tmp_path, "a.csv", "ラベル,本文\n良,髙い山\n悪,低い山\n".encode("cp932")))
    assert (rows.texts, rows.labels, rows.encoding) == (["髙い山", "低い山"], ["良", "悪"], "cp932")


@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_a_line_of_another_encoding_is_named_and_the_others_are_read(tmp_path: Path, ending: str) -> None:
    lines = ['{"id":"1","text":"良い"}', '{"id":"2","text":"悪い"}'] if ending == "jsonl" else ["1,良い", "2,悪い"]
    head = b"\xef\xbb\xbf" + (b"id,text\n" if ending == "csv" else b"")
    path = written(tmp_path, f"a.{ending}", head + lines[0].encode() + b"\n" + lines[1].encode("cp932") + b"\n")
    (_, first), (_, second) = read(path)
    assert first == Tweet("1", "良い")
    assert "is not UTF-8; correct it or convert" in str(second)


def test_a_dataset_with_bytes_of_another_encoding_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, "a.csv", "label,text\np,良い\nn,".encode() + "悪い\n".encode("cp932"))
    with pytest.raises(BadDataset, match=r"row 3 of a\.csv: the row is not UTF-8"):
        read_rows(path)
