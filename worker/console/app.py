"""The console's script, which Streamlit runs for every change on a page: `tweetscore console` starts it."""

from urllib.parse import quote

import streamlit as st

from db.errors import TweetscoreError
from worker.console import queries, signin, text
from worker.console.context import Console
from worker.console.pages import ask, health, jobs, models, overview, review, tweets

# No icons: Streamlit would make the browser fetch them from a server of Google's.
PAGES = (
    ("overview", "Overview", overview.render),
    ("tweets", "Tweets", tweets.render),
    ("review", "Review", review.render),
    ("models", "Models", models.render),
    ("jobs", "Jobs", jobs.render),
    ("ask", "Ask", ask.render),
    ("health", "Health", health.render),
)
ICON = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32"><rect width="32" height="32" rx="7" fill="#0072b2"/>'
    '<path d="M7 25v-7h5v7zm7 0V8h5v17zm7 0V13h5v12z" fill="#fff"/></svg>'
)


def main() -> None:
    st.set_page_config(page_title="tweetscore", page_icon=f"data:image/svg+xml,{quote(ICON)}", layout="wide")
    st.html(f"<style>{STYLE}</style>")
    try:
        console = signin.enter()
        pages = [
            st.Page(_guarded(console, render), title=title, url_path=path, default=path == "overview")
            for path, title, render in PAGES
        ]
        chosen = st.navigation(pages)
        with st.sidebar:
            _sidebar(console)
    except TweetscoreError as error:  # such as a setting that is not allowed
        text.problem(error)
        return
    chosen.run()


STYLE = """
.stMainBlockContainer { padding: 2.5rem 2rem 3rem; max-width: 90rem; }
h1 { line-break: strict; overflow-wrap: anywhere; }
@media (max-width: 640px) { .stMainBlockContainer { padding: 3rem 1rem 2rem; } }
"""


def _guarded(console: Console, render: queries.Render) -> queries.Script:
    """The page as Streamlit calls it. An error that names a remedy is shown as text; others are logged."""

    def script() -> None:
        try:
            render(console)
        except TweetscoreError as error:
            text.problem(error)

    return script


def _sidebar(console: Console) -> None:
    try:
        champion = queries.champion(console)
    except TweetscoreError as error:
        text.problem(error)
        return
    if champion is None:
        text.note("No champion yet")
    else:
        text.facts([("Champion", f"Model {champion.version_id}")])
        text.note(f"{champion.base_model}, since {champion.since:%Y-%m-%d %H:%M} Japan time")
    signin.leave(console)


main()
