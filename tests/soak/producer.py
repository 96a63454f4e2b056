"""A program that publishes tweets at a steady rate and repeats itself: `python -m tests.soak.producer`.

It appends what the server has accepted to a file of 64-bit integers: the id of a new tweet, and minus the id of one
that was sent again.
"""

import argparse
import csv
import heapq
import json
import logging
import random
import signal
import time
from array import array
from pathlib import Path
from typing import Any

import worker
from db.errors import TweetscoreError
from tests.support.paths import ROOT

SAMPLE = ROOT / "training" / "sample"
CALL_SECONDS = 0.1
RETRY_SECONDS = 0.2
# After an outage a producer catches up, in calls of at most this many tweets.
MOST_A_CALL = 500
# Ids of X: milliseconds since this time, then 10 bits of the machine and 12 bits that count up.
SNOWFLAKE_EPOCH_MS = 1_288_834_974_657
MACHINE_SHIFT, TIME_SHIFT = 12, 22

log = logging.getLogger(__name__)


class Snowflakes:
    """Ids as X makes them; those of one machine rise."""

    def __init__(self, machine: int) -> None:
        self._machine, self._ms, self._count = machine, 0, 0

    def next(self) -> int:
        ms = time.time_ns() // 1_000_000
        if ms > self._ms:
            self._ms, self._count = ms, 0
        elif self._count + 1 < 1 << MACHINE_SHIFT:
            self._count += 1
        else:
            self._ms, self._count = self._ms + 1, 0
        return (self._ms - SNOWFLAKE_EPOCH_MS) << TIME_SHIFT | self._machine << MACHINE_SHIFT | self._count


def made_at(id_: Any) -> Any:
    """When a snowflake was made, in seconds since 1970; of one id or of an array."""
    return ((id_ >> TIME_SHIFT) + SNOWFLAKE_EPOCH_MS) / 1000


def sample_tweets() -> list[dict[str, str]]:
    """`text` and `topic` of the sample's tweets."""
    with (SAMPLE / "labelled.csv").open(encoding="utf-8", newline="") as rows:
        found = [{"text": row["text"], "topic": row["topic"]} for row in csv.DictReader(rows)]
    with (SAMPLE / "unlabelled.jsonl").open(encoding="utf-8") as lines:
        parsed = [json.loads(line) for line in lines]
    return found + [{"text": tweet["text"], "topic": tweet["topic"]} for tweet in parsed]


class Producer:
    """`repeated` is the share of tweets that are sent again, half of them up to `longest_delay` seconds later."""

    def __init__(self, number: int, repeated: float, longest_delay: float, accepted: Path) -> None:
        self._ids, self._chance = Snowflakes(number), random.Random(number)
        self._repeated, self._longest_delay = repeated, longest_delay
        self._later: list[tuple[float, int, dict[str, str]]] = []
        self._samples = sample_tweets()
        self._accepted = accepted

    def call(self, count: int) -> None:
        """Publish `count` new tweets and those that are due again. Repeats the call until the server accepts it."""
        now, again = time.monotonic(), []
        new = [self._tweet() for _ in range(count)]
        for tweet in new:
            if (drawn := self._chance.random()) < self._repeated / 2:
                again.append(tweet)
            elif drawn < self._repeated:
                due = now + self._chance.uniform(1, self._longest_delay)
                heapq.heappush(self._later, (due, int(tweet["id"]), tweet))
        while self._later and self._later[0][0] <= now:
            again.append(heapq.heappop(self._later)[2])
        while True:
            try:
                worker.publish([*new, *again])
                break
            except TweetscoreError as error:
                log.warning("a call failed, trying again: %s", error)
                time.sleep(RETRY_SECONDS)
        ids = array("q", [*(int(tweet["id"]) for tweet in new), *(-int(tweet["id"]) for tweet in again)])
        with self._accepted.open("ab") as file:
            file.write(ids.tobytes())

    def _tweet(self) -> dict[str, str]:
        return {"id": str(self._ids.next()), "lang": "ja", **self._chance.choice(self._samples)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--number", type=int, required=True, help="of this producer, which makes its ids its own")
    parser.add_argument("--rate", type=float, required=True, help="new tweets a second")
    parser.add_argument("--repeated", type=float, required=True)
    parser.add_argument("--longest-delay", type=float, required=True)
    parser.add_argument("--accepted", type=Path, required=True)
    given = parser.parse_args()
    ending: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: ending.append(number))
    producer = Producer(given.number, given.repeated, given.longest_delay, given.accepted)
    began, sent = time.monotonic(), 0
    while not ending:
        owed = int(given.rate * (time.monotonic() - began)) - sent
        count = min(owed, MOST_A_CALL)
        producer.call(count)
        sent += count
        if owed < MOST_A_CALL:
            time.sleep(max(0.0, CALL_SECONDS - (time.monotonic() - began) % CALL_SECONDS))


if __name__ == "__main__":
    main()
