"""Cleaning a tweet, the same for training and for scoring. Pure, and light to import.

A cleaner has a version that is stored with every model: scoring cleans as the model was trained, whatever comes later.
"""

import html
import re
from collections.abc import Callable

# ASCII alone: Japanese often follows a link without a space.
URL = re.compile(r"https?://[!-~]+")
MENTION = re.compile(r"(?<![A-Za-z0-9_])[@＠][A-Za-z0-9_]{1,15}")
RETWEET = re.compile(r"^\s*(?:RT\s+[@＠][A-Za-z0-9_]{1,15}:?\s*)+")


def _clean_v1(text: str) -> str:
    """HTML entities resolved; links and mentions, which name things but feel nothing, dropped; white space folded."""
    plain = html.unescape(text)
    kept = " ".join(MENTION.sub(" ", URL.sub(" ", plain)).split())
    # A tweet that is nothing but a link still has to be scored: leave it as it stands.
    return kept or " ".join(plain.split())


CLEANERS: dict[str, Callable[[str], str]] = {"1": _clean_v1}
NEWEST_CLEANER = "1"


def clean(text: str, version: str = NEWEST_CLEANER) -> str:
    return CLEANERS[version](text)


def same_text_key(text: str) -> str:
    """Equal for a tweet, its retweets, and copies that differ in links, mentions or white space."""
    return clean(RETWEET.sub("", text)).casefold()
