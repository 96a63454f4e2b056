"""Read labels from the files that Label Studio, doccano and spreadsheets write. Uses no database.

Label Studio: https://labelstud.io/guide/export (JSON, JSON_MIN and CSV). doccano: JSONL, in which the fields of an
imported row are beside `id`, `text` and `label`.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from db.errors import listed, plain, shown
from training.data.columns import LABEL_COLUMNS, MULTI_LABEL_SEPARATOR, TEXT_COLUMNS, has_surrogates
from training.data.table_file import TableFile, open_table
from training.errors import BadRow
from worker.errors import BadLabels, BadRecord, BadRequest
from worker.maintenance.export import text_of_cell
from worker.stream.tweet_record import Tweet, parse_object

LABEL_STUDIO, DOCCANO, CSV = FORMS = ("label-studio", "doccano", "csv")
ENDINGS = {".json": LABEL_STUDIO, ".jsonl": DOCCANO, ".ndjson": DOCCANO, ".csv": CSV, ".tsv": CSV}
# Name of the choices in the labelling configuration, and of the label that a row of doccano had when it was exported.
CONTROL, LABEL_BEFORE = "sentiment", "label_before"
# The tools write ids of their own in `id`, so that of the tweet comes first.
ID_KEYS = ("tweet_id", "id_str", "id")
MAX_NAME_CHARS = 200
ROUNDED = re.compile(r"[0-9][.,]?[0-9]*E\+[0-9]+", re.IGNORECASE)


@dataclass(frozen=True)
class GivenLabel:
    """One label of a file. `row` counts tasks, or the lines of the file, from 1.

    `labels` are several for a multi-label task. `tweet` is the tweet to store if it is new, None when the row has no
    text. `doubtful_id` tells that the id may be one of the labelling tool. `exported_id` is the id of the label that
    was exported to Label Studio.
    """

    row: int
    tweet_id: str
    labels: tuple[str, ...]
    annotator: str | None = None
    at: datetime | None = None
    tweet: Tweet | None = None
    doubtful_id: bool = False
    exported_id: int | None = None


@dataclass
class LabelFile:
    """The labels of a file, and how many rows have none, were skipped by the annotator, or were exported like this."""

    name: str
    given: list[GivenLabel]
    unlabelled: int = 0
    skipped: int = 0
    unchanged: int = 0


def form_of(name: str, wanted: str | None) -> str:
    """The format that is wanted, else the one that the name ends with. Raises `BadRequest`."""
    if wanted is not None:
        if wanted not in FORMS:
            raise BadRequest(f"{shown(wanted)} is not a format of labels; use {', '.join(FORMS)}")
        return wanted
    found = ENDINGS.get(Path(name.removesuffix(".gz")).suffix.lower())
    if found is None:
        raise BadRequest(
            f"the format of {plain(name)} is unknown; give --format ({', '.join(FORMS)}), or a name that ends with "
            ".json, .jsonl or .csv"
        )
    return found


def read_labels(name: str, form: str) -> LabelFile:
    """Read every label of a file. Raises `BadLabels` with the row and the remedy, and `BadSource`."""
    with open_table(name, default_format="csv" if form == CSV else "json") as table:
        if form == CSV and table.format == "json":
            table.format = "csv"
        elif form != CSV and table.format in ("csv", "tsv"):
            table.format = "json"
        file = LabelFile(table.name, [])
        for number, value in _values(table):
            try:
                if isinstance(value, BadRow):
                    raise BadLabels(str(value))
                if not isinstance(value, Mapping):
                    raise BadLabels("it is not an object with a text and labels; export the file again")
                _read_value(file, number, value, table.format in ("csv", "tsv"))
            except (BadLabels, BadRecord) as error:
                raise BadLabels(f"row {number} of {file.name}: {error}; nothing was imported") from error
    return file


def _values(table: TableFile) -> Iterator[tuple[int, Any]]:
    """Rows with their numbers. A JSON array is counted by its items."""
    for number, value in table.rows():
        if isinstance(value, list):
            yield from enumerate(value, start=1)
        else:
            yield number, value


def _read_value(file: LabelFile, number: int, value: Mapping[str, Any], cells: bool) -> None:
    if isinstance(value.get("data"), Mapping):
        _read_task(file, number, value)
        return
    if cells:
        value = {key: text_of_cell(text) for key, text in value.items()}
    labels = _names(_first(value, LABEL_COLUMNS))
    if not labels:
        file.unlabelled += 1
    elif labels == _names(value.get(LABEL_BEFORE)):
        file.unchanged += 1
    else:
        file.given.append(_of_row(number, value, labels))


# --- Label Studio's JSON


def _read_task(file: LabelFile, number: int, task: Mapping[str, Any]) -> None:
    annotations = task.get("annotations", task.get("completions")) or []
    counted = len(file.given), file.skipped
    for annotation in annotations if isinstance(annotations, list) else []:
        if not isinstance(annotation, Mapping):
            raise BadLabels("its annotations are numbers; export the format JSON, with the annotations")
        if annotation.get("was_cancelled") or annotation.get("skipped"):
            file.skipped += 1
        elif labels := _choices(annotation.get("result")):
            file.given.append(_of_annotation(number, task["data"], annotation, labels))
    if counted == (len(file.given), file.skipped):
        file.unlabelled += 1


def _of_annotation(
    number: int, data: Mapping[str, Any], annotation: Mapping[str, Any], labels: tuple[str, ...]
) -> GivenLabel:
    tweet_id, tweet = _tweet(data, ID_KEYS)
    exported = annotation.get("import_id", annotation.get("id") if "annotator" in annotation else None)
    return GivenLabel(
        number,
        tweet_id,
        labels,
        _person(annotation.get("completed_by", annotation.get("annotator"))),
        _time(annotation.get("updated_at") or annotation.get("created_at")),
        tweet,
        exported_id=exported if isinstance(exported, int) else None,
    )


def _choices(result: Any) -> tuple[str, ...]:
    """The chosen labels of an annotation. With several controls, those of the control `sentiment`."""
    by_control: dict[str, list[Any]] = {}
    for one in result if isinstance(result, list) else []:
        if isinstance(one, Mapping) and one.get("type") == "choices":
            value = one.get("value")
            chosen = value.get("choices") if isinstance(value, Mapping) else None
            by_control.setdefault(str(one.get("from_name")), []).extend(chosen if isinstance(chosen, list) else [])
    if len(by_control) > 1 and CONTROL not in by_control:
        raise BadLabels(
            f'it has choices of {listed(by_control)}; name the control of the labels "{CONTROL}" in the labelling '
            "configuration"
        )
    return _names(by_control.get(CONTROL) or next(iter(by_control.values()), None))


# --- flat rows: doccano, CSV, and Label Studio's JSON_MIN


def _of_row(number: int, row: Mapping[str, Any], labels: tuple[str, ...]) -> GivenLabel:
    label_studio = "annotation_id" in row
    tweet_id, tweet = _tweet(row, ID_KEYS[:2] if label_studio else ID_KEYS)
    time = (row.get("updated_at") or row.get("created_at")) if label_studio else row.get("at")
    return GivenLabel(
        number,
        tweet_id,
        labels,
        _person(row.get("annotator")),
        _time(time),
        tweet,
        doubtful_id=_first(row, ID_KEYS[:2]) is None,
    )


def _tweet(row: Mapping[str, Any], id_keys: Iterable[str]) -> tuple[str, Tweet | None]:
    """The id of a row's tweet, and the tweet if the row has its text."""
    id_ = _first(row, id_keys)
    if id_ is None:
        raise BadLabels("it has no tweet id; name the field of the ids tweet_id, and keep it in the labelling tool")
    if isinstance(id_, str) and ROUNDED.fullmatch(id_.strip()):
        raise BadLabels(f"a spreadsheet rounded the tweet id to {id_}; import the column tweet_id as text there")
    text = _first(row, (*TEXT_COLUMNS, "data"))
    blank = not isinstance(text, str) or not text.strip()
    # Without a text, only the id is checked.
    tweet = parse_object(
        {"id": id_, "text": "-" if blank else text, **{key: row.get(key) for key in ("author_id", "lang", "topic")}}
    )
    return tweet.id, None if blank else tweet


def _first(row: Mapping[str, Any], keys: Iterable[str]) -> Any:
    return next((row[key] for key in keys if row.get(key) not in (None, "")), None)


def _names(value: Any) -> tuple[str, ...]:
    """The labels of a value: a text with labels joined by |, a list of texts, or Label Studio's object of choices."""
    if isinstance(value, str) and value.startswith("{") and "choices" in value:
        try:
            value = json.loads(value)
        except ValueError:
            raise BadLabels(f"the label {shown(value)} is not JSON; export the file again") from None
    if isinstance(value, Mapping):
        value = value.get("choices")
    if value is None:
        return ()
    found = value if isinstance(value, list) else str(value).split(MULTI_LABEL_SEPARATOR)
    for name in found:
        if isinstance(name, list | dict | bool) or name is None:
            raise BadLabels(f"the label {shown(name)} is not the name of a label; export a project of classification")
    return tuple(dict.fromkeys(_short(str(name).strip(), "label") for name in found if str(name).strip()))


def _person(value: Any) -> str | None:
    """The name of an annotator: a text, Label Studio's number of a user, or its object with an e-mail address."""
    if isinstance(value, Mapping):
        value = _first(value, ("email", "username", "id"))
    name = "" if value is None else str(value).strip()
    return _short(name, "annotator") if name else None


def _short(name: str, what: str) -> str:
    if len(name) > MAX_NAME_CHARS or "\x00" in name or has_surrogates(name):
        raise BadLabels(
            f"the {what} {shown(name)} has more than {MAX_NAME_CHARS} characters, or some that no database stores"
        )
    return name


def _time(value: Any) -> datetime | None:
    """The time of a label; one without a zone is in UTC."""
    if value in (None, ""):
        return None
    try:
        parsed = datetime.fromisoformat(str(value).strip())
        return (parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)).astimezone(UTC)
    except (ValueError, OverflowError):
        raise BadLabels(f"the time {shown(value)} cannot be read; write it as 2026-01-31T12:00:00Z") from None
