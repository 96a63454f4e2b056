"""The page Ask: one SELECT, its result as a table, a chart and a file, with the schema beside it."""

from dataclasses import dataclass
from itertools import islice
from typing import Any

import pandas as pd
import streamlit as st

from db.errors import DatabaseError
from db.models import Base
from db.querying import frames
from db.querying.readonly import STATEMENT_TIMEOUT_MS, run_query
from db.schema_page import EXAMPLES
from db.views import VIEWS, sql_type
from worker.console import charts, queries, text
from worker.console.context import Console
from worker.console.queries import JAPAN

SHOWN_ROWS = 10_000
OWN = "A query of your own"
FIRST = "SELECT label, count(*) AS tweets\nFROM v_predictions_current\nGROUP BY label\nORDER BY tweets DESC"
STOPPED = ("interrupted", "statement timeout")
KINDS = ("Bars", "Line", "Points")


@dataclass(frozen=True)
class Answer:
    """`cut`: there are more rows than `SHOWN_ROWS`. `problem` is set when the query was refused."""

    sql: str
    frame: pd.DataFrame
    cut: bool = False
    problem: str = ""


def render(console: Console) -> None:
    st.title("Ask")
    if refusal := why_not(console):
        text.warning(refusal)
        return
    if queries.champion(console) is None:
        text.hint("The tables are empty so far. Run `tweetscore demo`, or `tweetscore train` and `tweetscore push`.")
    left, right = st.columns((3, 2), gap="large")
    with left:
        _box(console)
    with right:
        _schema()
    answer: Answer | None = st.session_state.get("answer")
    if answer is not None:
        _show(answer)


def why_not(console: Console) -> str:
    """Why this visitor may not ask. A PostgreSQL role that can do more than read could read files of its server."""
    if console.settings.reader_url or console.may("operate") or console.settings.query_url.startswith("sqlite"):
        return ""
    return (
        "SQL of visitors runs with a read-only role of PostgreSQL only: create one with `tweetscore db grant-readonly "
        "ROLE` and set TWEETSCORE_READER_URL"
    )


def ask(console: Console, sql: str) -> Answer:
    """Run one SELECT, read-only, and take up to `SHOWN_ROWS` rows."""
    try:
        with run_query(console.settings.query_url, sql) as (columns, rows):
            taken = list(islice(rows, SHOWN_ROWS + 1))
            return Answer(sql, frames.of_rows(columns, taken[:SHOWN_ROWS]), len(taken) > SHOWN_ROWS)
    except DatabaseError as error:
        problem = str(error)
        if any(word in problem for word in STOPPED):
            seconds = STATEMENT_TIMEOUT_MS // 1000
            problem = f"the query was stopped: it gave no row for {seconds} s; add a LIMIT, or a condition on a time"
        return Answer(sql, pd.DataFrame(), problem=problem)


def _box(console: Console) -> None:
    st.session_state.setdefault("sql", FIRST)
    st.selectbox("Question", [OWN, *EXAMPLES], key="question", on_change=_fill)
    with st.form("ask", border=False):
        st.text_area("SQL, one SELECT", key="sql", height=210)
        asked = st.form_submit_button("Run", type="primary")
    text.note("The query runs read-only. Ctrl+Enter runs it, too.")
    if asked:
        with st.spinner("The database works …"):
            st.session_state["answer"] = ask(console, st.session_state["sql"])


def _fill() -> None:
    question = st.session_state["question"]
    if question in EXAMPLES:
        st.session_state["sql"] = EXAMPLES[question].strip()
        st.session_state.pop("answer", None)


def relations() -> dict[str, tuple[str, list[tuple[str, str, str]]]]:
    """What can be asked, views first: the comment, and name, type and comment of the columns."""
    found: dict[str, tuple[str, list[tuple[str, str, str]]]] = {}
    for view in VIEWS:
        rows = [(column.name, column.type, column.comment) for column in view.columns]
        found[view.name] = (view.comment, rows)
    for table in sorted(Base.metadata.tables.values(), key=lambda table: table.name):
        rows = [(column.name, sql_type(column), column.comment or "") for column in table.columns]
        found[table.name] = (table.comment or "", rows)
    return found


def _schema() -> None:
    every = relations()
    name = st.selectbox("Views and tables", [*every], key="relation")
    comment, columns = every[name]
    text.note(comment)
    text.table(("column", "type", "what it holds"), columns, "21rem")


def _show(answer: Answer) -> None:
    st.divider()
    if answer.problem:
        text.problem(answer.problem)
        return
    frame = answer.frame
    if frame.empty:
        text.note("The query gave no rows.")
        return
    if answer.cut:
        text.warning(f"The first {SHOWN_ROWS:,} rows are shown and downloaded; the query has more.")
    table, chart = st.tabs([f"Table, {len(frame):,} rows", "Chart"])
    with table:
        st.dataframe(shown(frame), hide_index=True, column_config=times(frame))
        _download(frame)
    with chart:
        _chart(frame)


def shown(frame: pd.DataFrame) -> pd.DataFrame:
    """The frame for a table: names differ, and objects and bytes are text."""
    plain = frame.copy()
    plain.columns = pd.Index(unique_names(frame))
    for place in range(plain.shape[1]):
        column = plain.iloc[:, place]
        if column.dtype == "object":
            plain.isetitem(place, [None if value is None else str(value) for value in column])
    return plain


def times(frame: pd.DataFrame) -> dict[str, Any]:
    """How the columns of times and of days are shown."""
    found: dict[str, Any] = {}
    for name, kind in zip(unique_names(frame), frame.dtypes, strict=True):
        if isinstance(kind, pd.DatetimeTZDtype):
            form = "YYYY-MM-DD HH:mm:ss"
            found[name] = st.column_config.DatetimeColumn(f"{name} (Japan time)", format=form, timezone=JAPAN)
        elif pd.api.types.is_datetime64_dtype(kind):
            found[name] = st.column_config.DateColumn(name, format="YYYY-MM-DD")
    return found


def unique_names(frame: pd.DataFrame) -> list[str]:
    names: list[str] = []
    for name in map(str, frame.columns):
        names.append(name if name not in names else f"{name} ({len(names) + 1})")
    return names


def _download(frame: pd.DataFrame) -> None:
    csv, parquet, _ = st.columns((1, 1, 3))
    plain = shown(frame)
    csv.download_button(
        "Download CSV", lambda: text.as_csv(plain), "answer.csv", "text/csv", on_click="ignore", width="stretch"
    )
    parquet.download_button(
        "Download Parquet", lambda: text.as_parquet(plain), "answer.parquet", "application/vnd.apache.parquet",
        on_click="ignore", width="stretch",
    )  # fmt: skip


def _chart(frame: pd.DataFrame) -> None:
    plain = shown(frame)
    names = list(plain.columns)
    x, y, colour, kind = suggest(plain)
    if y is None:
        text.note("A chart needs a column of numbers.")
        return
    columns = st.columns(4)
    x = columns[0].selectbox("Horizontal", names, index=names.index(x))
    y = columns[1].selectbox("Vertical", names, index=names.index(y))
    choices = [None, *names]
    place = columns[2].selectbox(
        "Colour", range(len(choices)), index=choices.index(colour), format_func=lambda i: choices[i] or "(none)"
    )
    kind = columns[3].selectbox("Kind", KINDS, index=KINDS.index(kind))
    st.altair_chart(charts.of_answer(plain, x, y, choices[place], kind), width="stretch")


def suggest(frame: pd.DataFrame) -> tuple[str, str | None, str | None, str]:
    """Columns for x, y and colour, and the kind: a line over times, points of two numbers, or else bars."""
    names = [name for name in frame.columns if frame[name].notna().any()] or list(frame.columns)
    times = [name for name in names if pd.api.types.is_datetime64_any_dtype(frame[name])]
    numbers = [
        name for name in names
        if pd.api.types.is_numeric_dtype(frame[name]) and not pd.api.types.is_bool_dtype(frame[name])
    ]  # fmt: skip
    words = [name for name in names if name not in times and name not in numbers]
    measured = [name for name in numbers if not (name == "id" or name.endswith("_id"))] or numbers
    x = (times or words or [name for name in numbers if name not in measured[:1]] or names)[0]
    y = next((name for name in measured if name != x), measured[0] if measured else None)
    colour = next((name for name in words if name != x and frame[name].nunique() <= len(charts.PALETTE)), None)
    kind = "Line" if x in times else "Points" if x in numbers else "Bars"
    return x, y, colour, kind
