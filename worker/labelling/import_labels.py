"""Import the labels of a file: file -> checked labels -> rows, in one transaction."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from sqlalchemy.orm import Session

from db import jobs, predictions, registry
from db.errors import listed, shown
from db.labelling import labels
from db.models import Tweet, utc_now
from db.session import Database
from training.data.columns import MULTI_LABEL_SEPARATOR
from training.data.numbers import number_of
from training.text.cleaning import same_text_key
from worker.errors import BadLabels
from worker.labelling.label_file import GivenLabel, form_of, read_labels
from worker.stream.tweet_record import OPTIONAL
from worker.stream.tweet_record import Tweet as ReadTweet

IMPORTED = "import"
MAX_SHOWN = 10
# A label of the file, and its text as it is stored.
Row = tuple[GivenLabel, str]


@dataclass
class ImportReport:
    """What became of the rows of a file. `known` labels were stored before; `missing` tweets are not stored."""

    added: int = 0
    known: int = 0
    unlabelled: int = 0
    skipped: int = 0
    stored_tweets: int = 0
    missing: int = 0
    missing_ids: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Allowed:
    """The labels that a tweet may have: those of a model version, or any when there is no champion."""

    names: Sequence[str] = ()
    several: bool = False
    model_version_id: int | None = None

    def text(self, given: GivenLabel) -> str:
        """The label as it is stored: several in the order of the model. Raises `BadLabels` for an unknown one."""
        if not self.names:
            return MULTI_LABEL_SEPARATOR.join(given.labels)
        if len(self.names) == 1:  # the model predicts a number
            (label, *others) = given.labels
            if others or number_of(label) is None:
                raise BadLabels(f"label {shown(label)} is not a number, which model {self.model_version_id} predicts")
            return label
        for label in given.labels:
            if label not in self.names:
                raise BadLabels(
                    f"label {shown(label)} is none of {listed(self.names)}, the labels of the champion (model "
                    f"{self.model_version_id}); correct it, or promote a model that has it first"
                )
        if len(given.labels) > 1 and not self.several:
            raise BadLabels(f"it has the labels {listed(given.labels)}, and a tweet has one of them; keep one")
        return MULTI_LABEL_SEPARATOR.join(name for name in self.names if name in given.labels)


def import_labels(
    database: Database, name: str, *, annotator: str | None = None, proposed: bool = False, form: str | None = None
) -> ImportReport:
    """Store the labels of a file; nothing is stored when a row is refused. Importing a file again adds nothing.

    `annotator` is the name for labels whose row has none. With `proposed` they are stored as proposals of a model,
    which are never trained on. A tweet that is not stored is stored first if its row has a text.
    Raises `BadRequest`, `BadSource` or `BadLabels`.
    """
    file = read_labels(name, form_of(name, form))
    source = labels.PROPOSED if proposed else IMPORTED
    with database.read() as session:
        allowed = allowed_labels(session)
    rows = []
    for given in file.given:
        try:
            rows.append((given, allowed.text(given)))
        except BadLabels as error:
            raise BadLabels(f"row {given.row} of {file.name}: {error}; nothing was imported") from error
    named = _last_of_each(rows, annotator or source)
    repeated = len(rows) - len(named)
    report = ImportReport(known=file.unchanged + repeated, unlabelled=file.unlabelled, skipped=file.skipped)
    # In order of id, so that two imports lock the tweets in the same order; the rows of a tweet stay in their order.
    named.sort(key=lambda row: row[0].tweet_id)
    with database.begin() as session:
        for start in range(0, len(named), labels.CHUNK_ROWS):
            try:
                _import_chunk(session, named[start : start + labels.CHUNK_ROWS], source, report)
            except BadLabels as error:
                raise BadLabels(f"{file.name}: {error}; nothing was imported") from error
    return report


def allowed_labels(session: Session) -> Allowed:
    """The labels of the champion; any without one."""
    version_id = registry.assigned(session, registry.CHAMPION)
    if version_id is None:
        return Allowed()
    version = registry.get(session, version_id)
    job = jobs.find(session, version.job_id) if version.job_id is not None else None
    # The task of an imported model is only in its artifact.
    several = job is None or job.config.get("task") == "multi_label"
    return Allowed(version.labels, several, version_id)


def _last_of_each(rows: Sequence[Row], annotator: str) -> list[Row]:
    """The rows with a name of an annotator. Of the labels without a time of one tweet and annotator, only the last."""
    named = [(replace(given, annotator=given.annotator or annotator), label) for given, label in rows]
    last = {(given.tweet_id, given.annotator): place for place, (given, _) in enumerate(named) if given.at is None}
    return [
        (given, label)
        for place, (given, label) in enumerate(named)
        if given.at is not None or last[given.tweet_id, given.annotator] == place
    ]


def _import_chunk(session: Session, chunk: Sequence[Row], source: str, report: ImportReport) -> None:
    tweet_ids = sorted({given.tweet_id for given, _ in chunk})
    stored = predictions.present(session, tweet_ids)
    new = {given.tweet_id: given.tweet for given, _ in chunk if given.tweet and given.tweet_id not in stored}
    predictions.add_tweets(session, [_tweet_row(tweet) for tweet in new.values()])
    report.stored_tweets += len(new)
    stored |= set(new)
    _check_doubtful(session, [given for given, _ in chunk if given.doubtful_id and given.tweet_id in stored])
    missing = [id_ for id_ in tweet_ids if id_ not in stored]
    report.missing += len(missing)
    report.missing_ids += missing[: MAX_SHOWN - len(report.missing_ids)]
    known = KnownLabels(labels.known(session, tweet_ids), source)
    rows = [row for row in _new_rows(chunk, known, source) if row["tweet_id"] in stored]
    labels.add(session, rows)
    report.added += len(rows)
    report.known += sum(given.tweet_id in stored for given, _ in chunk) - len(rows)


def _check_doubtful(session: Session, given: Sequence[GivenLabel]) -> None:
    """Refuse an id that belongs to another text: doccano numbers the rows of a project in its own field `id`."""
    for one in given:
        stored = session.get(Tweet, one.tweet_id)
        if one.tweet and stored and same_text_key(stored.text) != same_text_key(one.tweet.text):
            raise BadLabels(
                f"tweet {one.tweet_id} of row {one.row} is stored with another text, so its id is not that of a tweet; "
                "put the ids of the tweets into a field tweet_id"
            )


class KnownLabels:
    """The stored labels of some tweets: by id, by all their fields, and the newest of each annotator."""

    def __init__(self, rows: Sequence[Any], source: str) -> None:
        same_kind = [row for row in rows if (row.source == labels.PROPOSED) == (source == labels.PROPOSED)]
        self.by_id = {row.id: (row.tweet_id, row.label) for row in same_kind}
        self.whole = {(row.tweet_id, row.annotator, row.label, row.at) for row in same_kind}
        self.newest = {(row.tweet_id, row.annotator): row.label for row in same_kind}


def _new_rows(chunk: Sequence[Row], known: KnownLabels, source: str) -> Iterator[dict[str, Any]]:
    """The labels that are not stored yet. A label without a time is new when it differs from the annotator's newest."""
    now = utc_now()
    for given, label in chunk:
        whom = (given.tweet_id, given.annotator)
        if given.exported_id is not None and known.by_id.get(given.exported_id) == (given.tweet_id, label):
            continue
        old = known.newest.get(whom) == label if given.at is None else (*whom, label, given.at) in known.whole
        if not old:
            known.whole.add((*whom, label, given.at or now))
            yield {
                "tweet_id": given.tweet_id, "label": label, "annotator": given.annotator, "source": source,
                "at": given.at or now,
            }  # fmt: skip


def _tweet_row(tweet: ReadTweet) -> dict[str, Any]:
    optional = {key: getattr(tweet, key) for key in OPTIONAL}
    return {
        "tweet_id": tweet.id, "text": tweet.text, **optional, "tweet_created_at": None, "received_at": utc_now()
    }  # fmt: skip
