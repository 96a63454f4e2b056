"""Text cleaning of tweets, identical for training and scoring. Pure functions with light imports.

Each model stores the version of its cleaner, so scoring cleans as in training even after a newer cleaner is added.

No cleaner applies NFKC, because it breaks kaomoji: it turns the accents of (´▽｀) into a space and a combining mark,
and the circles of (ﾟДﾟ) into marks on their neighbours. The tokenizers of the Tohoku BERTs apply NFKC themselves, as
they did in pretraining.
"""

import html
import re
from collections.abc import Callable

# ASCII only: Japanese text often follows a link without a space.
URL = re.compile(r"https?://[!-~]+")
MENTION = re.compile(r"(?<![A-Za-z0-9_])[@＠][A-Za-z0-9_]{1,15}")
RETWEET = re.compile(r"^\s*(?:RT\s+[@＠][A-Za-z0-9_]{1,15}:?\s*)+")
# Only the mark is removed: the word is part of the text. `#1` and `C#` are not hashtags.
HASHTAG = re.compile(r"(?<!\w)[#＃](?=[^\W\d])")
# Modifiers of emoji: variation selectors, joiners, skin tones, and the tags of flags.
EMOJI_VARIATION = re.compile("[\ufe0e\ufe0f\u200d\U0001f3fb-\U0001f3ff\U000e0020-\U000e007f]")
# Runs of more than three equal characters, digits excepted: ｗｗｗｗｗ, ーーーー, !!!!!!, 😭😭😭😭.
REPEATED = re.compile(r"([^\d\s])\1{3,}")
# Most texts have no run of any character, and this is found out in a seventh of the time.
RUN = re.compile(r"(.)\1\1\1")


def _clean_v1(text: str) -> str:
    """Resolve HTML entities, drop links and mentions (they carry no sentiment), collapse white space."""
    plain = html.unescape(text)
    kept = URL.sub(" ", plain)
    if "@" in kept or "＠" in kept:  # several times as fast as the pattern, which tries every position
        kept = MENTION.sub(" ", kept)
    kept = " ".join(kept.split())
    # A tweet that is only a link must still be scored, so keep it.
    return kept or " ".join(plain.split())


def _clean_v2(text: str) -> str:
    """Version 1, then: remove the mark of hashtags, unify variants of emoji, limit repeated characters to three."""
    kept = _clean_v1(text)
    if "#" in kept or "＃" in kept:
        kept = HASHTAG.sub("", kept)
    kept = EMOJI_VARIATION.sub("", kept)
    if RUN.search(kept):
        kept = REPEATED.sub(r"\1\1\1", kept)
    return kept or text


def _clean_neologdn(text: str) -> str:
    """Version 2, then neologdn: normalise letter and kana widths, dashes, and spaces next to Japanese."""
    import neologdn

    return neologdn.normalize(_clean_v2(text)) or text


CLEANERS: dict[str, Callable[[str], str]] = {"1": _clean_v1, "2": _clean_v2, "neologdn": _clean_neologdn}
NEWEST_CLEANER = "2"


def clean(text: str, version: str = NEWEST_CLEANER) -> str:
    """Clean a tweet with a cleaner version, a key of `CLEANERS`."""
    return CLEANERS[version](text)


def same_text_key(text: str) -> str:
    """Return a key for duplicates: equal for a tweet, its retweets, and copies with other links, mentions or spaces."""
    return clean(RETWEET.sub("", text), "1").casefold()
