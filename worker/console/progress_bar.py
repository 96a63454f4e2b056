"""A bar for how far something is, with a sentence above it. Streamlit's own reads the sentence as markdown."""

from html import escape

import streamlit as st

from worker.console import text

HEIGHT = "height:.45rem;border-radius:.3rem"


def draw(share: float, said: str) -> None:
    """`share` is 0 to 1."""
    percent = 100 * min(max(share, 0.0), 1.0)
    track = f"{HEIGHT};background:color-mix(in srgb,currentColor 15%,transparent)"
    st.html(
        f'<div style="{text.SOFT}">{escape(said)}</div><div style="{track}" role="progressbar" '
        f'aria-valuenow="{percent:.0f}"><div style="width:{percent:.1f}%;{HEIGHT};background:{text.BLUE}"></div></div>'
    )
