"""Two models compared on the page Models: their test rows, as `tweetscore models compare`, and the stream."""

from typing import TYPE_CHECKING, Any

import streamlit as st

from db import registry
from training.data.columns import VALUE
from worker.console import acting, text
from worker.console.context import Console
from worker.console.model import model_queries
from worker.console.model.model_queries import Model

if TYPE_CHECKING:
    from worker.quality.comparison import LiveComparison

FIGURE = st.column_config.NumberColumn(format="%.4f")
BASELINES = ("tfidf_", "majority_")


def draw(console: Console, found: Model, ids: list[int]) -> None:
    others = [i for i in ids if i != found.id]
    if not others:
        text.hint("There is no other model to compare with.")
        return
    other = int(st.selectbox("Compare with", others, format_func=lambda i: f"Model {i}", key="models_other"))
    rows = metrics(console, found.id, other)
    if rows:
        st.dataframe(
            rows, hide_index=True,
            column_config={f"model {found.id}": FIGURE, f"model {other}": FIGURE,
                           "difference": st.column_config.NumberColumn(format="%+.4f")},
        )  # fmt: skip
    text.show(shared_rows(console, found, other))
    st.subheader("On tweets of the stream", anchor=False)
    # Counts every tweet that both scored, which takes seconds among a million.
    if st.button("Compare on tweets that both scored"):
        with acting.showing(), st.spinner("Counting the tweets that both scored"):
            from worker.quality.comparison import compare_live  # loads SciPy

            _live(compare_live(console.database(), found.id, other))


def metrics(console: Console, one: int, other: int) -> list[dict[str, Any]]:
    """The test metrics of both models and the differences, without those of baselines."""
    figures = [model_queries.figures(console, model) for model in (one, other)]
    keys = [key for key in sorted(set(figures[0]) | set(figures[1])) if not key[0].startswith(BASELINES)]
    return [
        {"metric": metric, "label": label, f"model {one}": figures[0].get((metric, label)),
         f"model {other}": figures[1].get((metric, label)), "difference": _difference(figures, (metric, label))}
        for metric, label in keys
    ]  # fmt: skip


def _difference(figures: list[dict[tuple[str, str], float]], key: tuple[str, str]) -> float | None:
    one, other = (found.get(key) for found in figures)
    return None if one is None or other is None else other - one


def shared_rows(console: Console, found: Model, other: int) -> str:
    """A sentence on the test rows that both models have, and whether chance could make the difference."""
    from training.evaluation.metrics import mcnemar  # loads SciPy and scikit-learn

    with console.database().read() as session:
        shared, only_one, only_other = registry.paired(session, found.id, other)
        numbers = found.labels == (VALUE,) and registry.get(session, other).labels == [VALUE]
    if not shared:
        return "The models have no test row in common, so their test metrics cannot be compared."
    p_value = mcnemar(only_one, only_other)
    verb, test = ("is closer on", "exact sign test") if numbers else ("is right on", "exact McNemar test")
    verdict = "the difference could be chance" if p_value >= 0.05 else "beyond chance"
    return (
        f"Of {shared:,} test rows in common, only model {found.id} {verb} {only_one:,}, and only model {other} on "
        f"{only_other:,}: {verdict} ({test}, p = {p_value:.3g})."
    )


def _live(live: "LiveComparison") -> None:
    if not live.tweets:
        text.hint("No tweet was scored by both models. A challenger scores a share of the stream, set by an operator.")
        return
    text.show(
        f"Both scored {live.tweets:,} tweets, and differ on {live.differing:,} ({live.differing / live.tweets:.1%})."
    )
    text.show(f"Labelled tweets: {live.labelled.sentence(live.one, live.other)}.")
    text.show(f"Those picked at random: {live.random.sentence(live.one, live.other)}.")
    names = (f"model {live.one}", f"model {live.other}")
    st.dataframe(
        [{names[0]: first, names[1]: second, "tweets": n} for (first, second), n in sorted(live.confusion.items())],
        hide_index=True,
    )
    if live.examples:
        text.note("Tweets on which they differ, with the label of people if they gave one.")
        st.dataframe(
            [{names[0]: e.first, names[1]: e.second, "people": e.label, "text": e.text} for e in live.examples],
            hide_index=True, column_config={"text": st.column_config.TextColumn(width="large")},
        )  # fmt: skip
