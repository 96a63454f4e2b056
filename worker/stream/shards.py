"""Which shard a tweet belongs to. The rule is part of the wire format: producers in other languages follow it too."""

from zlib import crc32

# The most shards. Workers look for the keys of all of them, so that none is forgotten when the number is changed.
MAX_SHARDS = 64


def shard_of(tweet_id: str, shards: int) -> int:
    """The shard of a tweet, 0 to `shards - 1`: CRC-32 (as in zlib and gzip) of the id's UTF-8 bytes, modulo `shards`.

    An id that is a JSON number counts as its decimal digits.
    """
    return crc32(tweet_id.encode()) % shards


def shard_key(key: str, shard: int) -> str:
    return f"{key}:{shard}"
