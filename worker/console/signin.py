"""Who the visitor is and what they may do."""

import getpass

import streamlit as st

from worker.console import text
from worker.console.context import Console
from worker.settings import Access, Settings, load_settings


def enter() -> Console:
    """The visitor's console. Stops the script, after showing what to do, for a visitor who may not enter."""
    settings = load_settings()
    if settings.console_oidc_metadata_url is None:
        return Console(settings, settings.console_access, getpass.getuser())
    if not st.user.is_logged_in:
        st.title("tweetscore")
        st.write("Sign in to see the tweets.")
        st.button("Sign in", type="primary", on_click=st.login)
        st.stop()
    return _admitted(settings, dict(st.user.to_dict()))


def leave(console: Console) -> None:
    """Show who is signed in, and a button to sign out."""
    if console.settings.console_oidc_metadata_url is not None:
        text.note(console.visitor)
        st.button("Sign out", on_click=st.logout)


def _admitted(settings: Settings, user: dict[str, object]) -> Console:
    """The console of a visitor whom the provider signed in; refuses those who are not in the list of users."""
    name, access = admit(settings, user)
    if access is None:
        st.title("tweetscore")
        text.problem(
            f"{name or 'This account'} may not enter; ask the operator to add a verified e-mail address to "
            "TWEETSCORE_CONSOLE_USERS, or sign in with another account"
        )
        st.button("Sign out", on_click=st.logout)
        st.stop()
    return Console(settings, access, name)


def admit(settings: Settings, user: dict[str, object]) -> tuple[str, Access | None]:
    """The visitor's name, and what the visitor may do: None for one who is not in the list of users."""
    mail = str(user.get("email") or "").lower()
    name = mail or str(user.get("sub") or "")
    if not settings.console_users:
        return name, settings.console_access
    # A provider may let people enter the address of somebody else, and reports it as not verified.
    verified = user.get("email_verified", True) in (True, "true")
    return name, settings.console_users.get(mail) if verified else None
