"""The page Jobs."""

import streamlit as st

from worker.console.context import Console


def render(console: Console) -> None:
    st.title("Jobs")
