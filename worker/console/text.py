"""Show text that others wrote: tweets, topics, labels, errors. It is shown as it is, whatever it contains.

Streamlit reads markdown, LaTeX, emoji and icon codes in `st.write`, `st.markdown`, `st.error`, `st.metric`, `st.tabs`
and in the labels of widgets, so such text is never passed to these.
"""

import re
from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING

import streamlit as st

from worker.maintenance.export import FORMULA

if TYPE_CHECKING:
    import pandas as pd

# Japanese breaks between phrases where the browser knows them, and a long address anywhere.
WRAPPING = (
    "unicode-bidi:isolate;white-space:pre-wrap;overflow-wrap:anywhere;line-break:strict;word-break:normal;"
    "word-break:auto-phrase"
)
SOFT = "opacity:.7;font-size:.875rem"
BOX = "border-left:.25rem solid {color};background:color-mix(in srgb,{color} 12%,transparent);padding:.6rem .9rem"
RED, AMBER, BLUE = "#d55e00", "#e69f00", "#0072b2"


def markup(text: str, css: str = "") -> str:
    """HTML of one block that shows `text` as it is: markup has no effect, and direction ends with the block."""
    return f'<div dir="auto" lang="ja" style="{WRAPPING};{css}">{escape(text)}</div>'


def show(text: str, css: str = "") -> None:
    st.html(markup(text, css))


def note(text: str) -> None:
    """Show text in small and soft letters."""
    show(text, SOFT)


def problem(message: object) -> None:
    """Show an error, such as a message of the database, as text."""
    _box(str(message), RED)


def warning(message: object) -> None:
    _box(str(message), AMBER)


def hint(message: object) -> None:
    """Show what to do next, as on an empty database."""
    _box(str(message), BLUE)


def _box(message: str, color: str) -> None:
    """Words in backticks, as messages write commands, look like code."""
    st.html(re.sub(r"`([^`<>]+)`", r"<code>\1</code>", markup(message, BOX.format(color=color))))


def facts(pairs: Sequence[tuple[str, object]]) -> None:
    """Show names and values side by side, wrapping on a narrow screen. None is shown as a dash."""
    cells = "".join(
        f'<div style="min-width:7rem"><div style="{SOFT}">{escape(name)}</div>'
        f"{markup('–' if value is None else str(value), 'font-size:1.35rem;font-weight:600;line-height:1.3')}</div>"
        for name, value in pairs
    )
    st.html(f'<div style="display:flex;flex-wrap:wrap;gap:.9rem 2.2rem">{cells}</div>')


def table(head: Sequence[str], rows: Iterable[Sequence[object]], max_height: str = "none") -> None:
    """A table whose cells wrap, so that long texts can be read on a phone. None is shown as a dash."""
    # `anywhere` would let the columns shrink to one letter.
    wrapping = WRAPPING.replace("anywhere", "break-word")
    cell = f"padding:.3rem .8rem .3rem 0;text-align:left;vertical-align:top;{wrapping}"
    lines = "".join(
        "<tr>"
        + "".join(f'<td dir="auto" style="{cell}">{"–" if v is None else escape(str(v))}</td>' for v in row)
        + "</tr>"
        for row in rows
    )
    heads = "".join(f'<th style="{cell};{SOFT}">{escape(name)}</th>' for name in head)
    st.html(
        f'<div style="overflow:auto;max-height:{max_height}"><table style="border-collapse:collapse;font-size:.9rem">'
        f"<tr>{heads}</tr>{lines}</table></div>"
    )


def as_csv(frame: "pd.DataFrame") -> bytes:
    """CSV in which a spreadsheet runs no cell as a formula: an apostrophe precedes it. UTF-8 with a mark for Excel."""
    safe = frame.copy()
    for name in range(safe.shape[1]):
        column = safe.iloc[:, name]
        if column.dtype.kind not in "biufcmM":
            safe.isetitem(name, [_cell(value) for value in column])
    safe.columns = safe.columns.map(_cell)
    return bytes(safe.to_csv(index=False).encode("utf-8-sig"))


def _cell(value: object) -> object:
    if isinstance(value, dict | list):
        value = str(value)
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value


def as_parquet(frame: "pd.DataFrame") -> bytes:
    """The frame as it is; JSON columns become text, since their objects may differ from row to row."""
    import io
    import json

    plain = frame.copy()
    for name in range(plain.shape[1]):
        if plain.iloc[:, name].map(lambda value: isinstance(value, dict | list)).any():
            dumped = [None if value is None else json.dumps(value, ensure_ascii=False) for value in plain.iloc[:, name]]
            plain.isetitem(name, dumped)
    target = io.BytesIO()
    plain.to_parquet(target, index=False)
    return target.getvalue()
