"""The page Health: stream, workers, engines, dead letters, disk and schema."""

import json
from datetime import UTC, datetime, timedelta

import pandas as pd
import streamlit as st

from db.errors import TweetscoreError
from worker.app import client_app
from worker.connections import broker, open_stream
from worker.console import queries, stream_state, system_state, text
from worker.console.context import Console
from worker.console.stream_state import duration
from worker.errors import BadRequest, ServerFailed
from worker.maintenance import dead_letters
from worker.process.heartbeat import read_heartbeats

REDRAW_SECONDS = 5
SHOWN_LETTERS = 200
LETTERS = "SELECT record_id, reason, attempts, buried_at FROM dead_letters ORDER BY buried_at DESC LIMIT :rows"
DONE = {"retry": "put back into the stream", "drop": "dropped"}


def render(console: Console) -> None:
    st.title("Health")
    _moving(console)
    _dead_letters(console)
    _machine(console)


@st.fragment(run_every=REDRAW_SECONDS)
def _moving(console: Console) -> None:
    _stream(console)
    _workers(console)


def _stream(console: Console) -> None:
    st.subheader("Stream")
    state = stream_state.read(console.settings)
    if state.problem or state.depth is None:
        text.warning(state.problem)
        return
    text.facts(
        [
            ("Records in the stream", f"{state.depth.length:,}"),
            ("Not read yet", None if state.depth.lag is None else f"{state.depth.lag:,}"),
            ("Pending: read, not stored", f"{state.depth.pending:,}"),
            ("Lag: age of the oldest", duration(state.lag_seconds)),
            ("Consumers", len(state.consumers)),
        ]
    )
    if state.consumers:
        rows = [(one.name, f"{one.pending:,}", f"{duration(one.idle_seconds)} ago") for one in state.consumers]
        text.table(("consumer", "pending", "last command"), rows, "14rem")


def _workers(console: Console) -> None:
    st.subheader("Workers")
    beats = read_heartbeats(console.settings.run)
    if not beats:
        text.hint("No worker runs in this home. Start `tweetscore up`.")
    else:
        rows = [
            (
                beat.kind, "silent: it may hang" if beat.stale else beat.state, beat.waits_for, beat.host, beat.pid,
                f"{duration(beat.age_seconds)} ago",
            )
            for beat in beats
        ]  # fmt: skip
        text.table(("worker", "state", "waits for", "host", "process", "heartbeat"), rows)
    scored = scored_by(console)
    if not scored.empty:
        text.note("Scored in the last hour, by workers on any machine")
        text.table(("worker", "model", "windows", "tweets", "tweets/s while scoring"), _rates(scored))


def scored_by(console: Console) -> pd.DataFrame:
    """What each worker scored in the last hour. `busy_ms` leaves out what reading waited for."""
    since = datetime.now(UTC) - timedelta(hours=1)
    return console.frame(
        """SELECT worker, model_version_id, count(*) AS windows, sum(tweets) AS tweets,
                  sum(tokenise_ms + forward_ms + store_ms) AS busy_ms
           FROM scoring_windows WHERE started_at >= :since
           GROUP BY worker, model_version_id ORDER BY worker, model_version_id LIMIT 100""",
        {"since": queries.stamp(since.replace(second=0, microsecond=0))},
    )


def _rates(frame: pd.DataFrame) -> list[tuple[object, ...]]:
    return [
        (
            row["worker"], row["model_version_id"], f"{row['windows']:,}", f"{row['tweets']:,}",
            f"{1000 * row['tweets'] / row['busy_ms']:,.0f}" if row["busy_ms"] else None,
        )
        for row in frame.to_dict("records")
    ]  # fmt: skip


def _dead_letters(console: Console) -> None:
    st.subheader("Dead letters")
    if told := st.session_state.pop("told", None):
        (text.hint if told[0] else text.problem)(told[1])
    count = int(console.frame("SELECT count(*) AS n FROM dead_letters")["n"].iloc[0])
    if count == 0:
        text.note("None: every record could be scored.")
        return
    letters = console.frame(LETTERS, {"rows": SHOWN_LETTERS})
    event = st.dataframe(
        letters, hide_index=True, on_select="rerun", selection_mode="multi-row",
        height=min(38 + 35 * len(letters), 320), key=f"letters {count}",
        column_config={
            "record_id": "record",
            "buried_at": st.column_config.DatetimeColumn(
                "since (Japan time)", format="YYYY-MM-DD HH:mm:ss", timezone=queries.JAPAN
            ),
        },
    )  # fmt: skip
    rows = [row for row in event.selection.rows if row < len(letters)]
    selected = [str(letters["record_id"].iloc[row]) for row in rows]
    shown = f"{count:,} dead letters" + (f", the newest {SHOWN_LETTERS} shown" if count > SHOWN_LETTERS else "")
    text.note(
        f"{shown}. Select rows to see what they hold" + (", or to act on them." if console.may("operate") else ".")
    )
    _actions(console, selected, count)
    for record_id in selected[:5]:
        text.note(f"Record {record_id}")
        st.code(payload(console, record_id), language=None, wrap_lines=True)


def payload(console: Console, record_id: str) -> str:
    """What a dead letter holds, as text: JSON indented, other bytes escaped."""
    found = console.frame("SELECT payload FROM dead_letters WHERE record_id = :id", {"id": record_id})
    if found.empty:
        return ""
    content = bytes(found["payload"].iloc[0])
    try:
        return json.dumps(json.loads(content), ensure_ascii=False, indent=2)
    except (ValueError, RecursionError):
        return content.decode("utf-8", errors="backslashreplace")


def _actions(console: Console, selected: list[str], count: int) -> None:
    if not console.may("operate"):
        return
    columns = st.columns(4)
    for place, what in enumerate(DONE):
        name, given = what.capitalize(), (console, what, selected)
        with columns[2 * place]:
            st.button(f"{name} selected", disabled=not selected, on_click=_tell, args=given, width="stretch")
        with columns[2 * place + 1], st.popover(f"{name} all", width="stretch"):
            st.write(f"{name} all {count:,} dead letters?" + (" They are deleted." if what == "drop" else ""))
            st.button(f"Yes, {what} all", on_click=_tell, args=(console, what, None), type="primary")


def _tell(console: Console, what: str, ids: list[str] | None) -> None:
    try:
        done = act(console, what, ids)
        st.session_state["told"] = (True, f"{done:,} dead letters {DONE[what]}")
    except TweetscoreError as error:
        st.session_state["told"] = (False, str(error))


def act(console: Console, what: str, ids: list[str] | None) -> int:
    """Retry or drop dead letters, all when `ids` is None, as `tweetscore dead` does. Returns how many."""
    if not console.may("operate"):
        raise BadRequest("this visitor may not change dead letters; TWEETSCORE_CONSOLE_ACCESS must be operate")
    settings, database = console.settings, console.database()
    if what == "drop":
        return dead_letters.drop(database, ids)
    # The embedded server would start here and end with this call, before a worker has read the records.
    if (problem := stream_state.read(settings).problem) is not None:
        raise ServerFailed(f"the dead letters were not retried: {problem}")
    with broker(settings) as url:
        return dead_letters.retry(database, open_stream(settings, url), client_app(settings), ids)


def _machine(console: Console) -> None:
    st.subheader("Disk and database")
    schema, disk = system_state.schema(console), system_state.disk(console)
    text.facts(
        [
            ("Free on the disk of the home", f"{system_state.size(disk.free)} of {system_state.size(disk.total)}"),
            ("Database", "SQLite" if queries.is_sqlite(console) else "PostgreSQL"),
            ("Size of the database", system_state.size(disk.database)),
            ("Schema", schema.found if schema.found == schema.newest else f"{schema.found}, newest {schema.newest}"),
        ]
    )
    if disk.free < 0.1 * disk.total:
        text.warning("Less than a tenth of the disk is free. `tweetscore delete` and TWEETSCORE_RETENTION_DAYS help.")
    if schema.misfit:
        text.warning(schema.misfit)
    text.note(f"Home {console.settings.home}")
    st.subheader("Engines of the champion")
    choices = system_state.engines(console)
    if not choices:
        text.note("No engine was tried yet. A worker tries them when it first loads the champion.")
    for choice in choices:
        text.note(f"On {choice.hardware}, {choice.token_budget:,} tokens per forward pass")
        rows = [
            (
                trial.engine, "serves" if trial.serves else None,
                None if trial.tweets_per_second is None else f"{trial.tweets_per_second:,.0f}",
                trial.verdict or "not needed",
            )
            for trial in sorted(choice.trials, key=lambda trial: not trial.serves)
        ]  # fmt: skip
        text.table(("engine", "", "tweets/s", "finding"), rows)
