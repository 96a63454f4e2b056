"""Compare two model versions on the tweets that both scored: where they differ, and which people agree with."""

from collections.abc import Iterable
from dataclasses import dataclass

from sqlalchemy.orm import Session

from db import registry
from db.quality import pairs
from db.session import Database
from training.data.columns import VALUE
from worker.errors import BadRequest

# The level of every test here.
CHANCE = 0.05
EXAMPLES = 10


@dataclass(frozen=True)
class Agreement:
    """Labelled tweets that two versions scored: how many both, only the first, and only the second labelled correctly.

    `p_value` is that of the exact McNemar test.
    """

    tweets: int
    both_right: int
    only_first_right: int
    only_second_right: int
    p_value: float

    @property
    def by_chance(self) -> bool:
        """Whether chance alone could make the difference, at the level of 5 %."""
        return self.p_value >= CHANCE

    def sentence(self, one: int, other: int) -> str:
        """Which version is better, or why that is open."""
        if not self.tweets:
            return f"no labelled tweet was scored by both model {one} and model {other}"
        differing = self.only_first_right + self.only_second_right
        counts = (
            f"of {self.tweets:,} tweets, only model {one} is right on {self.only_first_right:,} and only model "
            f"{other} on {self.only_second_right:,} (exact McNemar test, p = {self.p_value:.3g})"
        )
        if not differing:
            return f"{counts}: they are right on the same tweets"
        if self.by_chance:
            return f"{counts}: the difference could be chance"
        better = one if self.only_first_right > self.only_second_right else other
        return f"{counts}: model {better} is better, beyond chance"


@dataclass(frozen=True)
class Example:
    """A tweet that two versions label differently. `label` is that of people, if they gave one."""

    tweet_id: str
    text: str
    first: str
    first_probability: float
    second: str
    second_probability: float
    label: str | None


@dataclass(frozen=True)
class LiveComparison:
    """`tweets` were scored by both versions; `confusion` counts them by (label of the first, label of the second).

    `labelled` is about all tweets with labels of people, `random` about those among them that were picked at random.
    """

    one: int
    other: int
    tweets: int
    differing: int
    confusion: dict[tuple[str, str], int]
    labelled: Agreement
    random: Agreement
    examples: list[Example]


def compare_live(database: Database, one: int, other: int, examples: int = EXAMPLES) -> LiveComparison:
    """Raises `NotFound` for a version that does not exist, and `BadRequest` for one version or a continuous one."""
    if one == other:
        raise BadRequest(f"model {one} cannot be compared with itself; name two models")
    with database.read() as session:
        for version_id in (one, other):
            if registry.get(session, version_id).labels == [VALUE]:
                raise BadRequest(f"model {version_id} predicts numbers; leave out --live to compare its test rows")
        confusion = pairs.label_pairs(session, one, other)
        labelled, random = agreements(session, one, other)
        shown = [Example(*row) for row in pairs.disagreements(session, one, other, examples)]
    differing = sum(n for (first, second), n in confusion.items() if first != second)
    return LiveComparison(one, other, sum(confusion.values()), differing, confusion, labelled, random, shown)


def agreements(session: Session, one: int, other: int) -> tuple[Agreement, Agreement]:
    """The agreement of two versions with people on all labelled tweets, and on those that were picked at random."""
    rows = pairs.labelled_pairs(session, one, other)
    right = [(first == label, second == label, is_random) for label, first, second, is_random in rows]
    return _agreement(right), _agreement(row for row in right if row[2])


def _agreement(right: Iterable[tuple[bool, bool, bool]]) -> Agreement:
    from training.evaluation.metrics import mcnemar  # imported here: SciPy and scikit-learn load slowly

    counts = {(True, True): 0, (True, False): 0, (False, True): 0, (False, False): 0}
    for first, second, _ in right:
        counts[first, second] += 1
    only_first, only_second = counts[True, False], counts[False, True]
    return Agreement(
        sum(counts.values()), counts[True, True], only_first, only_second, mcnemar(only_first, only_second)
    )
