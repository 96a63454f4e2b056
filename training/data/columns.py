"""Column names that tables of tweets and labelled texts use, and a check of their values."""

import re
from collections.abc import Iterable

TEXT_COLUMNS = ("text", "texts", "sentence", "tweet", "本文")
ID_COLUMNS = ("id", "tweet_id", "id_str")
LABEL_COLUMNS = ("label", "labels", "target", "sentiment", "ラベル")
# Separates the labels of a row that has several.
MULTI_LABEL_SEPARATOR = "|"
# Names of labels, in small letters, that tell their sentiment.
SENTIMENTS = {
    "positive": ("positive", "pos", "ポジティブ", "肯定"),
    "negative": ("negative", "neg", "ネガティブ", "否定"),
    "neutral": ("neutral", "neu", "ニュートラル", "中立"),
}
# The only label of a continuous task.
VALUE = "value"
INTEGER = re.compile(r"-?[0-9]+")


def find_column(columns: Iterable[str], names: Iterable[str]) -> str | None:
    """The column that has the first of `names`, in any case; None when no column has one."""
    by_name = {column.strip().lower(): column for column in columns}
    return next((by_name[name] for name in names if name in by_name), None)


def has_surrogates(text: str) -> bool:
    """Whether a text has half a surrogate pair: from bytes that could not be decoded, or from a JSON escape."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def sentiment_of(label: str) -> str | None:
    """Return positive, negative or neutral for a label with a usual name of it, in any case; else None."""
    return next((sentiment for sentiment, names in SENTIMENTS.items() if label.casefold() in names), None)
