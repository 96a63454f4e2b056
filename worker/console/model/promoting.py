"""Promote a model and roll an alias back. Both are asked a second time in a dialog that names the models."""

from typing import TYPE_CHECKING

import streamlit as st

from db import registry
from worker.console import acting, text
from worker.console.context import Console

if TYPE_CHECKING:
    from worker.quality.promotion import PromotionCheck

EFFECT = {
    "champion": "The champion scores the stream, and the charts show its predictions. Workers use the previous one "
    "until they have loaded it.",
    "challenger": "The challenger is compared with the champion. It changes no chart.",
}


def promote(console: Console, version_id: int, alias: str, force: bool) -> None:
    """Point the alias at the model, as `tweetscore models promote`; the page shows how it went."""
    from worker.quality import promotion  # loads SciPy

    with acting.telling():
        acting.require(console, "operate")
        promotion.promote(console.database(), version_id, alias, force)
        acting.tell(f"Model {version_id} is the {alias} now.")


def roll_back(console: Console, alias: str) -> None:
    """As `tweetscore models rollback`."""
    with acting.telling():
        acting.require(console, "operate")
        with console.database().begin() as session:
            before, after = registry.rollback(session, alias)
        acting.tell(f"Model {after} is the {alias} again, in place of model {before}.")


def previous(console: Console, alias: str) -> tuple[int | None, int | None]:
    """The model of the alias now, and the one that a rollback returns to."""
    with console.database().read() as session:
        return registry.assigned(session, alias), registry.previous(session, alias)


def examine(console: Console, version_id: int) -> "PromotionCheck":
    from worker.quality import promotion

    with console.database().read() as session:
        return promotion.examine(session, version_id)


@st.dialog("Promote this model?")
def ask_to_promote(console: Console, version_id: int, alias: str) -> None:
    with acting.showing():
        now = previous(console, alias)[0]
        in_place = f"model {now} is the {alias} now" if now is not None else f"no model is the {alias} now"
        text.show(f"Model {version_id} becomes the {alias}; {in_place}. {EFFECT[alias]}")
        force = False
        if alias == registry.CHAMPION:
            with st.spinner("Comparing it with the champion"):
                check = examine(console, version_id)
            for reason in check.reasons:
                text.warning(f"Against it: {reason}.")
            for warning in check.warnings:
                text.note(f"Note: {warning}.")
            force = bool(check.reasons) and st.checkbox("Promote it all the same")
            if check.reasons and not force:
                st.button(f"Make model {version_id} the {alias}", type="primary", disabled=True)
                return
        if st.button(f"Make model {version_id} the {alias}", type="primary"):
            promote(console, version_id, alias, force)
            st.rerun()


@st.dialog("Roll back?")
def ask_to_roll_back(console: Console, alias: str) -> None:
    with acting.showing():
        now, before = previous(console, alias)
        if now is None or before is None:
            text.hint(f"No other model was the {alias} before.")
            return
        text.show(f"Model {before} becomes the {alias} again, in place of model {now}. {EFFECT[alias]}")
        if st.button(f"Roll back to model {before}", type="primary"):
            roll_back(console, alias)
            st.rerun()
