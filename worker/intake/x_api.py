"""Flatten responses of the X API, v2 and v1.1, to tweets. Pure functions on dictionaries.

Fields: https://docs.x.com/x-api/fundamentals/data-dictionary, and v1.1's Tweet object; others are ignored.
"""

from collections.abc import Iterator
from typing import Any

from worker.errors import BadRecord

# References to other tweets: the key in the wire format, and the type in v2.
REFERENCES = {"retweeted_id": "retweeted", "quoted_id": "quoted", "replied_to_id": "replied_to"}
V1_KEYS = ("id_str", "full_text", "extended_tweet", "retweeted_status")
V2_KEYS = ("note_tweet", "referenced_tweets")


def flat_tweets(value: Any) -> Iterator[Any]:
    """Yield every tweet of an API response, or of a line of one, with `id`, `text` and the optional keys of the wire
    format.

    Flat and unknown values are yielded unchanged. A retweet keeps its own id but takes the full text of the original
    tweet, because its own text ends after 140 characters. Raises `BadRecord` for a response that has only errors.
    """
    if isinstance(value, list):
        for one in value:
            yield from flat_tweets(one)
    elif not isinstance(value, dict):
        yield value
    elif isinstance(value.get("statuses"), list):
        yield from flat_tweets(value["statuses"])
    elif isinstance(value.get("data"), list | dict):
        yield from _page(value)
    elif "meta" in value and "id" not in value:
        return  # a page without results
    elif isinstance(value.get("errors"), list) and "id" not in value:
        raise BadRecord("the API response contains errors and no tweets; see its field `errors`")
    elif any(key in value for key in V2_KEYS):
        yield _v2(value, {}, None)
    elif any(key in value for key in V1_KEYS):
        yield _v1(value)
    else:
        yield value


def _page(page: dict[str, Any]) -> Iterator[Any]:
    data, includes = page["data"], page.get("includes")
    others = includes.get("tweets") if isinstance(includes, dict) else None
    known = {one["id"]: one for one in others or () if isinstance(one, dict) and isinstance(one.get("id"), str)}
    rules = page.get("matching_rules")  # of a filtered stream: its owner names a search by a tag
    tags = [rule.get("tag") for rule in rules if isinstance(rule, dict)] if isinstance(rules, list) else []
    topic = next((tag for tag in tags if tag), None)
    for tweet in data if isinstance(data, list) else [data]:
        yield _v2(tweet, known, topic) if isinstance(tweet, dict) else tweet


def _v2(tweet: dict[str, Any], known: dict[str, dict[str, Any]], topic: str | None) -> dict[str, Any]:
    references = tweet.get("referenced_tweets")
    ids = {}
    if isinstance(references, list):
        ids = {one.get("type"): one.get("id") for one in references if isinstance(one, dict)}
    original = known.get(str(ids.get("retweeted")), {})
    flat = {**tweet, "text": _note(tweet) or _note(original) or original.get("text") or tweet.get("text")}
    flat |= {name: ids[kind] for name, kind in REFERENCES.items() if kind in ids}
    if topic is not None:
        flat.setdefault("topic", topic)
    return flat


def _note(tweet: dict[str, Any]) -> Any:
    note = tweet.get("note_tweet")
    return note.get("text") if isinstance(note, dict) else None


def _v1(tweet: dict[str, Any]) -> dict[str, Any]:
    original, user = tweet.get("retweeted_status"), tweet.get("user")
    original = original if isinstance(original, dict) else {}
    flat = {
        **tweet,
        "id": tweet.get("id_str") or tweet.get("id"),  # JSON parsers that use floats round the number
        "text": (_v1_text(original) if original else None) or _v1_text(tweet),
        "retweeted_id": original.get("id_str"),
        "quoted_id": tweet.get("quoted_status_id_str"),
        "replied_to_id": tweet.get("in_reply_to_status_id_str"),
    }
    if isinstance(user, dict):
        flat["author_id"] = user.get("id_str") or user.get("id")
    return flat


def _v1_text(tweet: dict[str, Any]) -> Any:
    extended = tweet.get("extended_tweet")
    whole = extended.get("full_text") if isinstance(extended, dict) else None
    return tweet.get("full_text") or whole or tweet.get("text")
