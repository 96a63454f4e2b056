"""Enqueue training jobs on labels of stored tweets, with or without the rows of a file."""

import json
import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from db.errors import listed, shown
from db.labelling import labels
from db.models import TrainingJob, utc_now
from db.session import Database
from training.config import TrainConfig
from training.data.columns import MULTI_LABEL_SEPARATOR
from training.data.dataset import Rows, read_rows
from training.data.numbers import exact_text, number_of
from training.data.targets import labels_of_row
from training.errors import BadDataset
from training.text.cleaning import same_text_key
from worker.app import TRAINING, client_app, nudge
from worker.connections import open_sql
from worker.intake.submit_job import job_config, local_copy, submit_training
from worker.settings import Settings, load_settings

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FromLabels:
    """A queued job, the number of labelled tweets in its dataset, and notes on rows that were left out."""

    job: TrainingJob
    tweets: int
    notes: list[str]


@dataclass(frozen=True)
class _Labelled:
    text: str
    names: tuple[str, ...]
    tweet_id: str | None = None


def submit_from_labels(
    settings: Settings,
    database: Database,
    dataset: str | Path | None = None,
    preset: str | None = None,
    /,
    *,
    since: datetime | None = None,
    topic: str | None = None,
    **options: Any,
) -> FromLabels:
    """Enqueue a job on the tweets that people labelled, and on the rows of `dataset`.

    A tweet has the label that most annotators gave it. What a model proposed is not used. A row of the file whose text
    people gave another label is left out. `since` is the time a tweet was written, or else received; one
    without a zone is in UTC. Raises what `submit_training` raises, and `BadDataset` when no such tweet is labelled.
    """
    config = job_config(settings, preset, options)
    if since is not None and since.tzinfo is None:
        since = since.replace(tzinfo=UTC)
    read_at = utc_now()
    with database.read() as session:
        stored = labels.labelled(session, since, topic)
    if not stored:
        raise BadDataset(
            "people labelled no stored tweet" + (" of this time and topic" if since or topic else "")
            + "; label some and import them with `tweetscore label import`"
        )  # fmt: skip
    given = [_Labelled(row.text, _stored_names(row.tweet_id, row.label, config), row.tweet_id) for row in stored]
    rows: list[_Labelled] = []
    notes = []
    if dataset is not None:
        with local_copy(str(dataset)) as path:
            rows, left_out = _without_other_labels(read_rows(path), given, config)
        if left_out:
            notes.append(
                f"{left_out} rows of {path.name} were left out: people gave their texts another label in the database"
            )
    if config.labels is not None:  # the rows have the names already
        options = {**options, "labels": {name: name for name in dict.fromkeys(config.labels.values())}}
    with tempfile.TemporaryDirectory(prefix="tweetscore-") as folder:
        path = Path(folder) / "labels.jsonl"
        _write(path, [*rows, *given])
        # Figures of live quality leave out the labels that a model may have been trained on.
        job = submit_training(settings, database, path, preset, labels_until=read_at, **options)
        return FromLabels(job, len(given), notes)


def submit_from_labels_and_nudge(dataset: str | None = None, preset: str | None = None, **options: Any) -> int:
    """Queue a job with the settings of the environment, nudge a training worker and return the job's id."""
    settings = load_settings()
    database = open_sql(settings)
    try:
        queued = submit_from_labels(settings, database, dataset, preset, **options)
    finally:
        database.close()
    for note in queued.notes:
        log.warning("job %d: %s", queued.job.id, note)
    nudge(client_app(settings), TRAINING)
    return queued.job.id


def _stored_names(tweet_id: str, label: str, config: TrainConfig) -> tuple[str, ...]:
    """The names of a stored label: as they are, or renamed like the labels of a file."""
    names = tuple(label.split(MULTI_LABEL_SEPARATOR)) if config.task == "multi_label" else (label,)
    if config.labels is None:
        numbers = config.task in ("ordinal", "continuous")
        return tuple(
            exact_text(value) if numbers and (value := number_of(name)) is not None else name for name in names
        )
    known = {**config.labels, **{name: name for name in config.labels.values()}}
    for name in names:
        if name not in known:
            raise BadDataset(
                f"tweet {tweet_id} is labelled {shown(name)}, which is none of {listed(known)}; name it in --labels, "
                "or give the tweet another label"
            )
    return tuple(known[name] for name in names)


def _without_other_labels(rows: Rows, given: Sequence[_Labelled], config: TrainConfig) -> tuple[list[_Labelled], int]:
    """The rows of a file without those whose text has another label in the database, and the number of those."""
    by_text: dict[str, set[frozenset[str]]] = {}
    for one in given:
        by_text.setdefault(same_text_key(one.text), set()).add(frozenset(one.names))
    kept = []
    for text, label, number in zip(rows.texts, rows.labels, rows.row_numbers, strict=True):
        names = labels_of_row(label, number, config)
        key = same_text_key(text)
        if not key or key not in by_text or frozenset(names) in by_text[key]:
            kept.append(_Labelled(text, names))
    return kept, len(rows.texts) - len(kept)


def _write(path: Path, rows: Sequence[_Labelled]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            values = {"label": MULTI_LABEL_SEPARATOR.join(row.names), "text": row.text}
            values |= {"tweet_id": row.tweet_id} if row.tweet_id is not None else {}
            file.write(json.dumps(values, ensure_ascii=False) + "\n")
