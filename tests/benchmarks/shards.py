"""What shards gain: `python -m tests.benchmarks.shards [--seconds S] [--rounds N] [--json FILE]`.

Two producers push tweets as fast as they can, and two consumers read, acknowledge and trim them and do nothing else,
each in a process of its own: the stream without scoring. The layouts are measured in turns; a figure is the median of
the rounds. Besides the tweets a second there is the CPU time per tweet that the busiest server reports. A server uses
one core for its keys, so that time tells what the layout can reach with enough cores for producers and consumers.
"""

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from multiprocessing.synchronize import Event
from pathlib import Path
from statistics import median
from typing import Any

import redis

from worker.stream.sharded_stream import ShardedStream
from worker.stream.tweet_record import Tweet

PRODUCERS = CONSUMERS = 2
# As publishers and scoring workers have them; their modules take long to load, and every process loads this one.
FLUSH_TWEETS, WINDOW_TWEETS = 1_000, 512
HIGH_WATER = 50_000
POOL_TWEETS = 20_000
# name -> (servers, shards)
LAYOUTS = {
    "one key": (1, 1),
    "2 shards on one server": (1, 2),
    "4 shards on one server": (1, 4),
    "2 shards on two servers": (2, 2),
}
SPAWN = multiprocessing.get_context("spawn")


@dataclass(frozen=True)
class Figures:
    """`server_us` is the CPU time of the busiest server per tweet of the whole layout, in microseconds."""

    tweets_per_second: float
    server_us: float

    @property
    def server_limit(self) -> float:
        """Tweets a second at which the busiest server would use a whole core."""
        return 1e6 / self.server_us


def produce(urls: Sequence[str], shards: int, number: int, ready: Any, go: Event, stop: Event) -> None:
    stream = ShardedStream(urls, "tweets", "scorers", shards)
    first = 1_700_000_000_000_000_000 + number * POOL_TWEETS
    tweets = [Tweet(id=str(first + i), text=f"今日は雨が降る{i}", lang="ja").payload() for i in range(POOL_TWEETS)]
    ready.put(number)
    go.wait()
    while not stop.is_set():
        for start in range(0, POOL_TWEETS, FLUSH_TWEETS):
            if stop.is_set():
                return
            stream.wait_for_room(HIGH_WATER, lambda length: None)
            stream.publish(tweets[start : start + FLUSH_TWEETS])


def consume(urls: Sequence[str], shards: int, ready: Any, go: Event, stop: Event, acked: Any) -> None:
    stream = ShardedStream(urls, "tweets", "scorers", shards)
    stream.ensure_group()
    ready.put(None)
    go.wait()
    while not stop.is_set():
        if ids := [record.id for record in stream.read(WINDOW_TWEETS, 100)]:
            stream.ack(ids)
            stream.trim()
            with acked.get_lock():
                acked.value += len(ids)


def cpu_seconds(url: str) -> float:
    with redis.Redis.from_url(url) as client:
        found = client.info("cpu")
    return float(found["used_cpu_user"]) + float(found["used_cpu_sys"])


def measured(urls: Sequence[str], shards: int, seconds: float) -> Figures:
    for url in urls:
        with redis.Redis.from_url(url) as client:
            client.flushall()
    ready, go, stop, acked = SPAWN.Queue(), SPAWN.Event(), SPAWN.Event(), SPAWN.Value("q", 0)
    given = [(produce, (urls, shards, number, ready, go, stop)) for number in range(PRODUCERS)]
    given += [(consume, (urls, shards, ready, go, stop, acked)) for _ in range(CONSUMERS)]  # type: ignore[list-item]
    processes = [SPAWN.Process(target=target, args=arguments, daemon=True) for target, arguments in given]
    for process in processes:
        process.start()
    for _ in processes:
        ready.get()
    go.set()
    time.sleep(seconds / 4)  # until the load is steady
    before, count, began = [cpu_seconds(url) for url in urls], acked.value, time.monotonic()
    time.sleep(seconds)
    used = max(cpu_seconds(url) - earlier for url, earlier in zip(urls, before, strict=True))
    done, took = acked.value - count, time.monotonic() - began
    stop.set()
    for process in processes:
        process.join()
    return Figures(done / took, 1e6 * used / done)


def main(arguments: Sequence[str]) -> int:
    from tests.support.stream_servers import stream_servers  # loads what the processes do not need

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=4.0, help="length of a measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    found: dict[str, list[Figures]] = {name: [] for name in LAYOUTS}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        servers = stack.enter_context(stream_servers(Path(folder) / "servers", 2, "--appendfsync", "everysec"))
        for _ in range(given.rounds):
            for name, (count, shards) in LAYOUTS.items():
                found[name].append(measured([server.url for server in servers[:count]], shards, given.seconds))
    first = median(one.tweets_per_second for one in found["one key"])
    result = {}
    for name, rounds in found.items():
        speeds = [one.tweets_per_second for one in rounds]
        limit = median(one.server_limit for one in rounds)
        result[name] = {
            "tweets_per_second": round(median(speeds)), "least": round(min(speeds)), "most": round(max(speeds)),
            "over_one_key": round(median(speeds) / first, 2), "server_limit_tweets_per_second": round(limit),
            "rounds": [asdict(one) for one in rounds],
        }  # fmt: skip
        print(
            f"{name:26}{median(speeds):9,.0f} tweets/s ({min(speeds):,.0f} to {max(speeds):,.0f}), "
            f"{median(speeds) / first:.2f} times one key; the busiest server alone could do {limit:,.0f}"
        )
    if given.json:
        given.json.write_text(json.dumps({"cores": os.cpu_count(), "layouts": result}, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
