"""A table on its way in: where it lies, how it is packed and encoded. Knows no tweet and no label.

By its name: a path, a URL that fsspec opens, or `-`; `.gz` is unpacked, and the format follows from the ending.
"""

import codecs
import gzip
import io
import shutil
import sys
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import fsspec

from db.errors import plain, public_url
from training.errors import BadSource
from training.paths import is_file

# What the encoding is judged by; of a pipe, as much of it as comes at once.
SAMPLE_BYTES = 1 << 20
FORMATS = {".csv": "csv", ".tsv": "tsv", ".parquet": "parquet", ".json": "json", ".jsonl": "json", ".ndjson": "json"}
BOMS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
# Half-width kana make up so much of what EUC-JP looks like when it is read as cp932, and hardly anything of real text.
TOO_MANY_HALF_WIDTH = 0.3

# Undecodable bytes become half a surrogate pair, which no file can hold otherwise: readers know a bad row by it.
codecs.register_error("tweetscore.mark", lambda error: ("\udcff", error.end))  # type: ignore[attr-defined]


@dataclass
class Source:
    """`name` as it may be shown; `text`, a text file, or `binary` for Parquet; `size` in bytes, as stored, if known."""

    name: str
    format: str
    encoding: str | None = None
    text: Any = None
    binary: IO[bytes] | None = None
    size: int | None = None
    stored: IO[bytes] | None = None

    @property
    def encoding_name(self) -> str:
        return "UTF-8" if self.encoding in (None, "utf-8", "utf-8-sig") else str(self.encoding)

    def position(self) -> int | None:
        """How many of the stored bytes have been read."""
        return self.stored.tell() if self.stored is not None and self.size else None


def format_of(name: str, otherwise: str) -> str:
    return FORMATS.get(Path(name.removesuffix(".gz")).suffix.lower(), otherwise)


def ending_of(path: Path) -> str:
    """`.csv` of `a.csv`, `.csv.gz` of `a.csv.gz`."""
    return f"{path.with_suffix('').suffix}.gz" if path.suffix == ".gz" else path.suffix


@contextmanager
def open_source(name: str | Path, otherwise: str = "json") -> Iterator[Source]:
    """A file, URL or standard input; `otherwise` is the format where the name tells none.

    Raises `BadSource` when it is not there, empty, or cannot be unpacked.
    """
    name = str(name)
    with ExitStack() as stack:
        if name == "-":
            yield _decoded(Source("stdin", otherwise), sys.stdin.buffer.raw, stack)  # type: ignore[union-attr]
            return
        shown = public_url(name).partition("?")[0] if "://" in name else Path(name).name
        source = Source(plain(shown), format_of(shown, otherwise))
        source.stored = stack.enter_context(_bytes(name))
        source.size = _size(source.stored)
        if source.size == 0:
            raise BadSource(f"{source.name} is empty; it should hold a row a line")
        content: Any = stack.enter_context(gzip.open(source.stored)) if shown.endswith(".gz") else source.stored
        if source.format == "parquet":
            # Its end is read first, which a stream that is being unpacked cannot do.
            source.binary = io.BytesIO(content.read()) if shown.endswith(".gz") else content
            yield source
            return
        try:
            yield _decoded(source, content, stack)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise BadSource(f"{source.name} cannot be unpacked ({plain(error)}); fetch it again") from error


def download(url: str, target: Path) -> None:
    """The bytes behind a URL into a file. Raises `BadSource`."""
    with _bytes(url) as content, target.open("wb") as file:
        shutil.copyfileobj(content, file, SAMPLE_BYTES)


def guess_encoding(sample: bytes) -> str:
    """UTF-8 or UTF-16 by a byte-order mark; else what half of the lines that are not plain ASCII are valid in.

    cp932 rather than shift_jis, which lacks what Windows writes; EUC-JP where cp932 would read it as half-width kana.
    """
    for mark, name in BOMS:
        if sample.startswith(mark):
            return name
    for name in ("utf-16-le", "utf-16-be"):
        # Line ends of two bytes each; of the bytes 0x0A a quarter, since letters like 上 hold one too. A NUL that
        # strayed into other text is left alone.
        if 4 * sample.decode(name, "ignore").count("\n") >= max(1, sample.count(b"\n")):
            return name
    lines = [line for line in sample.splitlines() if not line.isascii()]
    if len(sample) == SAMPLE_BYTES and len(lines) > 1:
        lines.pop()  # cut in the middle
    valid = {name: _valid(lines, name) for name in ("utf-8", "cp932", "euc_jp")}
    # By chance hardly a line of another encoding is valid UTF-8; and where nothing fits, the lines are reported.
    if 2 * valid["utf-8"] >= len(lines) or not (valid["cp932"] or valid["euc_jp"]):
        return "utf-8"
    read = [char for char in b"".join(lines).decode("cp932", "ignore") if char > "\x7f"]
    mojibake = sum("\uff61" <= char <= "\uff9f" for char in read) > TOO_MANY_HALF_WIDTH * len(read)
    return "euc_jp" if mojibake and valid["euc_jp"] >= valid["cp932"] else "cp932"


def has_bad_bytes(text: str) -> bool:
    """Whether a text holds half a surrogate pair: bytes that could not be decoded, or a JSON escape of one."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _valid(lines: list[bytes], encoding: str) -> int:
    valid = 0
    for line in lines:
        try:
            line.decode(encoding)
            valid += 1
        except UnicodeDecodeError:
            continue
    return valid


def _decoded(source: Source, content: Any, stack: ExitStack) -> Source:
    """The source with its text. Looking at a sample takes nothing out of the stream."""
    buffered = io.BufferedReader(content, SAMPLE_BYTES)
    source.encoding = guess_encoding(buffered.peek(SAMPLE_BYTES)[:SAMPLE_BYTES])
    source.text = io.TextIOWrapper(buffered, encoding=source.encoding, errors="tweetscore.mark", newline="")
    if source.stored is None:
        stack.callback(source.text.detach)  # standard input stays open
    return source


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
    except Exception as error:  # every storage has errors of its own
        # Not quoted beyond its beginning: what follows may hold a key.
        shown = plain(public_url(name).partition("?")[0])
        raise BadSource(
            f"{shown} cannot be opened ({type(error).__name__}); is it there, and are credentials in the environment?"
        ) from error
    with opened:
        yield opened


def _size(stored: Any) -> int | None:
    try:
        at = stored.seek(0, io.SEEK_END)
        stored.seek(0)
    except (OSError, ValueError, AttributeError):
        return None
    return int(at)
