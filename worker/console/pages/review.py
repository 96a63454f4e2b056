"""The page Review: one tweet at a time, labelled with the keys.

No prediction of any model is shown, since people tend to agree with what they see. Only the fragment is drawn again
after a key, so that the next tweet follows at once.
"""

import time
from typing import TYPE_CHECKING
from zoneinfo import ZoneInfo

import streamlit as st

from training.data.columns import MULTI_LABEL_SEPARATOR
from worker.console import acting, progress_bar, text
from worker.console.context import Console
from worker.console.model.model_queries import champion_task
from worker.console.queries import JAPAN
from worker.console.review_keys import SKIP_KEY, UNDO_KEY, button_text, keys_of, labels_a_minute
from worker.errors import BadRequest

if TYPE_CHECKING:
    from worker.labelling.review import Progress, Question

PICKED_AT_ONCE = 50
LONGEST_NAME = 100
# In the session: when this visitor gave labels, the question that was undone, the last answer, the labels chosen so far
# for a tweet that can have several, and the tweet that is shown.
TIMES, AGAIN, LAST, CHOSEN, SHOWN = (f"review_{name}" for name in ("times", "again", "last", "chosen", "shown"))
NAME = "annotator"
TWEET = (
    "font-size:1.6rem;line-height:1.75;min-height:8rem;padding:1.1rem 1.4rem;border-radius:.6rem;"
    "border:1px solid color-mix(in srgb,currentColor 25%,transparent)"
)


def render(console: Console) -> None:
    st.title("Review")
    if not console.may("label"):
        text.hint(
            f"Your access is {console.access!r}: you see how far labelling is. To give labels you need the access "
            "'label'."
        )
        _look(console)
        return
    annotator = _annotator(console)
    if annotator:
        _review(console, annotator)


def _annotator(console: Console) -> str | None:
    """The name that labels are stored under: of the account, or entered once."""
    if console.settings.console_oidc_metadata_url is not None:
        return console.visitor
    with st.container(horizontal=True, vertical_alignment="center"):
        with st.popover("Annotator"):
            # Streamlit forgets what was entered when another page opens.
            given = st.text_input("Your name", st.session_state.get(NAME, console.visitor), max_chars=LONGEST_NAME)
        name = st.session_state[NAME] = " ".join(given.split())
        if name and name.isprintable():
            text.note(f"Your labels are stored under the name {name}.")
            return name
    text.hint("Enter your name under Annotator: labels are stored under it.")
    return None


def _look(console: Console) -> None:
    from worker.labelling import review

    _figures(review.progress(console.database(), console.visitor), None)


@st.fragment
def _review(console: Console, annotator: str) -> None:
    from worker.labelling import review

    acting.show_told()
    with acting.showing():
        database = console.database()
        labels = review.label_names(database)
        question = st.session_state.get(AGAIN) or review.next_question(database, annotator)
        progress = review.progress(database, annotator)
        if question is None:
            _nothing_open(console, annotator, progress)
        else:
            _ask(console, annotator, question, labels, progress)
        _figures(progress, labels_a_minute(st.session_state.get(TIMES, [])))


def _ask(console: Console, annotator: str, question: "Question", labels: list[str], progress: "Progress") -> None:
    done = progress.picked - progress.open
    progress_bar.draw(done / progress.picked, f"{done:,} of {progress.picked:,} picked tweets done")
    shown = st.container()
    st.session_state[SHOWN] = question.tweet_id
    # The keys of the widgets name the tweet: a late press of a key is then never taken for the tweet that follows.
    with st.container(horizontal=True, key="review-labels"):
        if champion_task(console) == "multi_label":
            _several(console, annotator, question, labels)
        else:
            for place, (label, key) in enumerate(keys_of(labels)):
                st.button(
                    button_text(label), key=f"{question.tweet_id} {place}", shortcut=key, type="primary",
                    on_click=_answer, args=(console, annotator, question, label),
                )  # fmt: skip
        skip, undo = (f"{question.tweet_id} {name}" for name in ("skip", "undo"))
        st.button("Skip", key=skip, shortcut=SKIP_KEY, on_click=_skip, args=(console, annotator, question))
        st.button("Undo", key=undo, shortcut=UNDO_KEY, on_click=_undo, args=(console, annotator))
    # The text comes last, so that its keys work once it is seen.
    with shown, st.container(key=f"review-tweet-{question.place}"):
        text.show(question.text, TWEET)
    about = [f"Topic: {question.topic}"] if question.topic else []
    if question.tweet_created_at is not None:
        about.append(f"written {question.tweet_created_at.astimezone(ZoneInfo(JAPAN)):%Y-%m-%d %H:%M} Japan time")
    if last := st.session_state.get(LAST):
        about.append(f"the tweet before: {last}")
    text.note(" · ".join(about))


def _several(console: Console, annotator: str, question: "Question", labels: list[str]) -> None:
    """Buttons that choose any number of labels, and one that stores them."""
    tweet_id, chosen = st.session_state.get(CHOSEN, ("", frozenset()))
    chosen = chosen if tweet_id == question.tweet_id else frozenset()
    for place, (label, key) in enumerate(keys_of(labels)):
        st.button(
            button_text(label), key=f"{question.tweet_id} {place}", shortcut=key,
            type="primary" if label in chosen else "secondary",
            on_click=st.session_state.__setitem__, args=(CHOSEN, (question.tweet_id, chosen ^ {label})),
        )  # fmt: skip
    joined = MULTI_LABEL_SEPARATOR.join(label for label in labels if label in chosen)
    st.button(
        "Save", key=f"{question.tweet_id} save", shortcut="Enter", disabled=not chosen,
        on_click=_answer, args=(console, annotator, question, joined),
    )  # fmt: skip


def _nothing_open(console: Console, annotator: str, progress: "Progress") -> None:
    if progress.picked:
        text.hint("Every picked tweet that you can label has its labels. Pick more to go on.")
    else:
        text.hint(
            "No tweet is picked yet. Pick some: a part at random, for figures of quality, the others to learn from."
        )
    with st.container(horizontal=True):
        wanted = st.button(f"Pick {PICKED_AT_ONCE} more", type="primary")
        st.button("Undo", shortcut=UNDO_KEY, on_click=_undo, args=(console, annotator))
    if wanted:
        with st.spinner("Picking tweets"):  # clusters them, which takes seconds
            _pick(console)
        st.rerun()


def _figures(progress: "Progress", rate: float | None) -> None:
    pairs = [
        ("My labels", f"{progress.mine:,}"),
        ("Labels a minute", None if rate is None else f"{rate:.0f}"),
        ("Skipped", f"{progress.skipped:,}"),
        ("Labelled twice", f"{progress.pairs:,}"),
        ("Agreement", None if progress.agreement is None else f"{progress.agreement:.0%}"),
        ("Cohen's kappa", None if progress.kappa is None else f"{progress.kappa:.2f}"),
    ]
    text.facts(pairs)
    text.note(
        "Agreement is over tweets that two people labelled. Kappa leaves out agreement by chance: 0 is chance, 1 is "
        "perfect, and below 0.6 the labels mean different things to different people."
    )


# --- what the keys do; Streamlit calls these before it draws the fragment again


def _is_past(question: "Question") -> bool:
    """Whether another tweet is shown already: a key that was pressed twice changes no answer."""
    return bool(st.session_state.get(SHOWN) != question.tweet_id)


def _answer(console: Console, annotator: str, question: "Question", label: str) -> None:
    from worker.labelling import review

    if _is_past(question):
        return
    with acting.telling():
        acting.require(console, "label")
        review.answer(console.database(), annotator, question.tweet_id, label)
        st.session_state.setdefault(TIMES, []).append(time.monotonic())
        st.session_state[LAST] = label
        st.session_state.pop(AGAIN, None)


def _skip(console: Console, annotator: str, question: "Question") -> None:
    from worker.labelling import review

    if _is_past(question):
        return
    with acting.telling():
        acting.require(console, "label")
        review.skip(console.database(), annotator, question.tweet_id)
        st.session_state[LAST] = "skipped"
        st.session_state.pop(AGAIN, None)


def _undo(console: Console, annotator: str) -> None:
    from worker.labelling import review

    with acting.telling():
        acting.require(console, "label")
        undone = review.undo(console.database(), annotator)
        if undone is None:
            raise BadRequest("there is nothing to undo; you have not answered a tweet yet")
        st.session_state[AGAIN] = undone
        st.session_state.pop(LAST, None)
        if st.session_state.get(TIMES):
            st.session_state[TIMES].pop()


def _pick(console: Console) -> None:
    from worker.labelling import review

    with acting.telling():
        acting.require(console, "label")
        picked = review.fill(console.database(), console.settings, PICKED_AT_ONCE)
        if not picked.total():
            raise BadRequest(
                "no tweet is left to pick: all that the champion scored are picked already; push more tweets"
            )
        parts = ", ".join(f"{count} {reason}" for reason, count in picked.items())
        acting.tell(f"Picked {picked.total()} tweets: {parts}.")
