"""From what the X API gives, v2 and v1.1, to flat tweets. Pure: dictionaries in and out.

Fields: https://docs.x.com/x-api/fundamentals/data-dictionary, and v1.1's Tweet object; others are passed over.
"""

from collections.abc import Iterator
from typing import Any

from worker.errors import BadRecord

# What a tweet's row keeps of the tweets it refers to: our name, v2's type.
REFERENCES = {"retweeted_id": "retweeted", "quoted_id": "quoted", "replied_to_id": "replied_to"}
V1_SIGNS = ("id_str", "full_text", "extended_tweet", "retweeted_status")
V2_SIGNS = ("note_tweet", "referenced_tweets")


def flat_tweets(value: Any) -> Iterator[Any]:
    """Every tweet of an API's answer or of a line of it, flat: `id`, `text` and the optional keys of the wire format.

    What is flat already, or nothing known, comes back as it is. A retweet keeps its own id, and takes the whole text of
    what it retweets: its own ends after 140 characters. Raises `BadRecord` for an answer that only says what failed.
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
        raise BadRecord("the API's answer holds errors and no tweets")
    elif any(sign in value for sign in V2_SIGNS):
        yield _v2(value, {}, None)
    elif any(sign in value for sign in V1_SIGNS):
        yield _v1(value)
    else:
        yield value


def _page(page: dict[str, Any]) -> Iterator[Any]:
    data, includes = page["data"], page.get("includes")
    others = includes.get("tweets") if isinstance(includes, dict) else None
    known = {one["id"]: one for one in others or () if isinstance(one, dict) and isinstance(one.get("id"), str)}
    rules = page.get("matching_rules")  # of a filtered stream: the tag is what its owner called the search
    tags = [rule.get("tag") for rule in rules if isinstance(rule, dict)] if isinstance(rules, list) else []
    topic = next((tag for tag in tags if tag), None)
    for tweet in data if isinstance(data, list) else [data]:
        yield _v2(tweet, known, topic) if isinstance(tweet, dict) else tweet


def _v2(tweet: dict[str, Any], known: dict[str, dict[str, Any]], topic: str | None) -> dict[str, Any]:
    given = tweet.get("referenced_tweets")
    refers = (
        {one.get("type"): one.get("id") for one in given if isinstance(one, dict)} if isinstance(given, list) else {}
    )
    original = known.get(str(refers.get("retweeted")), {})
    flat = {**tweet, "text": _note(tweet) or _note(original) or original.get("text") or tweet.get("text")}
    flat |= {name: refers[kind] for name, kind in REFERENCES.items() if kind in refers}
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
        "id": tweet.get("id_str") or tweet.get("id"),  # the number has been rounded by some
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
