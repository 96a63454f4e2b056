"""Export stored tweets with their labels and predictions for Label Studio, doccano or a spreadsheet, in chunks."""

import csv
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from db import registry
from db.errors import plain
from db.labelling import labels
from db.models import Label
from db.session import Database
from training.data.columns import MULTI_LABEL_SEPARATOR
from worker.errors import BadRequest
from worker.labelling.label_file import CONTROL, CSV, DOCCANO, LABEL_BEFORE, LABEL_STUDIO, form_of
from worker.maintenance.export import cell, text_file

COLUMNS = ("tweet_id", "text", "label", "annotator", "predicted", "probability")


@dataclass(frozen=True)
class LabelledTweet:
    """A tweet, the labels that people gave it, oldest first, and the champion's prediction, None without one."""

    tweet_id: str
    text: str
    topic: str | None
    given: Sequence[Label]
    predicted: str | None
    probability: float | None
    model_version_id: int | None


Write = Callable[[LabelledTweet], None]


def export_labels(
    database: Database,
    place: str,
    form: str | None = None,
    *,
    since: datetime | None = None,
    topic: str | None = None,
    has_label: bool | None = None,
    limit: int | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> int:
    """Write the tweets, the newest first, with their labels and the champion's predictions. Returns their number.

    `place` is a file, replaced atomically at the end, or `-`. `since` is the time a tweet was written, or else
    received. `has_label` selects the tweets that people did or did not label. `progress` gets the number of tweets.
    Raises `BadRequest` for an unknown format and a file that cannot be written.
    """
    writer, done = WRITERS[form_of(place, form)], 0
    with database.read() as session:
        model = registry.assigned(session, registry.CHAMPION)
        if model is not None and len(registry.get(session, model).labels) < 2:
            model = None  # it predicts a number, which none of the formats can propose
        query = labels.with_predictions(model, since, topic, has_label, limit)
        # The database also sends the rows in chunks: neither side holds all of them.
        result = session.execute(query.execution_options(yield_per=labels.CHUNK_ROWS))
        try:
            with writer(place) as write:
                for chunk in result.partitions(labels.CHUNK_ROWS):
                    given: dict[str, list[Label]] = {row.tweet_id: [] for row in chunk}
                    for label in labels.of_tweets(session, list(given)):
                        if label.source != labels.PROPOSED:
                            given[label.tweet_id].append(label)
                    for row in chunk:
                        write(LabelledTweet(row[0], row[1], row[2], given[row[0]], row[3], row[4], model))
                    done += len(chunk)
                    progress(done)
                    session.expunge_all()  # else the session would hold every label
        except OSError as error:
            raise BadRequest(f"{plain(place)} cannot be written ({error.strerror}); name another file") from error
    return done


@contextmanager
def _label_studio(place: str) -> Iterator[Write]:
    with text_file(place, "utf-8") as file:
        file.write("[")
        before = "\n"

        def write(tweet: LabelledTweet) -> None:
            nonlocal before
            file.write(before + json.dumps(_task(tweet), ensure_ascii=False))
            before = ",\n"

        yield write
        file.write("\n]\n")


def _task(tweet: LabelledTweet) -> dict[str, Any]:
    proposed = []
    if tweet.predicted is not None:
        proposed.append(
            {
                "model_version": f"tweetscore-{tweet.model_version_id}",
                "score": tweet.probability,
                "result": _result(tweet.predicted),
            }
        )
    return {
        "data": {"text": tweet.text, "tweet_id": tweet.tweet_id, "topic": tweet.topic},
        "predictions": proposed,
        # Label Studio keeps `id` as `import_id`, by which the import recognises a label. A field `completed_by` would
        # have to name a user of the project.
        "annotations": [
            {
                "id": label.id,
                "annotator": label.annotator,
                "created_at": label.at.isoformat(),
                "ground_truth": False,
                "result": _result(label.label),
            }
            for label in tweet.given
        ],
    }


def _result(label: str) -> list[dict[str, Any]]:
    chosen = {"choices": label.split(MULTI_LABEL_SEPARATOR)}
    return [{"from_name": CONTROL, "to_name": "text", "type": "choices", "value": chosen}]


@contextmanager
def _doccano(place: str) -> Iterator[Write]:
    with text_file(place, "utf-8") as file:

        def write(tweet: LabelledTweet) -> None:
            label = majority(tweet.given)
            row = {
                "text": tweet.text,
                "label": label.split(MULTI_LABEL_SEPARATOR) if label else [],
                "tweet_id": tweet.tweet_id,
                "topic": tweet.topic,
                "predicted": tweet.predicted,
                "probability": tweet.probability,
            }
            # doccano returns the field unchanged, so the import recognises a label that nobody changed.
            row |= {LABEL_BEFORE: label} if label else {}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")

        yield write


def majority(given: Sequence[Label]) -> str | None:
    """The label that most annotators gave; among equals the newest. `given` is oldest first."""
    votes = Counter(label.label for label in given)
    newest = {label.label: place for place, label in enumerate(given)}
    return max(votes, key=lambda label: (votes[label], newest[label]), default=None)


@contextmanager
def _csv(place: str) -> Iterator[Write]:
    """One row for each label, and one for a tweet without labels."""
    # With a byte-order mark, by which spreadsheets recognise UTF-8.
    with text_file(place, "utf-8-sig") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)

        def write(tweet: LabelledTweet) -> None:
            probability = None if tweet.probability is None else f"{tweet.probability:.4f}"
            for label, annotator in [(one.label, one.annotator) for one in tweet.given] or [("", "")]:
                row = (tweet.tweet_id, tweet.text, label, annotator, tweet.predicted, probability)
                writer.writerow(map(cell, row))

        yield write


WRITERS: dict[str, Callable[[str], AbstractContextManager[Write]]] = {
    LABEL_STUDIO: _label_studio,
    DOCCANO: _doccano,
    CSV: _csv,
}
