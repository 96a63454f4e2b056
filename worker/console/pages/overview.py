"""The page Overview."""

import streamlit as st

from worker.console.context import Console


def render(console: Console) -> None:
    st.title("Overview")
