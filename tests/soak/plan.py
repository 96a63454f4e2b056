"""What happens when in a soak, by its length."""

from dataclasses import dataclass

# Two scoring workers are killed in turn. The third is never killed, so that its memory shows a leak.
KILLED_SCORERS, SCORERS = 2, 3
PRODUCERS = 2
# The share of ids that are sent again: half of them in the same call, half of them later.
REPEATED = 0.05
FULL_MINUTES = 30.0


@dataclass(frozen=True)
class Event:
    """`kind` is `kill`, `server` or `promotion`; `at_seconds` counts from the first tweet."""

    at_seconds: float
    kind: str


@dataclass(frozen=True)
class Plan:
    """A soak of half an hour or more has the intervals of a real one, a shorter one has as many events in less time."""

    minutes: float

    @property
    def seconds(self) -> float:
        return 60 * self.minutes

    @property
    def full(self) -> bool:
        return self.minutes >= FULL_MINUTES

    @property
    def kill_every(self) -> float:
        return 60 if self.full else 30

    @property
    def promote_every(self) -> float:
        return 600 if self.full else self.seconds / 3

    @property
    def retention_seconds(self) -> float:
        return 600 if self.full else 90

    @property
    def min_idle_seconds(self) -> float:
        """How long records of a killed worker wait; much less than the retention, so that each row can be seen."""
        return 60 if self.full else 5

    @property
    def check_every(self) -> float:
        return 60 if self.full else 10

    @property
    def warm_up_seconds(self) -> float:
        """The part of a process's life that does not count for the slope of its memory."""
        return 600 if self.full else 30

    @property
    def longest_delay(self) -> float:
        """When a tweet is sent again at the latest: its first row must still be there, or it is a new tweet."""
        return self.retention_seconds / 3

    @property
    def capacity_tweets(self) -> int:
        return 20_000 if self.full else 8_000

    def events(self) -> list[Event]:
        kills = [Event(at, "kill") for at in _every(self.kill_every, self.kill_every / 2, self.seconds)]
        promotions = [Event(at, "promotion") for at in _every(self.promote_every, self.promote_every, self.seconds - 5)]
        # Between two kills, so that the table shows what each of them costs.
        server = Event(self.kill_every * (0.45 * self.seconds // self.kill_every) + 0.9 * self.kill_every, "server")
        return sorted([*kills, *promotions, server], key=lambda event: event.at_seconds)


def _every(step: float, first: float, end: float) -> list[float]:
    return [first + i * step for i in range(int(max(0.0, end - first) // step) + 1) if first + i * step < end]
