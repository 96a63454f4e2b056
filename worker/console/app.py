"""The console's script, which Streamlit runs for every change on a page: `tweetscore console` starts it."""

import streamlit as st

from worker.console import signin
from worker.console.pages import ask, health, jobs, models, overview, review, tweets

PAGES = (
    ("overview", "Overview", ":material/monitoring:", overview.render),
    ("tweets", "Tweets", ":material/chat:", tweets.render),
    ("review", "Review", ":material/rate_review:", review.render),
    ("models", "Models", ":material/leaderboard:", models.render),
    ("jobs", "Jobs", ":material/model_training:", jobs.render),
    ("ask", "Ask", ":material/database_search:", ask.render),
    ("health", "Health", ":material/health_and_safety:", health.render),
)


def main() -> None:
    st.set_page_config(page_title="tweetscore", layout="wide")
    console = signin.enter()
    pages = [
        st.Page(lambda render=render: render(console), title=title, icon=icon, url_path=path, default=path == "overview")
        for path, title, icon, render in PAGES
    ]
    st.navigation(pages).run()


main()
