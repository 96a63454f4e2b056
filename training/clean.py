"""Cleaning a tweet, the same for training and for scoring. Pure, and light to import.

A cleaner has a version that is stored with every model: scoring cleans as the model was trained, whatever comes later.

None of ours applies NFKC, which takes kaomoji apart: it makes the accents of (´▽｀) a space and a mark that combines
with it, and the small circles of (ﾟДﾟ) marks on their neighbours. Tokenizers of the Tohoku BERTs do so afterwards, as
they did when those were pretrained; what a cleaner keeps whole they see in the pieces they know.
"""

import html
import re
from collections.abc import Callable

# ASCII alone: Japanese often follows a link without a space.
URL = re.compile(r"https?://[!-~]+")
MENTION = re.compile(r"(?<![A-Za-z0-9_])[@＠][A-Za-z0-9_]{1,15}")
RETWEET = re.compile(r"^\s*(?:RT\s+[@＠][A-Za-z0-9_]{1,15}:?\s*)+")
# The word of a hashtag is part of what is said; `#1` and `C#` are no hashtags.
HASHTAG = re.compile(r"(?<!\w)[#＃](?=[^\W\d])")
# What only varies an emoji: presentation, joiners, skin tones, and the tags of flags.
EMOJI_VARIATION = re.compile("[\ufe0e\ufe0f\u200d\U0001f3fb-\U0001f3ff\U000e0020-\U000e007f]")
# More than three of anything that is no digit say no more than three: ｗｗｗｗｗ, ーーーー, !!!!!!, 😭😭😭😭.
REPEATED = re.compile(r"([^\d\s])\1{3,}")


def _clean_v1(text: str) -> str:
    """HTML entities resolved; links and mentions, which name things but feel nothing, dropped; white space folded."""
    plain = html.unescape(text)
    kept = " ".join(MENTION.sub(" ", URL.sub(" ", plain)).split())
    # A tweet that is nothing but a link still has to be scored: leave it as it stands.
    return kept or " ".join(plain.split())


def _clean_v2(text: str) -> str:
    """As version 1; besides, a hashtag keeps its word alone, an emoji has one form, and a character comes three times
    in a row at most."""
    kept = EMOJI_VARIATION.sub("", HASHTAG.sub("", _clean_v1(text)))
    return REPEATED.sub(r"\1\1\1", kept) or text


def _clean_neologdn(text: str) -> str:
    """As version 2, then normalised by neologdn: widths of letters and kana, dashes, spaces beside Japanese."""
    import neologdn

    return neologdn.normalize(_clean_v2(text)) or text


CLEANERS: dict[str, Callable[[str], str]] = {"1": _clean_v1, "2": _clean_v2, "neologdn": _clean_neologdn}
NEWEST_CLEANER = "2"


def clean(text: str, version: str = NEWEST_CLEANER) -> str:
    return CLEANERS[version](text)


def same_text_key(text: str) -> str:
    """Equal for a tweet, its retweets, and copies that differ in links, mentions or white space."""
    return clean(RETWEET.sub("", text), "1").casefold()
