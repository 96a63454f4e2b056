"""Who the visitor is and what they may do."""

import getpass

from worker.console.context import Console
from worker.settings import load_settings


def enter() -> Console:
    settings = load_settings()
    return Console(settings, settings.console_access, getpass.getuser())
