"""The page Models: the leaderboard, one model in detail, two models compared, promote and roll back."""

from typing import TYPE_CHECKING, Any

import streamlit as st

from db.registry import ALIASES
from worker.console import acting, text
from worker.console.context import Console
from worker.console.model import card, comparing, model_charts, model_queries, promoting
from worker.console.model.model_queries import CONTINUOUS, MULTI_LABEL, Model
from worker.console.queries import JAPAN

if TYPE_CHECKING:
    import pandas as pd

PICTURE_PX = 460
FIGURE = st.column_config.NumberColumn(format="%.3f")
SECTIONS = ("Figures", "Confusion", "Calibration", "Wrong test rows", "Card", "Evaluations", "Compare")
NOT_MEASURED = (
    "This model has no test figures: no job measured it. `tweetscore models evaluate {id} labelled.csv` measures it on "
    "a labelled file."
)


def render(console: Console) -> None:
    st.title("Models")
    acting.show_told()
    board = model_queries.leaderboard(console)
    if board.empty:
        text.hint(
            "There is no model yet. Train one on the page Jobs, with `tweetscore train labelled.csv`, or run "
            "`tweetscore demo`."
        )
        return
    _board(console, board)
    chosen = _choose(board)
    found = model_queries.model(console, chosen)
    if found is None:
        text.hint(f"Model {chosen} was deleted a moment ago.")
        return
    _promotions(console, board, found)
    section = st.segmented_control(
        "Show", SECTIONS, default=SECTIONS[0], key="models_section", label_visibility="collapsed"
    )
    with acting.showing():
        _draw(console, found, section or SECTIONS[0], board)


def _board(console: Console, board: "pd.DataFrame") -> None:
    st.subheader("Leaderboard", anchor=False)
    if not board["mean_absolute_error"].notna().any():
        board = board.drop(columns=["mean_absolute_error", "quadratic_kappa"])
    shown = {
        "model_version_id": "model", "alias": "alias", "base_model": "base model", "job_id": "job",
        "accuracy": "accuracy", "f1_macro": "F1 macro", "f1_macro_low": "F1 from", "f1_macro_high": "F1 to",
        "tfidf_f1_macro": "F1 of TF-IDF", "roc_auc": "ROC-AUC", "ece": "calibration error",
        "quadratic_kappa": "kappa", "mean_absolute_error": "mean absolute error", "created_at": "created (Japan time)",
    }  # fmt: skip
    named = board[[name for name in shown if name in board]].rename(columns=shown)
    named["created (Japan time)"] = named["created (Japan time)"].dt.tz_convert(JAPAN)
    st.dataframe(
        named, hide_index=True,
        column_config={
            **{title: FIGURE for name, title in shown.items() if name in board and board[name].dtype == "float64"},
            "model": st.column_config.NumberColumn(format="%d", pinned=True),
            "job": st.column_config.NumberColumn(format="%d"),
            "created (Japan time)": st.column_config.DatetimeColumn(format="YYYY-MM-DD HH:mm", timezone=JAPAN),
        },
    )  # fmt: skip
    text.note(
        "Figures on the test rows of each model's own dataset; only those of the same rows are comparable. “F1 from” "
        "and “F1 to” are the ends of the 95 % interval of F1 macro. An empty cell was not measured."
    )
    with st.expander("History of the aliases"):
        history = model_queries.history(console)
        history["assigned_at"] = history["assigned_at"].dt.tz_convert(JAPAN)
        st.dataframe(
            history, hide_index=True,
            column_config={
                "model_version_id": st.column_config.NumberColumn("model", format="%d"),
                "assigned_at": st.column_config.DatetimeColumn(
                    "since (Japan time)", format="YYYY-MM-DD HH:mm", timezone=JAPAN
                ),
            },
        )  # fmt: skip


def _choose(board: "pd.DataFrame") -> int:
    """The model that the visitor chose, or named in the address, or else the champion, or the newest."""
    ids = [int(i) for i in board["model_version_id"]]
    rows = model_queries.records(board)
    names = {int(row["model_version_id"]): _name(row) for row in rows}
    champion = next((int(row["model_version_id"]) for row in rows if "champion" in row["alias"]), ids[0])
    asked = st.query_params.get("model", "")
    first = int(asked) if asked.isdecimal() and int(asked) in names else champion
    st.subheader("One model", anchor=False)
    chosen = st.selectbox(
        "Model", ids, index=ids.index(first), format_func=lambda i: names.get(i, f"Model {i}"), key="models_chosen"
    )
    return int(chosen)


def _name(row: dict[str, Any]) -> str:
    parts = [f"Model {row['model_version_id']}", row["alias"], row["base_model"]]
    return " · ".join(str(part) for part in parts if part)


def _promotions(console: Console, board: "pd.DataFrame", found: Model) -> None:
    if not console.may("operate"):
        return
    aliases = dict(zip(board["model_version_id"], board["alias"], strict=True))[found.id]
    with st.container(horizontal=True):
        for alias in ALIASES:
            if alias not in aliases.split(", "):
                if st.button(f"Make it the {alias}…", key=f"promote-{alias}"):
                    promoting.ask_to_promote(console, found.id, alias)
            elif st.button(f"Roll the {alias} back…", key=f"rollback-{alias}"):
                promoting.ask_to_roll_back(console, alias)


def _draw(console: Console, found: Model, section: str, board: "pd.DataFrame") -> None:
    if section == "Figures":
        _figures(console, found)
    elif section == "Confusion":
        _confusion(console, found)
    elif section == "Calibration":
        _calibration(console, found)
    elif section == "Wrong test rows":
        _wrong(console, found)
    elif section == "Card":
        _card(found)
    elif section == "Evaluations":
        _evaluations(console, found)
    else:
        comparing.draw(console, found, [int(i) for i in board["model_version_id"]])


def _figures(console: Console, found: Model) -> None:
    measured = model_queries.figures(console, found.id)
    text.facts(
        [
            ("Base model", found.base_model), ("Job", found.origin),
            ("Task", found.task.replace("_", " ")), ("Temperature", f"{found.temperature:.3f}"),
            ("Created (Japan time)", f"{found.created_at.tz_convert(JAPAN):%Y-%m-%d %H:%M}"),
        ]
    )  # fmt: skip
    if not measured:
        text.hint(NOT_MEASURED.format(id=found.id))
        return
    text.facts(
        [(name, _with_interval(measured, metric)) for metric, name in model_queries.SHOWN if (metric, "") in measured]
    )
    if labels := model_queries.of_labels(found, measured):
        st.dataframe(
            labels, hide_index=True,
            column_config=dict.fromkeys(("precision", "recall", "F1"), FIGURE)
            | {"test rows": st.column_config.NumberColumn(format="%d")},
        )  # fmt: skip
    text.note("In brackets the 95 % interval of the test rows. Rows of other times and topics can be harder.")


def _with_interval(measured: dict[tuple[str, str], float], metric: str) -> str:
    low, high = measured.get((f"{metric}_low", "")), measured.get((f"{metric}_high", ""))
    value = f"{measured[metric, '']:.3f}"
    return value if low is None or high is None else f"{value} ({low:.3f} to {high:.3f})"


def _confusion(console: Console, found: Model) -> None:
    cells = model_queries.confusion(console, found)
    if cells.empty:
        why = {CONTINUOUS: "It predicts numbers.", MULTI_LABEL: "Its rows can have several labels."}.get(found.task, "")
        text.hint(f"This model has no confusion matrix. {why}".strip())
        return
    st.altair_chart(model_charts.confusion(cells, found.labels))
    text.note(
        "Test rows by their label in the dataset and the label that the model predicts; right ones are on the diagonal."
    )


def _calibration(console: Console, found: Model) -> None:
    if found.task == CONTINUOUS:
        text.hint("This model predicts numbers and has no probabilities.")
        return
    bins = model_queries.reliability(console, found)
    if not bins["rows"].sum():
        text.hint(NOT_MEASURED.format(id=found.id))
        return
    counted = "labels of test rows" if found.task == MULTI_LABEL else "test rows"
    st.altair_chart(model_charts.reliability(bins, f"share of {counted} that are right"))
    st.altair_chart(model_charts.reliability_counts(bins, counted))
    text.note(
        "Bars on the dashed line: of the rows with a probability of 0.8, 80 % are right. Bars below it: the model is "
        "too sure. The thin lines are 95 % intervals; a dash marks a bin without rows."
    )


def _wrong(console: Console, found: Model) -> None:
    wrong = model_queries.wrongest(console, found)
    if wrong.empty:
        text.hint("No test row is wrong, or the model was not tested.")
        return
    st.dataframe(
        wrong.rename(columns={"row_number": "row", "actual": "in the dataset"}), hide_index=True,
        column_config={"probability": FIGURE, "text": st.column_config.TextColumn(width="large")},
    )  # fmt: skip
    text.note(f"The {len(wrong)} most certain errors, or largest ones. Many of them are errors of the dataset.")


def _card(found: Model) -> None:
    fetched = card.fetch(found.artifact_url, found.sha256)
    if not fetched.markdown:
        text.hint("The artifact of this model has no card.")
        return
    with st.container(horizontal=True):
        for caption, picture in fetched.captioned():
            with st.container(width=PICTURE_PX):
                text.note(caption)
                st.image(picture)
    st.html(card.as_html(fetched.markdown))


def _evaluations(console: Console, found: Model) -> None:
    rows = model_queries.evaluations(console, found.id)
    if rows.empty:
        text.hint(
            "This model was not evaluated on another file yet: "
            f"`tweetscore models evaluate {found.id} labelled.csv` does it."
        )
        return
    rows["evaluated_at"] = rows["evaluated_at"].dt.tz_convert(JAPAN)
    st.dataframe(
        rows, hide_index=True,
        column_config={
            "accuracy": FIGURE, "ece": st.column_config.NumberColumn("calibration error", format="%.3f"),
            "f1_macro": st.column_config.NumberColumn("F1 macro", format="%.3f"),
            "f1_macro_low": st.column_config.NumberColumn("F1 from", format="%.3f"),
            "f1_macro_high": st.column_config.NumberColumn("F1 to", format="%.3f"),
            "evaluated_at": st.column_config.DatetimeColumn(
                "evaluated (Japan time)", format="YYYY-MM-DD HH:mm", timezone=JAPAN
            ),
        },
    )  # fmt: skip
