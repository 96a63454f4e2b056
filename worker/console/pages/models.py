"""The page Models."""

import streamlit as st

from worker.console.context import Console


def render(console: Console) -> None:
    st.title("Models")
