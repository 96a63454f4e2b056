"""Pick tweets for people to label, ask them one at a time, and count the answers.

Half of the picks are random: figures of quality count these alone, since the others are not typical tweets.

A draw includes tweets that were picked for another reason or labelled before. They count as random from then on, with
the label that they have: a sample without them would lack the tweets that the model is least certain of. Every draw has
a fixed size, so the other reasons replace what it drew of known tweets. Its tweets get places in random order among all
picks of that time, and questions are asked in that order. So the random picks before the first one without an answer
are a uniform sample too. At later places only the known tweets have a label yet.
"""

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from sqlalchemy.orm import Session

from db import jobs, predictions, registry
from db.base import utc_now
from db.errors import NotFound, listed, shown
from db.labelling import labels, review
from db.models import ModelVersion, ReviewAsk
from db.session import Database
from training.data.columns import MULTI_LABEL_SEPARATOR
from worker.errors import BadRequest
from worker.settings import Settings

if TYPE_CHECKING:
    from training.evaluation.decisions import Floats

RANDOM_SHARE = 0.5
RANDOM_DAYS = 30
# A question without an answer is asked of others after this time.
ASK_SECONDS = 600.0
# One pick in this many is labelled by a second annotator, which tells how well people agree.
SECOND_READER_EVERY = 10
# The spread is taken from this many times as many random tweets, within limits that keep the clusters fast.
SPREAD_CANDIDATES, LEAST_CANDIDATES, MOST_CANDIDATES = 20, 200, 4_000
MOST_PICKS = 2_000


@dataclass(frozen=True)
class Question:
    """A tweet to label. It has no prediction, which would bias the reader."""

    tweet_id: str
    text: str
    topic: str | None
    author_id: str | None
    tweet_created_at: datetime | None
    reason: str
    place: int


@dataclass(frozen=True)
class Progress:
    """`labelled` are picks with a label, `skipped` those without one that somebody skipped.

    `open` are picks left for the annotator and `mine` those that he labelled. `pairs` are tweets that two people
    labelled, `agreement` the share of them with equal labels, and `kappa` Cohen's kappa. Both are None without pairs;
    kappa also when it is undefined because all labels are equal.
    """

    picked: int
    labelled: int
    skipped: int
    open: int
    mine: int
    pairs: int
    agreement: float | None
    kappa: float | None


# --- picking


def fill(
    database: Database, settings: Settings, count: int, seed: int | None = None, random_share: float = RANDOM_SHARE
) -> Counter[str]:
    """Pick up to `count` more tweets and return the number of new questions by reason.

    The seed is that of order, second readers and clusters; the database draws the random tweets. A draw may be of known
    tweets, which are no new questions. Raises `NotFound`
    without a champion or without its predictions, and `BadRequest` for numbers out of range and for a champion that
    predicts a number.
    """
    if not 1 <= count <= MOST_PICKS:
        raise BadRequest(f"{count} tweets cannot be picked at once; pick 1 to {MOST_PICKS:,}")
    if not 0 <= random_share <= 1:
        raise BadRequest(f"the random share is {random_share}; give one from 0 to 1")
    chance = random.Random(seed)
    with database.read() as session:
        champion = _champion(session)
        picking = _Picking(session, champion, registry.assigned(session, "challenger"), chance.randrange(2**32))
        chosen = picking.choose(count, random_share)
        if not chosen and not predictions.prediction_count(session, champion.id):
            raise NotFound(f"model {champion.id} has not scored a tweet yet; publish some with `tweetscore push`")
        known = review.known(session, list(chosen))
    # The transaction that writes is short: choosing takes seconds, during which SQLite would let nobody else write.
    with database.begin() as session:
        stored = set(_in_chunks(session, sorted(chosen)))
        picks = [(tweet_id, reason) for tweet_id, reason in chosen.items() if tweet_id in stored]
        chance.shuffle(picks)
        readers = _readers(len(picks), chance)
        place, now = review.last_place(session), utc_now()
        review.add_picks(
            session,
            [
                {
                    "tweet_id": tweet_id, "reason": reason, "readers": readers[i], "place": place + 1 + i,
                    "model_version_id": champion.id, "picked_at": now,
                }
                for i, (tweet_id, reason) in enumerate(picks)
            ],
        )  # fmt: skip
    return Counter(reason for tweet_id, reason in picks if tweet_id not in known)


class _Picking:
    """Chooses tweets for each reason. `chosen` maps their ids to the reason."""

    def __init__(self, session: Session, champion: ModelVersion, challenger: int | None, seed: int) -> None:
        self.session, self.champion, self.challenger, self.seed = session, champion, challenger, seed
        self.chosen: dict[str, str] = {}

    def choose(self, count: int, random_share: float) -> dict[str, str]:
        from training.evaluation.to_label import CANDIDATES, parts

        disagreeing = self._disagreeing(CANDIDATES * count)
        reasons = ["uncertain", "spread"] if not disagreeing else ["uncertain", "disagreement", "spread"]
        wanted = parts(count, random_share, reasons)
        candidates = min(max(SPREAD_CANDIDATES * wanted["spread"], LEAST_CANDIDATES), MOST_CANDIDATES)
        since = utc_now() - timedelta(days=RANDOM_DAYS)
        drawn = review.draw(self.session, self.champion.id, since, wanted["random"] + candidates)
        self.chosen = dict.fromkeys(drawn[: wanted["random"]], "random")
        new = len(self.chosen) - len(review.known(self.session, list(self.chosen)))
        if random_share == 1:
            return self.chosen
        # What a reason does not find is left to the next one; the least certain come last, and are always found.
        left = count - new
        left -= self._take("disagreement", disagreeing, wanted.get("disagreement", 0))
        left -= self._spread(drawn[wanted["random"] :], wanted["spread"])
        uncertain = review.least_certain(self.session, self.champion.id, CANDIDATES * left + len(self.chosen))
        self._take("uncertain", [(row.tweet_id, row.text, row.probabilities) for row in uncertain], left)
        return self.chosen

    def _disagreeing(self, limit: int) -> list[tuple[str, str, dict[str, float]]]:
        """Id, text and mean probabilities of both models."""
        if self.challenger is None or self.challenger == self.champion.id:
            return []
        rows = review.disagreements(self.session, self.champion.id, self.challenger, limit)
        return [
            (
                row.tweet_id,
                row.text,
                {
                    label: (row.probabilities.get(label, 0.0) + row.challenged.get(label, 0.0)) / 2
                    for label in self.champion.labels
                },
            )
            for row in rows
        ]

    def _take(self, reason: str, rows: Sequence[tuple[str, str, dict[str, float]]], count: int) -> int:
        """Choose `count` of the rows that are uncertain and unlike each other. Returns their number."""
        from training.evaluation.to_label import pick_to_label

        free = [row for row in rows if row[0] not in self.chosen]
        if not free or count < 1:
            return 0
        picked = pick_to_label([text for _, text, _ in free], self._array([p for *_, p in free]), count, self.seed)
        self.chosen |= {free[i][0]: reason for i in picked}
        return len(picked)

    def _spread(self, drawn: Sequence[str], count: int) -> int:
        from training.evaluation.to_label import spread_over

        known = review.known(self.session, drawn)
        free = [i for i in drawn if i not in known and i not in self.chosen]
        if not free or count < 1:
            return 0
        rows = sorted(review.texts(self.session, free), key=lambda row: str(row.tweet_id))
        picked = spread_over([row.text for row in rows], [row.topic for row in rows], count, self.seed)
        self.chosen |= {rows[i].tweet_id: "spread" for i in picked}
        return len(picked)

    def _array(self, probabilities: Sequence[dict[str, float]]) -> "Floats":
        import numpy as np

        return np.array([[row[label] for label in self.champion.labels] for row in probabilities], np.float32)


def _in_chunks(session: Session, tweet_ids: Sequence[str]) -> Iterator[str]:
    """The ids of tweets that still exist, which can no longer be deleted before the transaction ends."""
    for start in range(0, len(tweet_ids), review.CHUNK_ROWS):
        yield from predictions.present(session, tweet_ids[start : start + review.CHUNK_ROWS])


def _readers(count: int, chance: random.Random) -> list[int]:
    """Numbers of readers in random order: 2 for a tenth, and for the rest of a tenth as often as it is large."""
    full, rest = divmod(count, SECOND_READER_EVERY)
    second = full + (chance.random() < rest / SECOND_READER_EVERY)
    readers = [2] * second + [1] * (count - second)
    chance.shuffle(readers)
    return readers


# --- asking


def next_question(database: Database, annotator: str) -> Question | None:
    """The question that the annotator has not answered yet, or a new one; None when none is left.

    Two annotators who ask at the same moment get different tweets.
    """
    _check_name(annotator)
    with database.begin() as session:
        while True:
            now = utc_now()
            since = now - timedelta(seconds=ASK_SECONDS)
            pick = review.next_free(session, annotator, since)
            if pick is None:
                return None
            # On PostgreSQL a transaction that ended between the search and the lock may have asked it of another.
            if review.is_free(session, pick.tweet_id, annotator, since):
                review.ask(session, pick.tweet_id, annotator, now)
                return _question(session, pick.tweet_id)


def answer(database: Database, annotator: str, tweet_id: str, label: str) -> None:
    """Store the label. It is kept when it comes late, also when others have labelled the tweet since.

    Raises `BadRequest` for a label that the champion does not have, and `NotFound` for a tweet that was not asked.
    """
    with database.begin() as session:
        _close(session, annotator, tweet_id, _checked(session, label))


def skip(database: Database, annotator: str, tweet_id: str) -> None:
    """Never ask this annotator again. Raises `NotFound` for a tweet that was not asked."""
    with database.begin() as session:
        _close(session, annotator, tweet_id, None)


def undo(database: Database, annotator: str) -> Question | None:
    """Take the annotator's last answer or skip back and ask that tweet again; None when there is none."""
    with database.begin() as session:
        tweet_id = review.last_closed(session, annotator)
        question = review.asked(session, tweet_id, annotator) if tweet_id is not None else None
        if question is None:
            return None
        _reopen(session, question)
        return _question(session, question.tweet_id)


def _close(session: Session, annotator: str, tweet_id: str, label: str | None) -> None:
    question = review.asked(session, tweet_id, annotator)
    if question is None:
        raise NotFound(f"tweet {shown(tweet_id)} was not asked of {shown(annotator)}; get the next question first")
    # A second answer replaces the first one, so that undo takes both back.
    _reopen(session, question)
    if label is not None:
        row = {"tweet_id": tweet_id, "label": label, "annotator": annotator, "source": "review", "at": utc_now()}
        labels.add(session, [row])
    question.state, question.at = "skipped" if label is None else "labelled", utc_now()


def _reopen(session: Session, question: ReviewAsk) -> None:
    if question.state == "labelled":
        labels.withdraw(session, question.tweet_id, question.annotator)
    question.state, question.at = "asked", utc_now()
    session.flush()


def _question(session: Session, tweet_id: str) -> Question:
    return Question(**review.question(session, tweet_id)._mapping)


def _check_name(annotator: str) -> None:
    if not annotator.strip() or not annotator.isprintable():
        raise BadRequest(f"{shown(annotator)} is no name of an annotator; use a word such as your user name")


# --- labels and progress


def label_names(database: Database) -> list[str]:
    """The labels of the champion. Raises `NotFound` without one, and `BadRequest` for one that predicts a number."""
    with database.read() as session:
        return list(_champion(session).labels)


def progress(database: Database, annotator: str) -> Progress:
    with database.read() as session:
        counted, pairs = review.counts(session, annotator), review.pairs(session)
    equal = sum(one == other for one, other in pairs)
    return Progress(*counted, len(pairs), equal / len(pairs) if pairs else None, _kappa(pairs))


def _kappa(pairs: Sequence[tuple[str, str]]) -> float | None:
    if len({label for pair in pairs for label in pair}) < 2:
        return None
    from sklearn.metrics import cohen_kappa_score

    return float(cohen_kappa_score(*zip(*pairs, strict=True)))


def _champion(session: Session) -> ModelVersion:
    version_id = registry.assigned(session, registry.CHAMPION)
    if version_id is None:
        raise NotFound("there is no champion yet; train a model and promote it")
    version = registry.get(session, version_id)
    if len(version.labels) < 2:
        raise BadRequest(f"model {version_id} predicts a number, so it has no labels; promote one with labels")
    return version


def _checked(session: Session, label: str) -> str:
    """The label, with several labels in the order of the champion's. Raises `BadRequest` when it does not have them."""
    champion = _champion(session)
    several = _is_multi_label(session, champion)
    given = label.split(MULTI_LABEL_SEPARATOR) if several and label else [] if several else [label]
    if unknown := [name for name in given if name not in champion.labels]:
        raise BadRequest(f"model {champion.id} has no label {shown(unknown[0])}; use one of {listed(champion.labels)}")
    return MULTI_LABEL_SEPARATOR.join(name for name in champion.labels if name in given)


def _is_multi_label(session: Session, version: ModelVersion) -> bool:
    """Whether a tweet may have several labels. An imported model has no job and is taken for one of single labels."""
    job: Any = jobs.find(session, version.job_id) if version.job_id is not None else None
    return job is not None and job.config.get("task") == "multi_label"
