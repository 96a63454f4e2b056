"""The keys of the page Review, the labels on its buttons, and the rate of labelling."""

import re
from collections.abc import Sequence
from itertools import pairwise

SKIP_KEY, UNDO_KEY = "S", "U"
# Labels beyond the ninth have a button without a key.
NUMBER_KEYS = "123456789"
# Pauses longer than this are not counted as labelling.
PAUSE_SECONDS = 60.0
# The rate is that of the newest labels.
RATE_LABELS = 30
# Streamlit reads the label of a button as markdown. A backslash takes the meaning from each of these characters.
MARKDOWN = re.compile(r"([!-/:-@\[-`{-~])")
# Codes of emoji and icons are found after markdown: an invisible character between the colon and the name prevents it.
WORD_JOINER = "\u2060"


def keys_of(labels: Sequence[str]) -> list[tuple[str, str | None]]:
    """Each label with its key: 1, 2, 3 and so on."""
    return [(label, NUMBER_KEYS[i] if i < len(NUMBER_KEYS) else None) for i, label in enumerate(labels)]


def button_text(label: str) -> str:
    """The text of a button that shows a label as it is, whatever it contains."""
    line = " ".join(label.split()) or "(empty)"
    return MARKDOWN.sub(r"\\\1", line).replace(r"\:", rf"\:{WORD_JOINER}")


def labels_a_minute(times: Sequence[float]) -> float | None:
    """The rate of the newest labels from the times at which they were given, in rising seconds; None below two labels.

    Long pauses are left out.
    """
    newest = times[-RATE_LABELS:]
    gaps = [later - earlier for earlier, later in pairwise(newest)]
    worked = [gap for gap in gaps if gap <= PAUSE_SECONDS]
    return 60 * len(worked) / max(sum(worked), 0.001) if worked else None
