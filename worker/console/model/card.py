"""The model card of an artifact: fetched from the model store, and shown with every text in it as text.

The card is markdown, and names of labels and files in it were written by others. So Streamlit's markdown is not used:
headings, tables, lists, code and paragraphs are recognised here, and everything else stays as it is.
"""

import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path

import streamlit as st

from training.errors import BadArtifact
from training.store.paths import file_sha256
from training.store.sealed_folder import SUMS, read_sums
from training.store.store import Store
from worker.connections import model_store
from worker.console.text import WRAPPING
from worker.settings import load_settings

CARD = "README.md"  # `training.reporting.model_card.CARD`, without loading PyTorch
IMAGE = re.compile(r"!\[(.*)\]\(([\w-]+\.png)\)")
CODE = re.compile(r"(`[^`]+`|\*\*[^*]+\*\*)")
LINE_OF_TABLE = re.compile(r"\|.*\|")
RULE_OF_TABLE = re.compile(r"\|( ?:?-+:? ?\|)+")
CELL = "border-bottom:1px solid color-mix(in srgb,currentColor 20%,transparent);padding:.25rem .9rem .25rem 0"
LARGEST_FILE_BYTES = 20_000_000


@dataclass(frozen=True)
class Card:
    """The text of a card, without the hub's metadata, and its pictures by file name, each as PNG."""

    markdown: str
    pictures: dict[str, bytes]

    def captioned(self) -> list[tuple[str, bytes]]:
        """(caption, picture) in the order of the card."""
        found = (IMAGE.fullmatch(line.strip()) for line in self.markdown.splitlines())
        return [(image[1], self.pictures[image[2]]) for image in found if image and image[2] in self.pictures]


@st.cache_data(show_spinner=False, max_entries=50)
def fetch(artifact_url: str, sha256: str) -> Card:
    """The card of a stored artifact. Only the card and its pictures are read, not the weights.

    Raises `BadArtifact` when the artifact is not in the store or differs from what was registered, and
    `StoreUnavailable`.
    """
    store = model_store(load_settings())
    if store.remote is None:
        return _read(store.place(artifact_url, sha256), sha256)
    with tempfile.TemporaryDirectory(prefix="tweetscore-") as name:
        folder = Path(name)
        _download(store, artifact_url, folder)
        return _read(folder, sha256)


def _download(store: Store, artifact_url: str, folder: Path) -> None:
    remote = store.remote
    assert remote is not None  # noqa: S101 - a local store needs no download
    name = remote.name_of(artifact_url)
    remote.download_file(f"{name}/{SUMS}", folder / SUMS)
    for _, file in read_sums(folder):
        if _belongs(file):
            remote.download_file(f"{name}/{file}", folder / file)


def _belongs(file: str) -> bool:
    return file == CARD or file.endswith(".png")


def _read(folder: Path, sha256: str) -> Card:
    if not (folder / SUMS).is_file() or file_sha256(folder / SUMS) != sha256:
        raise BadArtifact(f"{folder} is not the artifact that was registered; restore it, or delete the model")
    files = {}
    for digest, file in read_sums(folder):
        path = folder / file
        if not _belongs(file) or not path.is_file() or path.stat().st_size > LARGEST_FILE_BYTES:
            continue
        if file_sha256(path) != digest:
            raise BadArtifact(f"{path} is damaged (sha256 differs); restore it")
        files[file] = path.read_bytes()
    markdown = files.pop(CARD, b"").decode("utf-8", errors="replace")
    return Card(_without_metadata(markdown), files)


def _without_metadata(markdown: str) -> str:
    if markdown.startswith("---\n"):
        return markdown.partition("\n---\n")[2] or markdown
    return markdown


# --- markdown to HTML in which every text is escaped


def as_html(markdown: str) -> str:
    """HTML of a card, without its pictures. Markup in the text has no effect."""
    return f'<div lang="en" style="{WRAPPING};white-space:normal;line-height:1.6">{"".join(_blocks(markdown))}</div>'


def _blocks(markdown: str) -> Iterator[str]:
    lines = markdown.splitlines()
    at = 0
    while at < len(lines):
        line, start = lines[at], at
        if line.startswith("```"):
            at += 1
            while at < len(lines) and not lines[at].startswith("```"):
                at += 1
            yield f'<pre style="white-space:pre-wrap">{escape(chr(10).join(lines[start + 1 : at]))}</pre>'
            at += 1
        elif LINE_OF_TABLE.fullmatch(line):
            while at < len(lines) and LINE_OF_TABLE.fullmatch(lines[at]):
                at += 1
            yield _table(lines[start:at])
        elif line.startswith("- "):
            while at < len(lines) and lines[at].startswith("- "):
                at += 1
            yield "<ul>" + "".join(f"<li>{_inline(item[2:])}</li>" for item in lines[start:at]) + "</ul>"
        else:
            at += 1
            yield _line(line)


def _line(line: str) -> str:
    if not line.strip() or IMAGE.fullmatch(line.strip()):
        return ""
    marks = len(line) - len(line.lstrip("#"))
    if 1 <= marks <= 4 and line[marks : marks + 1] == " ":
        return f'<div role="heading" aria-level="{marks + 2}" style="font-size:{1.5 - 0.15 * marks:.2f}rem;' \
               f'font-weight:600;margin:1rem 0 .4rem">{_inline(line[marks + 1 :])}</div>'  # fmt: skip
    return f'<p dir="auto">{_inline(line)}</p>'


def _table(lines: list[str]) -> str:
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in lines if not RULE_OF_TABLE.fullmatch(line)
    ]
    cells = "".join(
        "<tr>" + "".join(f'<td style="{CELL}" dir="auto">{_inline(cell)}</td>' for cell in row) + "</tr>"
        for row in rows
    )
    return f'<div style="overflow-x:auto"><table style="border-collapse:collapse">{cells}</table></div>'


def _inline(text: str) -> str:
    """Code and bold words; all else is text."""
    parts = []
    for part in CODE.split(text):
        if part.startswith("`") and len(part) > 2:
            parts.append(f"<code>{escape(part[1:-1])}</code>")
        elif part.startswith("**") and len(part) > 4:
            parts.append(f"<b>{escape(part[2:-2])}</b>")
        else:
            parts.append(escape(part))
    return "".join(parts)
