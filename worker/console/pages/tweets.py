"""The page Tweets: find tweets, open one, download what was found."""

import json
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pandas as pd
import streamlit as st

from db.errors import TweetscoreError
from worker.console import charts, filters, queries, text, tweet_search
from worker.console.context import Console
from worker.console.tweet_search import CERTAIN, DOWNLOAD_ROWS, PAGE_ROWS, Place, Wanted

EPOCH = datetime.fromtimestamp(0, UTC)
TIME = st.column_config.DatetimeColumn
TIME_FORMAT = "YYYY-MM-DD HH:mm:ss"


def render(console: Console) -> None:
    st.title("Tweets")
    champion = queries.champion(console)
    if champion is None:
        text.hint(
            "No model is the champion yet, so nothing is scored. Promote one (page Models, or "
            "`tweetscore models promote 1`), then publish tweets, such as with `tweetscore push tweets.jsonl`."
        )
        return
    chosen = filters.choose(console, champion)
    if chosen is None:
        text.hint(
            "No tweets are scored yet. Run `tweetscore up`, and publish some with `tweetscore push tweets.jsonl`."
        )
        return
    wanted = _conditions(Wanted(champion.version_id, chosen.start, chosen.end, chosen.topic), champion)
    places = _places(replace(wanted, start=EPOCH, end=EPOCH), chosen.period)
    frame = tweet_search.page(console, wanted, places[-1] if places else None, PAGE_ROWS + 1)
    if frame.empty:
        text.hint("No tweet fits. Choose a longer period or fewer conditions.")
        _open_one(console, champion, None)
        return
    # Another key for another page: the selection is a number of a row.
    selected = _table(frame.head(PAGE_ROWS), f"table {len(places)} {wanted}")
    _turn_pages(frame, places)
    _download(console, wanted)
    _open_one(console, champion, selected)


def _conditions(wanted: Wanted, champion: queries.Champion) -> Wanted:
    columns = st.columns((3, 1.5, 1.5, 2))
    words = columns[0].text_input("Text contains", key="words", placeholder="any text")
    label = columns[1].selectbox(
        "Label", ["", *champion.labels], format_func=lambda value: value or "Any label", key="label"
    )
    author = columns[2].text_input("Author id", key="author", placeholder="any author")
    low, high = columns[3].slider("Probability of the label", 0.0, 1.0, CERTAIN, 0.01, key="probability")
    return replace(wanted, text=words, label=label, author=author.strip(), probability=(low, high))


def _places(wanted: Wanted, period: str) -> list[Place]:
    """The ends of the pages before this one. Other conditions begin at the first page; the clock alone does not."""
    if st.session_state.get("page_of") != (wanted, period):
        st.session_state["page_of"], st.session_state["places"] = (wanted, period), []
    places: list[Place] = st.session_state["places"]
    return places


def _table(frame: pd.DataFrame, key: str) -> str | None:
    """The page as a table. Returns the id of the selected tweet."""
    event: Any = st.dataframe(
        frame, hide_index=True, height=420, on_select="rerun", selection_mode="single-row", key=key,
        column_order=("label", "text", "probability", "topic", "author_id", "received_at", "tweet_id"),
        column_config={
            "text": st.column_config.TextColumn("text", width=400),
            "probability": st.column_config.ProgressColumn("probability", min_value=0, max_value=1, format="%.2f"),
            "author_id": "author", "tweet_id": "id",
            "received_at": TIME("received (Japan time)", format=TIME_FORMAT, timezone=queries.JAPAN),
        },
    )  # fmt: skip
    rows = event.selection.rows
    return str(frame["tweet_id"].iloc[rows[0]]) if rows and rows[0] < len(frame) else None


def _turn_pages(frame: pd.DataFrame, places: list[Place]) -> None:
    back, forth, where = st.columns((1, 1, 3), vertical_alignment="center")
    shown = frame.head(PAGE_ROWS)
    back.button("Newer", disabled=not places, on_click=_pop, args=(places,), width="stretch")
    further = len(frame) > PAGE_ROWS
    forth.button(
        "Older", disabled=not further, on_click=places.append, args=(tweet_search.last_place(shown),), width="stretch"
    )
    with where:
        first = len(places) * PAGE_ROWS + 1
        text.note(f"Tweets {first:,} to {first + len(shown) - 1:,}, the newest first. Select a row to open the tweet.")


def _pop(places: list[Place]) -> None:
    if places:
        places.pop()


def _download(console: Console, wanted: Wanted) -> None:
    """Files are made when they are asked for, from up to `DOWNLOAD_ROWS` rows."""

    def made(write: Callable[[pd.DataFrame], bytes]) -> Callable[[], bytes]:
        return lambda: write(tweet_search.all_of(console, wanted))

    csv, parquet, note = st.columns((1, 1, 3), vertical_alignment="center")
    csv.download_button("Download CSV", made(text.as_csv), "tweets.csv", "text/csv", on_click="ignore", width="stretch")
    parquet.download_button(
        "Download Parquet", made(text.as_parquet), "tweets.parquet", "application/vnd.apache.parquet",
        on_click="ignore", width="stretch",
    )  # fmt: skip
    with note:
        text.note(f"All that these conditions find, up to {DOWNLOAD_ROWS:,} tweets.")


def _open_one(console: Console, champion: queries.Champion, selected: str | None) -> None:
    """The tweet that was selected, or else the one of the address."""
    if selected is not None:
        st.query_params["tweet"] = selected
    tweet_id = selected or st.query_params.get("tweet")
    if not tweet_id:
        return
    st.divider()
    try:
        tweet = tweet_search.one(console, tweet_id)
    except TweetscoreError as error:  # such as an id in the address that is no text for a database
        text.problem(error)
        return
    if tweet is None:
        text.warning(f"There is no tweet {tweet_id}.")
        return
    st.subheader("Tweet")
    text.show(str(tweet["text"]), "font-size:1.25rem;line-height:1.7;max-width:44rem")
    text.note(" · ".join(_facts(tweet)))
    left, right = st.columns(2, gap="large")
    with left:
        _predictions(tweet_search.predictions_of(console, tweet_id), champion)
    with right:
        _labels(tweet_search.labels_of(console, tweet_id))
    with st.expander("Raw record"):
        st.code(json.dumps(tweet, ensure_ascii=False, indent=2, default=_plain), language="json", wrap_lines=True)


def _facts(tweet: dict[str, object]) -> list[str]:
    written, received = tweet["tweet_created_at"], tweet["received_at"]
    shown = [f"id {tweet['tweet_id']}"]
    shown += [f"{name} {tweet[key]}" for name, key in (("author", "author_id"), ("topic", "topic")) if tweet[key]]
    for name, at in (("written", written), ("received", received)):
        if isinstance(at, pd.Timestamp) and not pd.isna(at):
            shown.append(f"{name} {at.tz_convert(queries.JAPAN):%Y-%m-%d %H:%M:%S}")
    return [*shown, "Japan time"]


def _plain(value: object) -> object:
    return None if value is pd.NaT or value is pd.NA else str(value)


def _predictions(frame: pd.DataFrame, champion: queries.Champion) -> None:
    st.markdown("**Probabilities**")
    rows = [
        {"model": _model(version, champion), "label": str(label), "probability": value}
        for version, probabilities in zip(frame["model_version_id"], frame["probabilities"], strict=True)
        for label, value in probabilities.items()
    ]
    if not rows:
        text.note("No model has scored this tweet.")
        return
    bars = pd.DataFrame(rows)
    labels = list(dict.fromkeys([*champion.labels, *bars["label"]]))
    st.altair_chart(charts.probabilities(bars, labels), width="stretch")
    st.dataframe(
        frame.drop(columns="probabilities"), hide_index=True,
        column_config={
            "model_version_id": "model", "probability": st.column_config.NumberColumn(format="%.3f"),
            "score_signed": st.column_config.NumberColumn("score, -1 to 1", format="%.3f"),
            "scored_at": TIME("scored (Japan time)", format=TIME_FORMAT, timezone=queries.JAPAN),
        },
    )  # fmt: skip


def _model(version: int, champion: queries.Champion) -> str:
    return f"Model {version}" + (", champion" if version == champion.version_id else "")


def _labels(frame: pd.DataFrame) -> None:
    st.markdown("**Labels by people**")
    if frame.empty:
        text.note("Nobody has labelled this tweet.")
        return
    st.dataframe(
        frame, hide_index=True,
        column_config={"labelled_at": TIME("labelled (Japan time)", format=TIME_FORMAT, timezone=queries.JAPAN)},
    )  # fmt: skip
