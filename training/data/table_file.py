"""Read tables from files, URLs and standard input: CSV, TSV, JSON, JSON lines and Parquet, gzipped or not.

Handles encodings and formats, not tweets or labels. The format follows from the ending of the name.
"""

import codecs
import csv
import gzip
import io
import json
import shutil
import sys
import zlib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, Any

import fsspec

from db.errors import plain, public_url
from training.data.columns import has_surrogates
from training.errors import BadRow, BadSource
from training.store.paths import is_file

# The encoding is guessed from this many bytes; from a pipe, from those that the first read returns.
SAMPLE_BYTES = 1 << 20
FORMATS = {".csv": "csv", ".tsv": "tsv", ".parquet": "parquet", ".json": "json", ".jsonl": "json", ".ndjson": "json"}
BOMS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
# EUC-JP decoded as cp932 consists of half-width kana to this share or more; real text has hardly any.
MAX_HALF_WIDTH_SHARE = 0.3
MAX_FIELD_CHARS = 1_000_000
# A JSON document over many lines is read into memory whole.
MAX_DOCUMENT_CHARS = 256 * 1024 * 1024
PARQUET_BATCH_ROWS = 4_096

# Undecodable bytes become half a surrogate pair, which valid text cannot contain: `has_surrogates` finds them.
codecs.register_error("tweetscore.mark", lambda error: ("\udcff", error.end))  # type: ignore[attr-defined]

# The number of the line (Parquet: of the row), from 1, and a dictionary, a JSON value, or a `BadRow`.
Rows = Iterator[tuple[int, Any]]


@dataclass
class TableFile:
    """An open table. `name` is safe to show; `size` is in bytes as stored, None when unknown.

    `text` is the decoded text; Parquet uses `binary` instead. `header` is set when the first row of a table that has a
    header is read: CSV, TSV and Parquet.
    """

    name: str
    format: str
    encoding: str | None = None
    text: Any = None
    binary: IO[bytes] | None = None
    size: int | None = None
    stored: IO[bytes] | None = None
    header: list[str] | None = None

    @property
    def encoding_name(self) -> str:
        return "UTF-8" if self.encoding in (None, "utf-8", "utf-8-sig") else str(self.encoding)

    def position(self) -> int | None:
        """How many of the stored bytes have been read."""
        return self.stored.tell() if self.stored is not None and self.size else None

    def rows(self, *, strict: bool = False) -> Rows:
        """Yield each row with its number; a row that cannot be read is yielded as a `BadRow`.

        Rows of CSV, TSV and Parquet are dictionaries by lower-case column, those of JSON the value of each line or of
        one document. With `strict`, CSV rows with too few columns or stray quotes are also bad rows.
        """
        if self.format == "parquet":
            return _parquet_rows(self)
        return _json_rows(self) if self.format == "json" else _csv_rows(self, strict)


@contextmanager
def open_table(name: str | Path, default_format: str = "json") -> Iterator[TableFile]:
    """Open a file, a URL, or standard input (`-`). `default_format` applies when the name has no known ending.

    Raises `BadSource` when it does not exist, is empty, or cannot be unpacked.
    """
    name = str(name)
    with ExitStack() as stack:
        if name == "-":
            yield _decoded(TableFile("stdin", default_format), sys.stdin.buffer.raw, stack)  # type: ignore[union-attr]
            return
        shown = public_url(name).partition("?")[0] if "://" in name else Path(name).name
        ending = Path(shown.removesuffix(".gz")).suffix.lower()
        table = TableFile(plain(shown), FORMATS.get(ending, default_format))
        table.stored = stack.enter_context(_bytes(name))
        table.size = _size(table.stored)
        if table.size == 0:
            raise BadSource(f"{table.name} is empty; it needs one row a line")
        content: Any = stack.enter_context(gzip.open(table.stored)) if shown.endswith(".gz") else table.stored
        try:
            if table.format == "parquet":
                # Parquet is read from its end, and seeking backwards in a gzip stream unpacks it again each time.
                table.binary = io.BytesIO(content.read()) if shown.endswith(".gz") else content
                yield table
            else:
                yield _decoded(table, content, stack)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise BadSource(f"{table.name} cannot be unpacked ({plain(error)}); fetch it again") from error


def ending_of(path: Path) -> str:
    """`.csv` of `a.csv`, `.csv.gz` of `a.csv.gz`."""
    return f"{path.with_suffix('').suffix}.gz" if path.suffix == ".gz" else path.suffix


def download(url: str, target: Path) -> None:
    """Copy the bytes of a URL into a file. Raises `BadSource`."""
    with _bytes(url) as content, target.open("wb") as file:
        shutil.copyfileobj(content, file, SAMPLE_BYTES)


def guess_encoding(sample: bytes) -> str:
    """UTF-8 or UTF-16 by a byte-order mark; else the encoding in which at least half of the non-ASCII lines are valid.

    cp932 rather than shift_jis, which lacks characters that Windows writes; EUC-JP when cp932 would read the text as
    half-width kana.
    """
    for mark, name in BOMS:
        if sample.startswith(mark):
            return name
    for name in ("utf-16-le", "utf-16-be"):
        # In UTF-16 a line end has two bytes. Letters such as 上 also contain the byte 0x0A, so a quarter of these bytes
        # is enough. A single NUL in other text does not reach it.
        if 4 * sample.decode(name, "ignore").count("\n") >= max(1, sample.count(b"\n")):
            return name
    lines = [line for line in sample.splitlines() if not line.isascii()]
    if len(sample) == SAMPLE_BYTES and len(lines) > 1:
        lines.pop()  # the sample may end in the middle of a line
    valid = {name: _count_valid(lines, name) for name in ("utf-8", "cp932", "euc_jp")}
    # Lines of other encodings are hardly ever valid UTF-8. When no encoding fits, UTF-8 reports the bad lines.
    if 2 * valid["utf-8"] >= len(lines) or not (valid["cp932"] or valid["euc_jp"]):
        return "utf-8"
    decoded = [char for char in b"".join(lines).decode("cp932", "ignore") if char > "\x7f"]
    mojibake = sum("\uff61" <= char <= "\uff9f" for char in decoded) > MAX_HALF_WIDTH_SHARE * len(decoded)
    return "euc_jp" if mojibake and valid["euc_jp"] >= valid["cp932"] else "cp932"


def _count_valid(lines: list[bytes], encoding: str) -> int:
    valid = 0
    for line in lines:
        try:
            line.decode(encoding)
            valid += 1
        except UnicodeDecodeError:
            continue
    return valid


def _decoded(table: TableFile, content: Any, stack: ExitStack) -> TableFile:
    """Add the decoded text to a table. The sample is peeked at and stays in the stream."""
    buffered = io.BufferedReader(content, SAMPLE_BYTES)
    table.encoding = guess_encoding(buffered.peek(SAMPLE_BYTES)[:SAMPLE_BYTES])
    table.text = io.TextIOWrapper(buffered, encoding=table.encoding, errors="tweetscore.mark", newline="")
    if table.stored is None:
        stack.callback(table.text.detach)  # keeps standard input open
    return table


@contextmanager
def _bytes(name: str) -> Iterator[Any]:
    if "://" not in name:
        try:
            path = Path(name).expanduser()
        except RuntimeError:
            path = Path(name)
        if "\x00" in name or not is_file(path):
            raise BadSource(f"there is no file {plain(name)}; name a CSV, TSV, JSON or Parquet file, or - for stdin")
        with path.open("rb") as file:
            yield file
        return
    try:
        opened = fsspec.open(name, "rb").open()
    except ImportError as error:
        raise BadSource(f"{name.partition('://')[0]}:// cannot be read: {plain(error)}") from error
    except Exception as error:  # each file system of fsspec raises its own errors
        # The error's text is not shown, because it may contain a key.
        shown = plain(public_url(name).partition("?")[0])
        raise BadSource(
            f"{shown} cannot be opened ({type(error).__name__}); check that it exists and that credentials are in the "
            "environment"
        ) from error
    with opened:
        yield opened


def _size(stored: Any) -> int | None:
    try:
        size = stored.seek(0, io.SEEK_END)
        stored.seek(0)
    except (OSError, ValueError, AttributeError):
        return None
    return int(size)


def _csv_rows(table: TableFile, strict: bool) -> Rows:
    """Rows by their header, numbered by the line each begins at; blank lines are skipped."""
    csv.field_size_limit(MAX_FIELD_CHARS)
    reader = csv.reader(table.text, delimiter="\t" if table.format == "tsv" else ",", strict=strict)
    begins = 1
    while True:
        try:
            values = next(reader)
            if table.header is None:
                if any(value.strip() for value in values):
                    table.header = [name.strip().lower() for name in values]
            elif values:
                yield begins, _csv_row(table, table.header, values, strict)
        except StopIteration:
            return
        except csv.Error as error:
            yield begins, BadRow(f"the row cannot be read ({plain(error)}); correct it")
        begins = reader.line_num + 1


def _csv_row(table: TableFile, header: list[str], values: list[str], strict: bool) -> dict[str, str] | BadRow:
    if len(values) > len(header) or (strict and len(values) < len(header)):
        return BadRow(
            f"the row has {len(values)} columns and the header {len(header)}; put quotes around a text with a comma"
        )
    if has_surrogates("".join(values)):
        return BadRow(f"the row is not {table.encoding_name}; correct it or convert the file to UTF-8")
    return dict(zip(header, values, strict=False))


def _json_rows(table: TableFile) -> Rows:
    """The value of each line, or the value of one document that extends over many lines."""
    filled = ((number, line) for number, line in enumerate(table.text, start=1) if line.strip())
    number, first = next(filled, (0, ""))
    if not first:
        return
    begins_document = first.strip() in ("{", "[", "[{")
    if not begins_document and not (table.name.endswith((".json", ".json.gz")) and not _is_json(first)):
        yield from _json_lines(table, number, chain([first], table.text))
        return
    text = first + table.text.read(MAX_DOCUMENT_CHARS)
    if len(text) >= MAX_DOCUMENT_CHARS:
        yield number, BadRow("the document is too large to be read whole; write one object a line (JSONL)")
        return
    try:
        yield number, json.loads(text)
    except (ValueError, RecursionError):  # lines after all, the first of which is broken
        yield from _json_lines(table, number, text.split("\n"))


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _json_lines(table: TableFile, start: int, lines: Iterable[str]) -> Rows:
    for number, line in enumerate(lines, start):
        if not line.strip():
            continue
        if has_surrogates(line):
            yield number, BadRow(f"the line is not {table.encoding_name}; correct it or convert the file to UTF-8")
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            value = BadRow("the line is not JSON; correct or remove it")
        yield number, value


def _parquet_rows(table: TableFile) -> Rows:
    import pyarrow as pa  # loads slowly
    import pyarrow.parquet as pq

    number = 0
    try:
        file = pq.ParquetFile(table.binary)
        table.header = [name.strip().lower() for name in file.schema_arrow.names]
        for batch in file.iter_batches(PARQUET_BATCH_ROWS):
            for values in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                number += 1
                yield number, {name: _plain(value) for name, value in zip(table.header, values, strict=True)}
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = plain(str(error).partition("\n")[0])
        yield number + 1, BadRow(f"the file is not readable Parquet ({reason}); write it again")


def _plain(value: Any) -> Any:
    return value.isoformat() if hasattr(value, "isoformat") else value
