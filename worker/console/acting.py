"""What pages do for a visitor: check that they may, act, and show how it went when the page is drawn again."""

from collections.abc import Iterator
from contextlib import contextmanager

import streamlit as st

from db.errors import TweetscoreError
from worker.console import text
from worker.console.context import Console, forget
from worker.errors import BadRequest
from worker.settings import Access

TOLD = "told"


def require(console: Console, access: Access) -> None:
    """Raise `BadRequest` unless the visitor may do this. Every function that writes calls it, since a hidden button
    keeps nobody out."""
    if not console.may(access):
        raise BadRequest(
            f"your access is {console.access!r}, and this needs {access!r}; the operator of the console can change it"
        )


def tell(sentence: str, done: bool = True) -> None:
    """Show a sentence where `show_told` is called next."""
    st.session_state.setdefault(TOLD, []).append((sentence, done))


def show_told() -> None:
    for sentence, done in st.session_state.pop(TOLD, []):
        (text.hint if done else text.problem)(sentence)


@contextmanager
def telling() -> Iterator[None]:
    """Turn an error that names a remedy into a sentence on the page, the same as on the command line."""
    try:
        yield
        forget()
    except TweetscoreError as error:
        tell(str(error), done=False)


@contextmanager
def showing() -> Iterator[None]:
    """As `telling`, where the page is drawn: a fragment is drawn again without its page, which would show the error."""
    try:
        yield
    except TweetscoreError as error:
        text.problem(error)
